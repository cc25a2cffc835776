"""Search a method's settings with Optuna: every trial is a schedule that is replayed on real runs of the model."""

import json
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import optuna
import torch
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, Trial, TrialState
from tqdm import tqdm

from dicache.calibrate.judging import ROUNDING, Goal, Score, digest
from dicache.calibrate.methods import Axis, Between, CalibrationError, Space
from dicache.schedules import Schedule

DIGESTED = ("conditions", "scheduler_config", "profile")  # of a search's identity: names that say nothing to a reader
PATIENCE = 100  # draws in a row that need no run: by then a space of a few hundred points is all but tried out


@dataclass(frozen=True)
class Found:
    """The best trial of a search.

    Attributes:
        schedule: Its schedule.
        parameters: What it was made with.
        score: On the runs of the search.
        trials: How many were run.
        feasible: How many of them kept to the limit.
        not_run: Draws that needed no run: what was tried already, or what is known to compute too much.
    """

    schedule: Schedule
    parameters: Mapping[str, Any]
    score: Score
    trials: int
    feasible: int
    not_run: int

    def to_json(self) -> dict[str, Any]:
        return {
            "trials": self.trials,
            "feasible": self.feasible,
            "not_run": self.not_run,
            "parameters": dict(self.parameters),
            "psnr": round(self.score.psnr, 3),
            "macs_fraction": round(self.score.macs_fraction, 4),
        }


