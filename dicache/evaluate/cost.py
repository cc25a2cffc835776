"""What a generation costs in multiply-accumulates, with and without a schedule."""

from collections.abc import Mapping

from dicache.anatomy import Anatomy
from dicache.evaluate.counting import CostError, Macs, PassCost
from dicache.models.configs import ModelConfig
from dicache.schedules import Plan, Schedule

CONVENTIONS = {
    "all": "all matrix products, convolutions and attention, of the whole model",
    "papers": "linear and convolution layers only; a skipped block counts as one of equal shares of the whole model, "
    "as in Delta-DiT, and one of a U-Net as what it has",
}


def planned_cost(whole: PassCost, anatomy: Anatomy, plan: Plan, *, passes: int = 2) -> Macs:
    """Return what a generation of one image costs with a plan.

    Args:
        whole: A guidance pass of the model.
        anatomy: The model's.
        plan: What is computed.
        passes: Guidance passes a step: 2 with guidance, 1 without.
    """
    contexts = ("cond", "uncond") if {"cond", "uncond"} & set(plan.contexts) else ("batched", "batched")
    macs = Macs(0.0, 0.0)
    for number, context in enumerate(contexts[:passes]):
        stop = plan.collapse_guidance_from if number else None
        steps = plan.steps if stop is None else stop
        macs = _sum(macs, _pass_cost(whole, anatomy, plan.table(anatomy, context), steps))
    return macs


def _pass_cost(whole: PassCost, anatomy: Anatomy, table: Mapping[str, str], steps: int) -> Macs:
    saved_all = saved_papers = 0.0
    share = whole.total.papers / len(anatomy.blocks)
    for block in anatomy.blocks:
        letters = {site.branch: table[block.key(site)][:steps] for site in block.sites}
        skipped = [any(row[step] == "S" for row in letters.values()) for step in range(steps)]
        saved_all += block.macs * sum(skipped)
        if any(skipped):
            saved_papers += (whole.of_layers([block.module]) if anatomy.links else share) * sum(skipped)
        for site in block.sites:
            reused = sum(letter == "R" and not out for letter, out in zip(letters[site.branch], skipped, strict=True))
            saved_all += site.macs * reused
            if reused:
                saved_papers += reused * whole.of_layers([f"{block.module}.{path}" for path in site.modules])
    uncached = whole.total.times(steps)
    return Macs(uncached.all - saved_all, uncached.papers - saved_papers)


def schedule_cost(whole: PassCost, anatomy: Anatomy, schedule: Schedule, *, passes: int) -> Macs:
    """Return what a generation of one image costs with a schedule; of a policy, what its calibration expected.

    Raises:
        CostError: If the schedule is for another model.
    """
    if schedule.anatomy.model != anatomy.model or schedule.anatomy.sites != anatomy.sites:
        raise CostError(
            f"the schedule is for a {schedule.anatomy.model} of {len(schedule.anatomy.blocks)} blocks, found a "
            f"{anatomy.model} of {len(anatomy.blocks)} ({whole.source.name})"
        )
    if schedule.plan is None:
        if not schedule.foreseen:
            raise CostError("the schedule decides at run time, and no calibration says what to expect")
        return whole.total.times(schedule.steps * passes * schedule.macs_fraction())
    return planned_cost(whole, anatomy, schedule.plan, passes=passes)


def passes_of(source: ModelConfig, guidance: float | None) -> int:
    """Return how many guidance passes a step takes: pipelines of diffusers leave the second out up to a scale of 1."""
    embedded = bool(source.config.get("guidance_embeds"))
    return 2 if guidance is not None and guidance > 1 and not embedded else 1


def _sum(a: Macs, b: Macs) -> Macs:
    return Macs(a.all + b.all, a.papers + b.papers)
