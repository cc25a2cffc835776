"""Policies: rules that choose at run time what is skipped, from a signal of the generation itself."""

from collections.abc import Mapping
from typing import Any

from dicache.schedules.plan import PlanError
from dicache.schedules.policies.adacache import AdaCachePolicy, Motion
from dicache.schedules.policies.first_block import AtThreshold, FirstBlockPolicy
from dicache.schedules.policies.policy import Memory, Policy
from dicache.schedules.policies.teacache import Negative, TeaCachePolicy

__all__ = [
    "AdaCachePolicy",
    "AtThreshold",
    "FirstBlockPolicy",
    "Memory",
    "Motion",
    "Negative",
    "Policy",
    "TeaCachePolicy",
    "read_policy",
]

POLICIES: dict[str, type[Policy]] = {
    policy.name: policy for policy in (TeaCachePolicy, AdaCachePolicy, FirstBlockPolicy)
}


def read_policy(content: Mapping[str, Any]) -> Policy:
    """Read a policy.

    Raises:
        PlanError: If its name or a key is unknown or missing, or a value is not of its kind.
    """
    name = content.get("name") if isinstance(content, Mapping) else None
    if not isinstance(name, str) or name not in POLICIES:
        raise PlanError(f"unknown policy {content!r}; known: {', '.join(POLICIES)}")
    return POLICIES[name].from_json(content)
