"""What a model may not have while a schedule is attached to it."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from dicache.anatomy.overrides import modules_of
from dicache.schedules import Schedule

PREFETCH = "lazy_prefetch_group_offloading"  # diffusers' names of its hooks
OFFLOADING = "group_offloading"
HARMLESS = "peft_autocast_disable"  # replaces a forward, and always runs it


def obstacle(model: nn.Module, parts: Sequence[nn.Module], schedule: Schedule) -> str | None:
    """Return in one sentence why a model cannot take a schedule as it is, and what to do; None if it can.

    Looks at what others do to a model that changes which of its layers run, or where. It is asked when the schedule is
    applied and when each generation begins, since much of it can be turned on in between.

    Args:
        model: The model.
        parts: All its modules.
        schedule: To be replayed on it.
    """
    kind = type(model).__name__
    if model.training:
        return f"the {kind} is in training mode; call its eval() first"
    # Asked for at each generation, of all modules: the few that have any of it are found first.
    marked = [own for part in parts if "gradient_checkpointing" in (own := vars(part)) or "_diffusers_hook" in own]
    if any(own.get("gradient_checkpointing") for own in marked):
        return (
            f"the {kind} has gradient checkpointing enabled, which is for training and runs its blocks again; call its "
            "disable_gradient_checkpointing() first"
        )
    if (config := vars(model).get("_cache_config")) is not None:
        return (
            f"the {kind} has another cache enabled, diffusers' {type(config).__name__}, and two caches would each skip "
            "what the other counts on; call its disable_cache() first"
        )
    hooks = list(_hooks(model)) if any("_diffusers_hook" in own for own in marked) else []
    for path, name, hook in hooks:
        if name != HARMLESS and hasattr(hook, "new_forward"):
            return (
                f"{path or kind} has the hook {name} of diffusers, which decides by itself whether its layers run; "
                "take it off (disable_cache() where it is a cache) before dicache.apply"
            )
        if name == PREFETCH:
            return (
                f"the {kind} is offloaded in groups with use_stream=True, and finds the order of its layers in its "
                "first call, which must run all of them unchanged; call it once before dicache.apply"
            )
    if not _skips_ranges(schedule):
        return None
    if any(name == OFFLOADING and _shared(hook.group) for _, name, hook in hooks):
        return (
            f"the {kind} is offloaded in groups of several blocks, which only the first of them loads, and this "
            "schedule may skip that one; use num_blocks_per_group=1 or offload_type='leaf_level'"
        )
    return None


def compiled(model: nn.Module) -> str | None:
    """Return in one sentence why a schedule cannot be applied to a compiled model; None if it is not compiled."""
    wrapped = isinstance(vars(model).get("_modules", {}).get("_orig_mod"), nn.Module)  # by torch.compile(model)
    if wrapped or any(vars(part).get("_compiled_call_impl") is not None for part in modules_of(model)):
        return (
            "the model is compiled already, and what it was compiled to may not see a schedule; apply it uncompiled, "
            "and compile afterwards"
        )
    return None


def _hooks(model: nn.Module) -> Iterator[tuple[str, str, Any]]:
    """Go through the hooks that diffusers has put on the modules of a model: path, name and hook."""
    for path, part in model.named_modules():
        registry = vars(part).get("_diffusers_hook")
        for name, hook in getattr(registry, "hooks", {}).items():
            yield path, name, hook


def _shared(group: Any) -> bool:
    """Whether a group of modules is loaded by one of them and unloaded by another."""
    return len(group.modules) > 1 and group.onload_leader is not group.offload_leader


def _skips_ranges(schedule: Schedule) -> bool:
    return schedule.plan is None or any(rule.action != "reuse" for rule in schedule.plan.rules)
