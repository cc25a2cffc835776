"""The exact planner: which steps to compute so that what is predicted in between errs least, under a budget."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise, product
from typing import Any, Literal, get_args

import numpy as np

from dicache.anatomy import Anatomy
from dicache.calibrate.chains import Chain, GapCosts, cheapest_chains, cheapest_share, step_costs
from dicache.calibrate.methods import CalibrationError, method
from dicache.profiler import Profile
from dicache.schedules import Plan, Rule, Schedule
from dicache.schedules.predicting import taylor_coefficients

Granularity = Literal["body", "branch"]
Stand = Literal["hold", "taylor"]
Aggregate = Literal["squares", "norms"]
BODY, BRANCHES = "body", "branches"  # a chain is of all blocks, of all branches or of one kind of them
HIGHEST = 2  # order that is planned exactly; each one more multiplies the work by the number of steps


@method("dp")
@dataclass(frozen=True)
class Dp:
    """Compute the steps that dynamic programming finds to leave the smallest error at all others together.

    The error of every step follows from the profile's products of all steps with one another, for every choice of the
    steps computed before. It is that of uncached runs: how an error changes what comes after it is not in it, nor is
    how much a step's error matters to the picture, unless weights say so.

    Attributes:
        steps_computed: How many steps are computed; None takes as many as `max_macs` allows.
        max_macs: Largest share of the model's multiply-accumulates, instead.
        predictor: What stands in: `hold`, the last one computed, or `taylor`.
        order: Of the Taylor expansion, 0 to 2; as at run time, it is lower until `order + 1` steps are computed. None
            takes 1.
        granularity: `body` plans at which steps all blocks run, `branch` at which steps their branches do. The error
            of a kind of branch is relative to its own size: equal relative errors of two kinds count as equally bad.
        together: Of branches, whether all kinds are computed at the same steps, those with the smallest sum of errors,
            or each kind at its own, with the budget shared out so that this sum is smallest, exactly. It is smaller
            then, but what a branch makes of a stream to which others added stale outputs is not in it: with as many
            steps of the bundled digits, separate chains gave 1 to 6 dB less than a common one.
        aggregate: What is added up over the steps that are not computed: `norms`, the relative errors themselves, or
            `squares`, their squares.
        warm_up: Steps at the start that are computed.
        force_last: Whether the last step is.
        max_gap: Most steps from a computed one to the next, or to the end; None sets no limit.

    References:
        DPCache, arXiv 2602.22654; SGLang's runtime/cache/dpcache.py, of order 1 with a warm-up of 3 steps, adds up the
        mean absolute errors of the predicted steps. CEM, arXiv 2512.23258, adds up errors by step and
        interval, so that only the last computed step counts.
    """

    steps_computed: int | None = None
    max_macs: float | None = None
    predictor: Stand = "taylor"
    order: int | None = None
    granularity: Granularity = "body"
    together: bool = True
    aggregate: Aggregate = "norms"
    warm_up: int = 1
    force_last: bool = False
    max_gap: int | None = None

    def __post_init__(self) -> None:
        if (self.steps_computed is None) == (self.max_macs is None):
            raise CalibrationError("dp: give either the number of computed steps or the share of the MACs")
        if self.max_macs is not None and not 0 < self.max_macs <= 1:
            raise CalibrationError(f"dp: the share of the MACs must be above 0 and at most 1, found {self.max_macs}")
        for name, kind in (("predictor", Stand), ("granularity", Granularity), ("aggregate", Aggregate)):
            if getattr(self, name) not in get_args(kind):
                known = " or ".join(get_args(kind))
                raise CalibrationError(f"dp: the {name} must be {known}, found {getattr(self, name)!r}")
        if self.order is not None and not 0 <= self.order <= (HIGHEST if self.predictor == "taylor" else 0):
            allowed = f"0 to {HIGHEST}" if self.predictor == "taylor" else "0 with hold"
            raise CalibrationError(f"dp: the order must be {allowed}, found {self.order}")
        for name, value in (("warm-up", self.warm_up), ("largest gap", self.max_gap)):
            if value is not None and value < 1:
                raise CalibrationError(f"dp: the {name} must be 1 step or more, found {value}")

    def calibrate(self, profile: Profile, weights: np.ndarray | None = None) -> Schedule:
        """Return the schedule that this profile gives.

        Args:
            profile: With the products of all steps.
            weights: Of each step's squared error, such as how sensitive the result is to it, (steps,); None weighs all
                alike.

        Raises:
            CalibrationError: If the profile has no run that did not fail, or no products of all steps, or the budget
                cannot be met.
        """
        if self.warm_up > profile.steps:
            raise CalibrationError(f"dp: the warm-up must be at most the {profile.steps} steps, found {self.warm_up}")
        costs = self._costs(profile, weights)
        mandatory = {*range(self.warm_up), *((profile.steps - 1,) if self.force_last else ())}
        chains = {
            kind: cheapest_chains(cost, profile.steps, self._reached + 1, mandatory=mandatory, max_gap=self.max_gap)
            for kind, cost in costs.items()
        }
        chosen = self._chosen(chains, profile)
        rules = tuple(self._rule(kind, chain, profile) for kind, chain in chosen.items())
        return Schedule(
            method="dp",
            settings=asdict(self),
            anatomy=profile.anatomy,
            target=profile.provenance.target,
            steps=profile.steps,
            plan=Plan(profile.steps, tuple(rule for rule in rules if "." in rule.steps)),
            measured={
                "model": profile.provenance.model,
                "runs": sum(run.ok for run in profile.runs),
                "guidance": profile.provenance.settings.get("guidance"),
                "computed_steps": {kind: len(chain.steps) for kind, chain in chosen.items()},
                "expected_error": sum(chain.cost for chain in chosen.values()),
                "expected_errors": {
                    kind: step_costs(costs[kind], profile.steps, self._reached + 1, chain.steps).tolist()
                    for kind, chain in chosen.items()
                },
                "front": {
                    kind: [[count, chain.cost] for count, chain in found.items()] for kind, found in chains.items()
                },
            },
        )

    @property
    def _reached(self) -> int:
        """The order of what stands in."""
        if self.order is not None:
            return self.order
        return 1 if self.predictor == "taylor" else 0

    def _rule(self, kind: str, chain: Chain, profile: Profile) -> Rule:
        letters = "".join("C" if step in chain.steps else "." for step in range(profile.steps))
        stand_in: dict[str, Any] = {"predictor": self.predictor, "order": self._reached}
        if kind in (BODY, BRANCHES):
            return Rule("skip" if kind == BODY else "reuse", letters, **stand_in)
        named = any(other.startswith(f"{kind}.") for other in profile.branches)
        return Rule("reuse", letters, branch=f"{kind}." if named else kind, **stand_in)

    def _costs(self, profile: Profile, weights: np.ndarray | None) -> dict[str, GapCosts]:
        """Return what the gaps cost, for each chain that is to be planned."""
        costs = {
            kind: gap_costs(gram, self._reached, self.aggregate, weights) for kind, gram in self._grams(profile).items()
        }
        if self.granularity == "body" or not self.together:
            return costs
        return {BRANCHES: lambda last: np.sum([cost(last) for cost in costs.values()], axis=0)}

    def _grams(self, profile: Profile) -> dict[str, np.ndarray]:
        """Return the products to plan by, the mean over all runs: of the `body`, or of each kind of branch."""
        name = "body/gram" if self.granularity == "body" else "body/branches"
        held = profile.arrays[name]  # (runs, steps, steps) or (runs, branches, steps, steps)
        if not len(held):
            raise CalibrationError("dp: the profile has no run that did not fail; profile again")
        mean = held.mean(axis=0)
        grams = {BODY: mean} if self.granularity == "body" else dict(zip(profile.branches, mean, strict=True))
        for kind, gram in grams.items():
            if lacking := np.flatnonzero(~np.isfinite(np.diagonal(gram))).tolist():
                raise CalibrationError(
                    f"dp: the profile has no products of the {kind} at step {lacking[0]} with the others: what the "
                    "scheduler was given there is no weighted sum of the guidance passes, or they differ in size. Plan "
                    "by what does not need them, such as `dicache calibrate taylorseer`"
                )
            if not np.isfinite(gram).all() or (np.diagonal(gram) <= 0).any():
                raise CalibrationError(
                    f"dp: the profile's products of the {kind} are not finite, or zero at a step; profile again"
                )
        return grams

    def _chosen(self, chains: Mapping[str, Mapping[int, Chain]], profile: Profile) -> dict[str, Chain]:
        """Return a chain for each kind, within the budget."""
        if self.max_macs is None:
            assert self.steps_computed is not None
            for found in chains.values():
                if self.steps_computed not in found:
                    raise CalibrationError(
                        f"dp: {self.steps_computed} of {profile.steps} steps cannot be computed with a warm-up of "
                        f"{self.warm_up}{self._limits()}; possible are {min(found)} to {max(found)}"
                    )
            return {kind: found[self.steps_computed] for kind, found in chains.items()}
        whole = profile.anatomy.macs * profile.steps
        if not whole:
            raise CalibrationError("dp: the MACs of this model are not known; give the number of computed steps")
        step = {kind: _macs(kind, profile.anatomy) for kind in chains}
        options = {
            kind: [(count * step[kind], chain.cost) for count, chain in found.items()] for kind, found in chains.items()
        }
        always = whole - profile.steps * sum(step.values())
        places = cheapest_share(options, int(self.max_macs * whole + 1e-6 * whole) - always)
        if places is None:
            least = (always + sum(found[0][0] for found in options.values())) / whole
            raise CalibrationError(
                f"dp: {self.max_macs:.3g} of the MACs cannot be reached: with a warm-up of {self.warm_up}"
                f"{self._limits()} the least is {least:.3g}"
            )
        return {kind: list(chains[kind].values())[place] for kind, place in places.items()}

    def _limits(self) -> str:
        gap = "" if self.max_gap is None else f", a largest gap of {self.max_gap}"
        return gap + (" and the last step computed" if self.force_last else "")


def _macs(kind: str, anatomy: Anatomy) -> int:
    """Return the multiply-accumulates that a step saves which is not in a chain."""
    if kind == BODY:
        return sum(block.macs for block in anatomy.blocks)
    sites = [site for block in anatomy.blocks for site in block.sites]
    return sum(site.macs for site in sites if kind in (BRANCHES, site.branch))


def gap_costs(
    gram: np.ndarray, order: int, aggregate: Aggregate = "norms", weights: np.ndarray | None = None
) -> GapCosts:
    """Return what the steps of a gap err together, if a Taylor expansion predicts them from the last computed ones.

    A prediction is a weighted sum of computed outputs, so its squared error is a quadratic form of the products. It is
    relative to the squared size of the output that it stands for.

    Args:
        gram: Products of the outputs of all steps with one another, (steps, steps), finite, positive on the diagonal.
        order: Of the expansion, 0 for holding; lower where fewer than `order + 1` steps were computed.
        aggregate: Whether the squares are added up, or their roots.
        weights: Of each step's squared error, (steps,); 1 where none are given.
    """
    steps = len(gram)
    scale = (np.ones(steps) if weights is None else weights) / np.diagonal(gram)
    expansions = [_expansions(reached, steps) for reached in range(1, order + 1)]

    def costs(last: int) -> np.ndarray:
        error = _squared_errors(gram, expansions, last) * scale[last + 1 :]
        total = np.cumsum(error if aggregate == "squares" else np.sqrt(error), axis=-1)
        return np.concatenate((np.zeros((*total.shape[:-1], 1)), total), axis=-1)

    return costs


def _expansions(order: int, steps: int) -> np.ndarray:
    """Return the coefficients of the differences in a Taylor expansion, as polynomials in the distance.

    They depend on distances alone, and vanish at the last computed step: as many steps behind it as the order say all.

    Returns:
        For each distance between successive computed steps, the newest first, each from 1 to steps - 1, of the powers 1
        to `order` of the distance, the coefficients: (distances, ..., powers, order).
    """
    table = np.zeros((steps,) * order + (order, order))
    ahead = np.arange(1, order + 1)
    powers = np.linalg.inv(ahead[:, None] ** ahead.astype(float))
    for distances in product(range(1, steps), repeat=order):
        if sum(distances) < steps:
            computed = [-sum(distances[:m]) for m in range(order + 1)]
            table[distances] = powers @ [taylor_coefficients(computed, int(step)) for step in ahead]
    return table


def _squared_errors(gram: np.ndarray, expansions: list[np.ndarray], last: int) -> np.ndarray:
    """Return the squared errors of all steps behind a computed one, for all choices of the ones computed before it.

    Returns:
        (older + 1, ..., steps - last - 1), the oldest first; 0 where no such steps can be.
    """
    order, steps = len(expansions), len(gram)
    later = np.arange(last + 1, steps)
    size = gram[later, later]
    if order == 0:
        return np.asarray(np.maximum(gram[last, last] - 2 * gram[last, later] + size, 0))
    errors = np.zeros((last + 1,) * order + (len(later),))
    errors[0] = _squared_errors(gram, expansions[:-1], last)
    if last < order:  # fewer are before it
        return errors
    grids = np.ogrid[(slice(0, last),) * order]  # the older steps, the oldest first
    computed = [np.array(last), *reversed(grids)]  # the last first
    distances = [newer - older for newer, older in pairwise(computed)]
    rising = np.logical_and.reduce(np.broadcast_arrays(*(d > 0 for d in distances)))
    found = expansions[-1][tuple(np.maximum(d, 0) for d in distances)]  # (older, ..., powers, order)
    ahead = (later - last)[:, None] ** np.arange(1.0, order + 1)  # (later, powers)
    c = np.moveaxis(ahead @ found, -1, 0)  # (order, older, ..., later)
    weights = [1 + c[0], *(c[m] - c[m - 1] for m in range(1, order)), -c[order - 1]]
    total = np.broadcast_to(size, c.shape[1:]).copy()
    for i, one in enumerate(computed):
        total += weights[i] * (weights[i] * gram[one, one][..., None] - 2 * gram[one[..., None], later])
        for j, two in enumerate(computed[:i]):
            total += 2 * weights[i] * weights[j] * gram[one, two][..., None]
    errors[(slice(1, None),) * order] = np.where(rising[..., None], np.maximum(total, 0), 0)
    return errors
