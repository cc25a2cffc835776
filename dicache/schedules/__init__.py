"""What is computed at which step, and the file that says so. Plain data, no torch."""

from dicache.schedules.corrections import Corrections
from dicache.schedules.plan import Plan, PlanError, Rule
from dicache.schedules.policies import AdaCachePolicy, FirstBlockPolicy, Motion, TeaCachePolicy
from dicache.schedules.rows import Range, Row, Rows
from dicache.schedules.schedule import Schedule
from dicache.schedules.target import ScheduleError, Target

__all__ = [
    "AdaCachePolicy",
    "Corrections",
    "FirstBlockPolicy",
    "Motion",
    "Plan",
    "PlanError",
    "Range",
    "Row",
    "Rows",
    "Rule",
    "Schedule",
    "ScheduleError",
    "Target",
    "TeaCachePolicy",
]
