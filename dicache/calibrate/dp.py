"""The exact planner: which steps to compute so that what is predicted in between errs least, under a budget."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np

from dicache.anatomy import Anatomy
from dicache.calibrate.chains import Chain, GapCosts, cheapest_chains, cheapest_share, step_costs
from dicache.calibrate.forecast import Forecaster, best_choice
from dicache.calibrate.gaps import Aggregate, gap_costs
from dicache.calibrate.methods import CalibrationError, letters_of, method
from dicache.calibrate.solvers import solver_of
from dicache.profiler import Profile
from dicache.schedules import Plan, Rule, Schedule
from dicache.schedules.plan import MAX_ORDER, Weights

Granularity = Literal["body", "branch"]
Stand = Literal["hold", "taylor", "forecast"]
Weigh = Literal["none", "solver"]
BODY, BRANCHES = "body", "branches"  # a chain is of all blocks, of all branches or of one kind of them
HIGHEST = {"hold": 0, "taylor": 2, "forecast": MAX_ORDER}  # order; of Taylor, each one more takes steps times the work
USUAL = {"hold": 0, "taylor": 1, "forecast": 3}


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
        predictor: What stands in: `hold`, the last one computed; `taylor`; or `forecast`, a sum of the last ones with
            weights that the profile gives, for which the plan is the best that a local search finds and not exact. Its
            defaults were chosen on the bundled digits and scenes. On 32 images of other seeds, beside the better of
            Taylor orders 1 and 2 at evenly spread steps, it gave 2.4 and 4.7 dB more with 11 of 20 steps of all
            blocks computed, 0.3 less and 12.1 more with 8, and no clear difference with 6.
        order: Of the Taylor expansion, 0 to 2; as at run time, it is lower until `order + 1` steps are computed. None
            takes 1. A forecast adds up `order + 1` outputs; up to 4, None takes 3.
        granularity: `body` plans at which steps all blocks run, `branch` at which steps their branches do. The error
            of a kind of branch is relative to its own size: equal relative errors of two kinds count as equally bad.
        together: Of branches, whether all kinds are computed at the same steps, those with the smallest sum of errors,
            or each kind at its own, with the budget shared out so that this sum is smallest, exactly. It is smaller
            then, but what a branch makes of a stream to which others added stale outputs is not in it: with as many
            steps of the bundled digits, separate chains gave 1 to 6 dB less than a common one.
        aggregate: What is added up over the steps that are not computed: `norms`, the relative errors themselves, or
            `squares`, their squares.
        weigh: Of hold and Taylor, what each step's squared error is multiplied with: `none`, nothing; `solver`, the
            square of what an error of its output is expected to change in the last latents. A forecast has it always.
            Of these models the latter gave 0.1 to 9 dB more with 8 or 11 of 20 steps, and with 6 between 1.4 less and
            0.2 more; evenly spread steps were mostly better still.
        warm_up: Steps at the start that are computed.
        force_last: Whether the last step is.
        max_gap: Most steps from a computed one to the next, or to the end; None sets no limit.
        own: Of a forecast, how much each step's own error counts beside the accumulated one.
        reaction: Of a forecast, how far the outputs held are taken to err because the latents they were computed of
            already did, as a share of the most that an exact model would respond.
        variance: Of the data whose exact model tells how errors in the latents go on; the smaller, the
            more of an early error is taken to be corrected later.

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
    weigh: Weigh = "none"
    warm_up: int = 1
    force_last: bool = False
    max_gap: int | None = None
    own: float = 0.1
    reaction: float = 1.0
    variance: float = 0.1

    def __post_init__(self) -> None:
        if (self.steps_computed is None) == (self.max_macs is None):
            raise CalibrationError("dp: give either the number of computed steps or the share of the MACs")
        if self.max_macs is not None and not 0 < self.max_macs <= 1:
            raise CalibrationError(f"dp: the share of the MACs must be above 0 and at most 1, found {self.max_macs}")
        for name, kind in (
            ("predictor", Stand),
            ("granularity", Granularity),
            ("aggregate", Aggregate),
            ("weigh", Weigh),
        ):
            if getattr(self, name) not in get_args(kind):
                known = " or ".join(get_args(kind))
                raise CalibrationError(f"dp: the {name} must be {known}, found {getattr(self, name)!r}")
        lowest, highest = int(self.predictor == "forecast"), HIGHEST[self.predictor]
        if self.order is not None and not lowest <= self.order <= highest:
            allowed = f"{lowest} to {highest}" if highest else "0"
            told = "" if self.predictor == "taylor" else f" with {self.predictor}"
            raise CalibrationError(f"dp: the order must be {allowed}{told}, found {self.order}")
        counts = (
            ("number of computed steps", self.steps_computed),
            ("warm-up", self.warm_up),
            ("largest gap", self.max_gap),
        )
        for name, value in counts:
            if value is not None and value < 1:
                raise CalibrationError(f"dp: the {name} must be 1 step or more, found {value}")
        for name, number in (("own error's weight", self.own), ("reaction", self.reaction)):
            if not (np.isfinite(number) and number >= 0):
                raise CalibrationError(f"dp: the {name} must be 0 or more, found {number}")
        if not (np.isfinite(self.variance) and self.variance > 0):
            raise CalibrationError(f"dp: the data's variance must be above 0, found {self.variance}")
        if self.predictor == "forecast" and not self.together:
            raise CalibrationError("dp: forecasts of branches are planned together, not each kind at its own steps")

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
        if self.predictor == "forecast":
            if weights is not None:
                raise CalibrationError("dp: a forecast takes its weights from the profile's scheduler")
            return self._forecast(profile)
        if self.weigh == "solver":
            if weights is not None:
                raise CalibrationError("dp: the steps are weighed by the solver or by given weights, not by both")
            weights = solver_of(profile, self.variance).carried()[-1] ** 2
        costs = self._costs(profile, weights)
        mandatory = {*range(self.warm_up), *((profile.steps - 1,) if self.force_last else ())}
        chains = {
            kind: cheapest_chains(cost, profile.steps, self._reached + 1, mandatory=mandatory, max_gap=self.max_gap)
            for kind, cost in costs.items()
        }
        chosen = self._chosen(chains, profile)
        rules = tuple(self._rule(kind, chain.steps, profile) for kind, chain in chosen.items())
        told = {
            "computed_steps": {kind: len(chain.steps) for kind, chain in chosen.items()},
            "expected_error": sum(chain.cost for chain in chosen.values()),
            "expected_errors": {
                kind: step_costs(costs[kind], profile.steps, self._reached + 1, chain.steps).tolist()
                for kind, chain in chosen.items()
            },
            "front": {kind: [[count, chain.cost] for count, chain in found.items()] for kind, found in chains.items()},
        }
        return self._made(profile, rules, told)

    def _made(self, profile: Profile, rules: Sequence[Rule], told: Mapping[str, Any]) -> Schedule:
        return Schedule(
            method="dp",
            settings=asdict(self),
            anatomy=profile.anatomy,
            target=profile.provenance.target,
            steps=profile.steps,
            plan=Plan(profile.steps, tuple(rule for rule in rules if "." in rule.steps)),
            measured={
                **profile.origin,
                **told,
            },
        )

    @property
    def _reached(self) -> int:
        """The order of what stands in."""
        return USUAL[self.predictor] if self.order is None else self.order

    def _forecast(self, profile: Profile) -> Schedule:
        """Return the schedule whose skipped steps are expected to leave the smallest error in the last latents."""
        forecasters = self.forecasters(profile)
        count = self._affordable(profile) if self.steps_computed is None else self.steps_computed
        mandatory = {*range(self.warm_up), *((profile.steps - 1,) if self.force_last else ())}
        chosen = best_choice(list(forecasters.values()), count, mandatory=mandatory, max_gap=self.max_gap)
        made = {kind: forecaster.forecast(chosen) for kind, forecaster in forecasters.items()}
        rules = [self._rule(kind, chosen, profile, forecast.weights) for kind, forecast in made.items()]
        told = {
            "computed_steps": {kind: len(chosen) for kind in made},
            "expected_errors": {kind: forecast.errors.tolist() for kind, forecast in made.items()},
            "expected_accumulated": {kind: forecast.accumulated.tolist() for kind, forecast in made.items()},
        }
        return self._made(profile, rules, told)

    def forecasters(self, profile: Profile) -> dict[str, Forecaster]:
        """Return what finds the weights of the body, or of each kind of branch.

        What is predicted is the body's residual, or a branch; what an error of the model's output does to the latents
        is known. Both are taken to have the same error relative to their mean squared size, over all steps.

        Raises:
            CalibrationError: If the profile has no products of all steps, or its sampler is not linear.
        """
        grams = self._grams(profile)
        solver = solver_of(profile, self.variance)
        latents = profile.provenance.target.latents
        if latents is None:
            raise CalibrationError("dp: the profile does not say how large the latents are; profile again")
        power = np.diagonal(profile.arrays["body/output"].mean(axis=0)).mean() / np.prod(latents)
        return {
            kind: Forecaster(
                gram * (power / np.diagonal(gram).mean()),
                solver.carried()[-1],
                self.reaction * solver.sharpest,
                self._reached + 1,
                self.own,
            )
            for kind, gram in grams.items()
        }

    def _affordable(self, profile: Profile) -> int:
        """Return how many steps may be computed, if the others take what is not skipped at any step."""
        assert self.max_macs is not None
        step = profile.anatomy.macs
        if not step:
            raise CalibrationError("dp: the MACs of this model are not known; give the number of computed steps")
        saved = _macs(BODY if self.granularity == "body" else BRANCHES, profile.anatomy)
        budget = self.max_macs * step * profile.steps
        count = int((budget * (1 + 1e-9) - (step - saved) * profile.steps) // saved)
        least = self.warm_up + (self.force_last and self.warm_up < profile.steps)
        if count < least:
            share = (least * saved + (step - saved) * profile.steps) / (step * profile.steps)
            raise CalibrationError(
                f"dp: {self.max_macs:.3g} of the MACs cannot be reached: with a warm-up of {self.warm_up}"
                f"{self._limits()} the least is {share:.3g}"
            )
        return count

    def _rule(
        self, kind: str, computed: Collection[int], profile: Profile, weights: Mapping[int, Weights] | None = None
    ) -> Rule:
        letters = letters_of(step in computed for step in range(profile.steps))
        stand_in: dict[str, Any] = {"predictor": self.predictor}
        stand_in |= {"order": self._reached} if weights is None else {"weights": weights}
        if kind in (BODY, BRANCHES):
            return Rule("skip" if kind == BODY else "reuse", letters, **stand_in)
        return Rule("reuse", letters, branch=branch_of(kind, profile.branches), **stand_in)

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
        mean = self._mean(held)
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

    def _mean(self, held: np.ndarray) -> np.ndarray:
        """Return the mean over runs; of forecasts each at the same size, so that none dominates the weights."""
        if self.predictor != "forecast":
            return np.asarray(held.mean(axis=0))
        size = np.trace(held, axis1=-2, axis2=-1)[..., None, None]
        return np.asarray((held / np.where(size > 0, size, 1)).mean(axis=0))

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


def branch_of(kind: str, branches: Collection[str]) -> str:
    """Return how a rule names a kind of branch among those of a model: `mlp.` where there is `mlp.context` as well."""
    return f"{kind}." if any(other.startswith(f"{kind}.") for other in branches) else kind


def _macs(kind: str, anatomy: Anatomy) -> int:
    """Return the multiply-accumulates that a step saves which is not in a chain."""
    if kind == BODY:
        return sum(block.macs for block in anatomy.blocks)
    sites = [site for block in anatomy.blocks for site in block.sites]
    return sum(site.macs for site in sites if kind in (BRANCHES, site.branch))
