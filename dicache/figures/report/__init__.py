"""A report: a profile and schedules on one page, an HTML file that needs nothing but a browser."""

from dicache.figures.report.document import check, report, save

__all__ = ["check", "report", "save"]
