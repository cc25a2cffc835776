"""Search a method's settings with Optuna: every trial is a schedule that is replayed on real runs of the model."""

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any
from uuid import uuid4

import optuna
from optuna.exceptions import StorageInternalError
from optuna.trial import FrozenTrial, TrialState, create_trial
from tqdm import tqdm

from dicache.calibrate.drawing import Drawing, NeedlessError, Point
from dicache.calibrate.halving import beaten_by, rungs
from dicache.calibrate.judging import Goal, Judge, Score
from dicache.calibrate.methods import CalibrationError, Space
from dicache.calibrate.studies import axes_json, open_study
from dicache.calibrate.workers import POLL, Worker
from dicache.schedules import Schedule

PATIENCE = 100  # draws in a row that need no run: by then a space of a few hundred points is all but tried out


class BrokenOffError(CalibrationError):
    """A search ended before its time; what it did is kept, and the same command goes on with it."""


@dataclass(frozen=True)
class Tried:
    """Settings and what they made of all runs."""

    parameters: Mapping[str, Any]
    score: Score

    def to_json(self) -> dict[str, Any]:
        return {"parameters": dict(self.parameters), **rounded(self.score)}


@dataclass(frozen=True)
class Found:
    """What came of a search.

    Attributes:
        schedule: Of the best trial.
        parameters: What it was made with.
        score: On the runs of the search.
        front: All that was judged on all runs and that nothing beats in both, PSNR and multiply-accumulates, the
            cheapest first; beyond the goal's limit too.
        trials: How many were run.
        pruned: How many of them were stopped before they were judged on all runs.
        feasible: How many of those judged on all runs kept to the limit.
        not_run: Points that needed no run: what was tried already, or what is known to compute too much.
        spent: What the trials computed, as a number of uncached images.
        enumerated: Whether every schedule that differs was tried, or was to be, rather than drawn.
    """

    schedule: Schedule
    parameters: Mapping[str, Any]
    score: Score
    front: tuple[Tried, ...]
    trials: int
    pruned: int
    feasible: int
    not_run: int
    spent: float
    enumerated: bool

    def to_json(self) -> dict[str, Any]:
        return {
            "trials": self.trials,
            "pruned": self.pruned,
            "feasible": self.feasible,
            "not_run": self.not_run,
            "spent": round(self.spent, 2),
            "enumerated": self.enumerated,
            "parameters": dict(self.parameters),
            **rounded(self.score),
            "front": [tried.to_json() for tried in self.front],
        }


def rounded(score: Score) -> dict[str, Any]:
    return {"psnr": round(score.psnr, 3), "macs_fraction": round(score.macs_fraction, 4)}