def search(
    space: Space,
    goal: Goal,
    judge: Callable[[Schedule], Score],
    *,
    trials: int,
    storage: str,
    name: str,
    where: str,
    identity: Mapping[str, Any],
    seed: int = 0,
    progress: bool = True,
) -> Found:
    """Try schedules until so many trials are done, counting those that the storage holds, and return the best.

    The first trial is what calibrating without a search gives. A schedule that was tried already is not run again, nor
    is one whose plan alone shows that it computes too much; neither counts as a trial.

    Each draw is seeded by the number of those before it, so that a search that was broken off and gone on with draws
    what an undisturbed one does. For the same reason one process at a time works on a search.

    Args:
        space: What is varied.
        goal: What is sought.
        judge: Tells what a schedule makes of real runs.
        trials: How many to run in all.
        storage: Optuna's URL of a database, such as `sqlite:///search.db`.
        name: Of the study in it.
        where: The storage in words, for messages.
        identity: All that the scores depend on besides the space and the goal.
        seed: Of the sampler.
        progress: Whether to show a bar on standard error.

    Raises:
        CalibrationError: If the storage holds another search, or no trial keeps to the limit, or on Ctrl-C.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    identity = {"goal": asdict(goal), "axes": axes_json(space.axes), "seed": seed, **space.identity, **identity}
    study = _study(storage, name, where, goal.direction, identity)
    drawn_from = {axis: _distribution(axis, values) for axis, values in space.axes.items()}
    if not drawn_from:
        raise CalibrationError("all settings are given, so there is nothing to search; leave one out")
    known = _Known(study, goal)
    bar = tqdm(total=trials, initial=min(known.ran, trials), desc="search", unit="trial", disable=not progress)
    bar.set_postfix_str(known.best_so_far)
    _begin_with(study, space, goal, known)
    in_vain = 0
    try:
        with bar:
            while known.ran < trials and in_vain < PATIENCE:
                # What TPE draws twice it may draw for ever in a small space; at random the rest is come upon.
                sampler = optuna.samplers.RandomSampler if in_vain else optuna.samplers.TPESampler
                study.sampler = sampler(seed=(seed * 1_000_003 + len(known.finished)) % 2**32)
                ran = _try(study, study.ask(drawn_from), space, goal, judge, known)
                known = _Known(study, goal)
                in_vain = 0 if ran else in_vain + 1
                bar.update(int(ran))
                bar.set_postfix_str(known.best_so_far)
    except KeyboardInterrupt:
        raise CalibrationError(
            f"interrupted after {known.ran} of {trials} trials, which are kept in {where}; "
            "the same command goes on with them"
        ) from None
    if known.ran < trials:
        logging.getLogger(__name__).warning(
            "stopped after %d trials: %d draws in a row brought nothing new", known.ran, in_vain
        )
    best = known.best
    if best is None:
        raise CalibrationError(_nothing_found(goal, known))
    return Found(
        schedule=space.schedule(best.params),
        parameters=best.params,
        score=_score(best),
        trials=known.ran,
        feasible=sum(goal.violation(_score(trial)) <= 0 for trial in known.scored),
        not_run=len(known.finished) - known.ran,
    )


class _Known:
    """What the trials of a study so far tell."""

    def __init__(self, study: optuna.Study, goal: Goal) -> None:
        self.goal = goal
        self.all = study.get_trials(deepcopy=False)
        # A trial that is running was killed, one that failed was interrupted: both are made up for by new ones.
        self.finished = [t for t in self.all if t.state in (TrialState.COMPLETE, TrialState.PRUNED)]
        self.scored = [t for t in self.finished if t.state is TrialState.COMPLETE and "ran" in t.user_attrs]
        self.ran = sum("ran" in trial.user_attrs for trial in self.finished)

    @property
    def best(self) -> FrozenTrial | None:
        kept = [trial for trial in self.scored if self.goal.violation(_score(trial)) <= 0]
        return max(kept, key=lambda trial: self.goal.rank(_score(trial)), default=None)

    @property
    def best_so_far(self) -> str:
        if self.best is None:
            return f"none with {self.goal} yet" if self.scored else ""
        score = _score(self.best)
        return f"best {score.psnr:.1f} dB at {score.macs_fraction:.3f} of the MACs"


def _try(
    study: optuna.Study,
    trial: Trial,
    space: Space,
    goal: Goal,
    judge: Callable[[Schedule], Score],
    known: _Known,
) -> bool:
    """Finish a trial, and return whether it took a run."""
    try:
        schedule = space.schedule(trial.params)
    except CalibrationError as error:
        trial.set_user_attr("refused", str(error))
        study.tell(trial, state=TrialState.PRUNED)
        return False
    executes = digest(schedule.to_json().get("plan") or schedule.to_json()["policy"])
    trial.set_user_attr("executes", executes)
    if twin := next((t for t in known.scored if t.user_attrs["executes"] == executes), None):
        trial.set_user_attr("same_as", twin.number)
        _tell(study, trial, goal, _score(twin))
        return False
    planned = schedule.macs_fraction() if schedule.plan is not None and not schedule.contexts else math.nan
    if goal.max_macs is not None and planned > goal.max_macs + ROUNDING:
        trial.set_user_attr("macs_fraction", planned)
        trial.set_constraint("limit", planned - goal.max_macs)
        study.tell(trial, state=TrialState.PRUNED)
        return False
    try:
        score = judge(schedule)
    except BaseException:
        study.tell(trial, state=TrialState.FAIL)
        raise
    trial.set_user_attr("ran", True)
    if not math.isfinite(score.psnr):
        trial.set_user_attr("refused", "the images are not finite")
        study.tell(trial, state=TrialState.PRUNED)
    else:
        _tell(study, trial, goal, score)
    return True


def _tell(study: optuna.Study, trial: Trial, goal: Goal, score: Score) -> None:
    trial.set_user_attr("psnr", score.psnr)
    trial.set_user_attr("macs_fraction", score.macs_fraction)
    trial.set_constraint("limit", goal.violation(score))
    study.tell(trial, goal.value(score))


def _score(trial: FrozenTrial) -> Score:
    return Score(trial.user_attrs["psnr"], trial.user_attrs["macs_fraction"])


def _begin_with(study: optuna.Study, space: Space, goal: Goal, known: _Known) -> None:
    """See to it that what calibrating without a search gives is tried, if it can be."""
    try:
        plain = dict(space.plain(goal.max_macs))
    except CalibrationError:
        return
    inside = all(_holds(space.axes[name], value) for name, value in plain.items())
    waiting = any(trial.state is TrialState.WAITING for trial in known.all)
    if inside and not waiting and not any(trial.params == plain for trial in known.finished):
        study.enqueue_trial(plain)


def _nothing_found(goal: Goal, known: _Known) -> str:
    scores = [_score(trial) for trial in known.scored]
    if not scores:
        return f"none of the settings gives {goal}; ask for less"
    nearest = min(scores, key=goal.violation)
    return (
        f"none of {known.ran} trials had {goal}; the nearest had {nearest.psnr:.1f} dB at "
        f"{nearest.macs_fraction:.3f} of the MACs. Ask for less, or raise --trials"
    )


def _study(
    storage: str, name: str, where: str, direction: Literal["minimize", "maximize"], identity: Mapping[str, Any]
) -> optuna.Study:
    """Return the study, begun or gone on with."""
    try:
        study = optuna.create_study(storage=storage, study_name=name, direction=direction, load_if_exists=True)
        begun = study.user_attrs.get("identity")
        wanted = json.loads(json.dumps(identity))
        if begun is None:
            study.set_user_attr("identity", wanted)
    except Exception as error:  # of the database and its driver, whichever they are
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CalibrationError(f"{where} cannot be used for a search: {said}") from error
    differing = [key for key in sorted({*(begun or wanted), *wanted}) if (begun or wanted).get(key) != wanted.get(key)]
    if differing:
        told = [
            f"other {key}"
            if key in DIGESTED
            else f"{key} {_brief((begun or {}).get(key))}, now {_brief(wanted.get(key))}"
            for key in differing
        ]
        raise CalibrationError(
            f"{where} holds a search with other settings: {'; '.join(told)}. Search with those again to go on with it, "
            "or choose another --output or --storage"
        )
    return study


def _brief(value: Any) -> str:
    if isinstance(value, Mapping):
        value = {key: part for key, part in value.items() if part is not None}
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _distribution(name: str, axis: Axis) -> BaseDistribution:
    if isinstance(axis, Between):
        return FloatDistribution(axis.low, axis.high)
    if not axis:
        raise CalibrationError(f"there is nothing to choose from for {name}; are there too few steps?")
    if isinstance(axis, range):
        return IntDistribution(axis[0], axis[-1], step=axis.step)
    return CategoricalDistribution(axis)


def _holds(axis: Axis, value: Any) -> bool:
    return axis.low <= value <= axis.high if isinstance(axis, Between) else value in axis


def axes_json(axes: Mapping[str, Axis]) -> dict[str, list[Any]]:
    """Return what is varied: a list of names, or the smallest and the largest number."""
    return {
        name: [axis.low, axis.high]
        if isinstance(axis, Between)
        else [axis[0], axis[-1]]
        if isinstance(axis, range) and axis
        else list(axis)
        for name, axis in axes.items()
    }


def versions() -> dict[str, str]:
    """Return those of what a search depends on."""
    import diffusers

    import dicache

    return {
        "dicache": dicache.__version__,
        "optuna": optuna.__version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }
