"""Turn a schedule that decides at run time into a plan, by what it would have decided on a profile's runs."""

from typing import Literal, get_args

import numpy as np

from dicache.anatomy.parts import span
from dicache.calibrate.methods import CalibrationError, body_plan, letters_of
from dicache.calibrate.simulating import called_steps, decisions, residual_error
from dicache.profiler import Profile
from dicache.schedules import Schedule

Vote = Literal["majority", "any", "typical"]


def freeze(schedule: Schedule, profile: Profile, vote: Vote = "majority") -> Schedule:
    """Return the plan of a schedule that decides at run time: each step is computed or not, whatever the prompt.

    The rule is played through on the recorded signals of every run. Where all runs agree the plan does what the
    schedule would do; where the signal is the timestep's alone, that is everywhere.

    Args:
        schedule: Decides at run time.
        profile: Of the model and the sampler that the schedule is for.
        vote: `majority`, a step is computed if at least half of the runs compute it; `any`, if one of them does;
            `typical`, if the run does whose decisions most of the other runs share, so that what is skipped in a row
            stays as the rule has it: of runs that take turns in every second step the majority knows nothing.

    Returns:
        A schedule with a plan, for each guidance pass by itself if they differ. Under `measured`: `agreement`, the
        share of runs that decide at each step as the plan does, of the pass that agrees least; `residual_error` and
        `adaptive_residual_error`, the mean of |r_i - r_j| / |r_i| over the steps i that are skipped and the steps j
        whose residual stands in, by the plan and by the runs' own decisions; NaN is left out.

    Raises:
        CalibrationError: If the schedule does not decide at run time, or the profile is not of its model and sampler.
    """
    if vote not in get_args(Vote):
        raise CalibrationError(f"freeze: the vote is one of {', '.join(get_args(Vote))}, found {vote!r}")
    if schedule.policy is None:
        raise CalibrationError(
            f"freeze: a {schedule.method} schedule decides nothing at run time; it is a plan already"
        )
    if differences := profile.differences(schedule):
        raise CalibrationError(
            f"freeze: the schedule was made for {'; '.join(differences)} in the profile; profile the model and the "
            "sampler that it is for"
        )
    decided = decisions(schedule.policy, profile)  # (runs, contexts, steps)
    if not len(decided):
        raise CalibrationError("freeze: the profile has no run that did not fail; profile again")
    called = called_steps(profile.relative_l1("output"))
    share = decided.mean(axis=0)  # (contexts, steps)
    computed = _typical(decided) if vote == "typical" else share >= 0.5 if vote == "majority" else share > 0
    letters = {context: letters_of(row) for context, row in zip(profile.provenance.contexts, computed, strict=True)}
    first, stop = schedule.policy.skipped(schedule.anatomy)
    agreement = np.where(computed, share, 1 - share).min(axis=0)
    errors = {
        "residual_error": residual_error(profile, np.broadcast_to(computed, decided.shape)),
        "adaptive_residual_error": residual_error(profile, decided),
    }
    return Schedule(
        method=schedule.method,
        settings={**schedule.settings, "frozen": vote},
        anatomy=schedule.anatomy,
        target=schedule.target,
        steps=schedule.steps,
        plan=body_plan(letters, span(first, stop - 1)),
        measured={
            **profile.origin,
            "policy": schedule.policy.to_json(),
            "agreement": [round(float(each), 4) for each in agreement],
            "adaptive_computed_steps": round(float(decided[..., called].sum(axis=-1).mean()), 2),
            **{name: round(error, 5) for name, error in errors.items() if error is not None},
        },
    )


def _typical(decided: np.ndarray) -> np.ndarray:
    """Return the decisions, (contexts, steps), of the run of each pass that agrees most with all runs."""
    agreement = (decided[:, None] == decided[None]).mean(axis=(1, 3))  # (runs, contexts)
    most = agreement.argmax(axis=0)
    return np.stack([decided[run, context] for context, run in enumerate(most)])