def search(
    space: Space,
    goal: Goal,
    judge: Judge,
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

    The study has two objectives, few multiply-accumulates and a high PSNR, and the goal's limit as a constraint. The
    first trial is what calibrating without a search gives. Where no more than `trials` schedules differ, each is tried,
    else Optuna's TPE draws. What executes the same is not run twice, nor is a schedule whose plan alone shows that it
    computes too much; neither counts as a trial. A trial is judged on few runs first, and stopped where another is
    better at no higher cost by more than noise (see `halving`).

    Several processes may work on one study. A trial that was interrupted, by Ctrl-C or because its process was killed,
    is done again. What is drawn depends on the trials before it alone, so that one process that is killed and gone on
    with does what an undisturbed one does.

    Args:
        space: What is varied.
        goal: What is sought.
        judge: Tells what a schedule makes of real runs.
        trials: How many to run in all, by all processes.
        storage: Of the study; see `open_study`.
        name: Of the study in it.
        where: The storage in words, for messages.
        identity: All that the scores depend on besides the space and the goal.
        seed: Of the sampler.
        progress: Whether to show a bar on standard error.

    Raises:
        BrokenOffError: On Ctrl-C, or if the storage fails.
        CalibrationError: If the storage holds another search, or no trial keeps to the limit.
    """
    drawing = Drawing(space, goal, trials, seed)
    identity = {"goal": asdict(goal), "axes": axes_json(space.axes), "seed": seed, **space.identity, **identity}
    study = open_study(storage, name, where, identity)
    ran = 0
    try:
        with Worker() as worker, tqdm(total=trials, desc="search", unit="trial", disable=not progress) as bar:
            while True:
                known = _Known(study, goal, worker)
                ran = len(known.ran)
                bar.update(min(ran, trials) - bar.n)
                bar.set_postfix_str(known.in_words)
                if ran >= trials:
                    break
                parameters = _next(drawing, known) if ran + len(known.running) < trials else None
                if parameters is not None:
                    _try(study, drawing, parameters, judge, known, worker)
                elif known.running:
                    time.sleep(POLL)  # until another worker is done, or gone
                else:
                    break
    except KeyboardInterrupt:
        raise BrokenOffError(
            f"interrupted after {ran} of {trials} trials, which are kept in {where}; the same command goes on with them"
        ) from None
    except StorageInternalError as error:
        said = str(error).strip().splitlines()[0]
        raise BrokenOffError(f"{where} failed after {ran} trials ({said}); the same command goes on") from error
    if len(known.ran) < trials and drawing.listed is None:
        logging.getLogger(__name__).warning(
            "stopped after %d trials: %d draws in a row brought nothing new", len(known.ran), known.in_vain
        )
    best = known.best
    if best is None:
        raise CalibrationError(_nothing_found(goal, known))
    return Found(
        schedule=space.schedule(best.params),
        parameters=best.params,
        score=score_of(best),
        front=front(known.scored),
        trials=len(known.ran),
        pruned=known.halved,
        feasible=sum(goal.violation(score_of(trial)) <= 0 for trial in known.scored),
        not_run=len(known.finished) - len(known.ran)
        if drawing.listed is None
        else drawing.points - len(drawing.listed),
        spent=sum(score_of(t).macs_fraction * len(score_of(t).each) for t in known.ran if "psnr" in t.user_attrs),
        enumerated=drawing.listed is not None,
    )


class _Known:
    """What the trials of a study so far tell. Those whose worker is gone are marked as failed, to be done again."""

    def __init__(self, study: optuna.Study, goal: Goal, worker: Worker) -> None:
        self.goal = goal
        every = study.get_trials(deepcopy=False)
        for trial in every:
            if trial.state is TrialState.RUNNING and worker.is_gone(trial):
                study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
        every = study.get_trials(deepcopy=False)
        self.finished = [t for t in every if t.state in (TrialState.COMPLETE, TrialState.PRUNED)]
        self.running = [t for t in every if t.state is TrialState.RUNNING]
        self.ran = [t for t in self.finished if "ran" in t.user_attrs]
        self.scored = [t for t in self.ran if t.state is TrialState.COMPLETE]
        self.tried = [t.params for t in (*self.finished, *self.running)]
        self.executed = {t.user_attrs["executes"]: t for t in (*self.running, *self.ran) if "executes" in t.user_attrs}
        self.broken_off = [
            t
            for t in every
            if t.state is TrialState.FAIL
            and "surplus" not in t.user_attrs
            and t.user_attrs.get("executes") not in (None, *self.executed)
            and t.params not in self.tried
        ]

    @property
    def halved(self) -> int:
        return sum("beaten_by" in trial.user_attrs for trial in self.ran)

    @property
    def in_vain(self) -> int:
        """How many of the last draws needed no run."""
        return next((i for i, trial in enumerate(reversed(self.finished)) if "ran" in trial.user_attrs), 0)

    @property
    def best(self) -> FrozenTrial | None:
        kept = [trial for trial in self.scored if self.goal.violation(score_of(trial)) <= 0]
        return max(kept, key=lambda trial: self.goal.rank(score_of(trial)), default=None)

    @property
    def in_words(self) -> str:
        pruned = f", {self.halved} pruned" if self.halved else ""
        if self.best is None:
            return f"none with {self.goal} yet{pruned}" if self.scored else ""
        score = score_of(self.best)
        return f"best {score.psnr:.1f} dB at {score.macs_fraction:.3f} of the MACs{pruned}"


def _next(drawing: Drawing, known: _Known) -> dict[str, Any] | None:
    """Return what to try, or None if there is nothing left."""
    if known.broken_off:
        return known.broken_off[0].params
    if drawing.listed is not None:
        return next((dict(p.parameters) for p in drawing.listed if p.executes not in known.executed), None)
    if drawing.plain is not None and drawing.plain not in known.tried:
        return drawing.plain
    if known.in_vain >= PATIENCE:
        return None
    return drawing.draw(known.finished, known.running, known.in_vain)


def _try(
    study: optuna.Study, drawing: Drawing, parameters: dict[str, Any], judge: Judge, known: _Known, worker: Worker
) -> None:
    """Add a trial to the study, and run it if need be."""
    pruned, complete = TrialState.PRUNED, TrialState.COMPLETE
    try:
        point = drawing.point(parameters)
    except NeedlessError as error:
        return _add(study, drawing, parameters, pruned, error.noted)
    if twin := known.executed.get(point.executes):
        noted = {"executes": point.executes, "same_as": twin.number}
        return _add(study, drawing, parameters, complete if twin.state is complete else pruned, noted, twin)
    trial = _claim(study, drawing, point, worker)
    if trial is None:
        return None
    rivals = [score_of(t) for t in known.scored]
    try:
        with worker.at_work(trial):
            _judge(study, trial, drawing.goal, point.schedule, judge, rivals)
    except BaseException:
        study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
        raise


def _add(
    study: optuna.Study,
    drawing: Drawing,
    parameters: Mapping[str, Any],
    state: TrialState,
    noted: Mapping[str, Any],
    twin: FrozenTrial | None = None,
) -> None:
    """Add a trial that takes no run."""
    constraints = dict(twin.constraints) if twin else {}
    if twin is None and drawing.goal.max_macs is not None and "macs_fraction" in noted:
        constraints = {"limit": noted["macs_fraction"] - drawing.goal.max_macs}
    study.add_trial(
        create_trial(
            state=state,
            values=twin.values if twin and state is TrialState.COMPLETE else None,
            params=dict(parameters),
            distributions=drawing.distributions,
            user_attrs=dict(noted),
            constraints=constraints,
        )
    )


def _claim(study: optuna.Study, drawing: Drawing, point: Point, worker: Worker) -> optuna.Trial | None:
    """Add a running trial, and return it if no other worker has begun what executes the same.

    A trial is added with all that tells others what it runs, in one go, and numbered by the storage. Each worker looks
    at those before its own after it has added it: so of two that come upon the same, one sees the other, which does not
    see it as one before its own and goes on.
    """
    claim = uuid4().hex
    attrs = {"executes": point.executes, "ran": True, "claim": claim, "worker": worker.signature()}
    study.add_trial(
        create_trial(
            state=TrialState.RUNNING,
            params=dict(point.parameters),
            distributions=drawing.distributions,
            user_attrs=attrs,
        )
    )
    every = study.get_trials(deepcopy=False)
    mine = next(trial for trial in every if trial.user_attrs.get("claim") == claim)
    trial = optuna.Trial(study, mine._trial_id)
    counted = (TrialState.RUNNING, TrialState.COMPLETE, TrialState.PRUNED)
    before = [t for t in every if t.number < mine.number and t.state in counted and "ran" in t.user_attrs]
    if len(before) < drawing.trials and all(t.user_attrs["executes"] != point.executes for t in before):
        return trial
    trial.set_user_attr("surplus", True)
    study.tell(trial, state=TrialState.FAIL)
    return None


def _judge(
    study: optuna.Study, trial: optuna.Trial, goal: Goal, schedule: Schedule, judge: Judge, rivals: Sequence[Score]
) -> None:
    """Judge a schedule on more and more runs, and tell the study."""
    score: Score | None = None
    for count in rungs(len(judge)):
        part = judge(schedule, slice(0 if score is None else len(score.each), count))
        score = part if score is None else score.joined(part)
        if not math.isfinite(score.psnr):
            trial.set_user_attr("refused", "the images are not finite")
            study.tell(trial, state=TrialState.PRUNED, skip_if_finished=True)
            return
        beaten = beaten_by(score, rivals) if count < len(judge) else None
        if beaten is not None:
            _note(trial, goal, score)
            trial.set_user_attr("beaten_by", rounded(beaten[0]))
            trial.set_user_attr("expected_psnr", beaten[1])
            study.tell(trial, state=TrialState.PRUNED, skip_if_finished=True)
            return
    assert score is not None
    _note(trial, goal, score)
    study.tell(trial, [score.macs_fraction, score.psnr], skip_if_finished=True)


def _note(trial: optuna.Trial, goal: Goal, score: Score) -> None:
    trial.set_user_attr("psnr", score.psnr)
    trial.set_user_attr("macs_fraction", score.macs_fraction)
    trial.set_user_attr("each", list(score.each))
    trial.set_constraint("limit", goal.violation(score))


def score_of(trial: FrozenTrial) -> Score:
    return Score(trial.user_attrs["psnr"], trial.user_attrs["macs_fraction"], tuple(trial.user_attrs["each"]))


def front(scored: Sequence[FrozenTrial]) -> tuple[Tried, ...]:
    """Return those that nothing beats in both PSNR and multiply-accumulates, the cheapest first."""
    every = [Tried(trial.params, score_of(trial)) for trial in scored]
    every.sort(key=lambda tried: (tried.score.macs_fraction, -tried.score.psnr))
    kept: list[Tried] = []
    for tried in every:
        if not kept or tried.score.psnr > kept[-1].score.psnr:
            kept.append(tried)
    return tuple(kept)


def _nothing_found(goal: Goal, known: _Known) -> str:
    scores = [score_of(trial) for trial in known.scored]
    if not scores:
        return f"none of the settings gives {goal}; ask for less"
    nearest = min(scores, key=goal.violation)
    return (
        f"none of {len(known.ran)} trials had {goal}; the nearest had {nearest.psnr:.1f} dB at "
        f"{nearest.macs_fraction:.3f} of the MACs. Ask for less, or raise --trials"
    )
