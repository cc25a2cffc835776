"""Run a pipeline uncached with recorders attached, and write down what they saw, run by run."""

import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from dicache.anatomy import Anatomy, StepClock, survey
from dicache.anatomy.inputs import capture_inputs
from dicache.anatomy.spread import kind_of
from dicache.anatomy.time_embedding import find_time_embedding
from dicache.anatomy.unets import is_unet
from dicache.models.loading import load
from dicache.models.sampling import Sampling, default_conditions, sample
from dicache.profiler import storage
from dicache.profiler.describing import check_resumable, planned_runs, provenance_of
from dicache.profiler.guided import LINEAR
from dicache.profiler.needing import check_need, need_of
from dicache.profiler.profiles import MOST_LAGS, ProfileError, Provenance, Run
from dicache.profiler.recorder import Recorder
from dicache.profiler.together import Together
from dicache.profiler.wanted import counts_of_first_blocks, steps_of_priors, usual_decision_block
from dicache.runtime.apply import denoiser
from dicache.schedules import Schedule


def profile_model(
    model: str,
    output: Path,
    *,
    runs: int,
    steps: int | None = None,
    guidance: float | None = None,
    seed: int = 0,
    lags: int = 3,
    progress: bool = True,
) -> Path:
    """Load a model by name and profile it over `runs` of its default conditions. See `profile_pipeline`."""
    pipeline = load(model)
    conditions = default_conditions(pipeline, runs)
    sampling = Sampling(steps=steps, guidance=guidance)
    return profile_pipeline(
        pipeline, model, output, conditions, sampling=sampling, seed=seed, lags=lags, progress=progress
    )


def profile_pipeline(
    pipeline: Any,
    name: str,
    output: Path,
    conditions: Sequence[str],
    *,
    sampling: Sampling | None = None,
    seed: int = 0,
    lags: int = 3,
    priors: bool | Schedule = False,
    component: str | None = None,
    anatomy: Anatomy | None = None,
    decision_blocks: Sequence[int] | None = None,
    first_blocks: Sequence[int] | None = None,
    max_memory: int | None = None,
    keep_prompts: bool = True,
    resume: bool = False,
    only: Sequence[int] | None = None,
    elsewhere: Sequence[Path] = (),
    batch: int = 1,
    progress: bool = True,
) -> Path:
    """Measure a pipeline and write its profile.

    Each run is written when it is done, so that a killed profile goes on at the next one. A run that meets a NaN or an
    infinity is kept as failed, and has no part in the measurements.

    Of a model that is spread over several processes (diffusers' `enable_parallelism`, FSDP2), all of them call this
    alike and make each run together. The first of them writes, and multiply-accumulates are those of one of them.

    Args:
        pipeline: A diffusers pipeline.
        name: Of the model, for titles.
        output: The HDF5 file.
        conditions: Prompts or classes, one a run.
        sampling: How to call the pipeline; its own defaults when left out.
        seed: Of the first run; each run has the next one.
        lags: How many steps back each branch's output is compared with.
        priors: Whether to keep the mean output of each site at each step; of a schedule's plan, only where it reuses an
            output and at the step that this output is from.
        component: Name of the model in the pipeline, where it has two that share its steps. The steps of the other have
            no measurements.
        anatomy: The model's, where it was described by hand (`dicache.anatomy.describe`); surveyed when left out.
        decision_blocks: Blocks of which to measure what they add to the stream, for AdaCache; its usual one when left
            out.
        first_blocks: For FirstBlockCache: of how many of the first blocks, one number or several, to compare the
            residual with those of up to 16 steps before. When left out it is 1, or none in a model of one block.
        max_memory: Bytes, of the device or of main memory, above which to refuse.
        keep_prompts: Whether to write prompts down, or what they hash to. Who guesses a prompt can verify the guess.
        resume: Go on with the file if it is there and was begun with the same model and settings.
        only: The places among the conditions of the runs to make here; others make the rest. All when left out.
        elsewhere: Profiles that others have begun of the rest, with the same model and settings.
        batch: How many runs the pipeline makes in one call. So many are made one by one first, and then once more
            together, to see that the model makes the same of them.
        progress: Whether to show the need and a bar on standard error.

    Returns:
        The file.

    Raises:
        ProfileError: If the file exists and may not or cannot be resumed, it needs too much memory or disk, or
            every run of all failed, or runs in a batch are not what they are alone.
    """
    if not conditions or lags < 1 or batch < 1:
        found = f"{len(conditions)}, {lags} and {batch}"
        raise ProfileError(f"a profile needs at least one run, one lag and one run in a batch, found {found}")
    sampling = (sampling or Sampling()).resolved(pipeline)
    planned = planned_runs(conditions, seed, keep_prompts)
    model = denoiser(pipeline, component)
    if is_unet(model):
        raise ProfileError(
            f"a profile measures what a row of blocks adds to one stream, and {type(model).__name__} is a U-Net, whose "
            "stream changes its shape; take a method that needs no profile, such as `dicache calibrate deepcache`"
        )
    ranks = Together(model)
    if priors and ranks.tokens > 1:
        raise ProfileError(
            "--priors keeps whole outputs, and the tokens of this model are spread over ranks; profile it whole"
        )

    held, files = ExitStack(), (output, *elsewhere)

    def headers() -> list[tuple[Provenance, tuple[Run, ...]] | None]:
        held.enter_context(storage.alone(output))
        found = [storage.header(file) if file.exists() else None for file in files]
        if found[0] is not None and not resume:
            runs = found[0][1]
            raise ProfileError(f"{output} exists, with {len(runs)} runs; pass --resume to go on with it, or another -o")
        return found

    with held:
        begun = {file: found for file, found in zip(files, ranks.ask(headers), strict=True) if found is not None}
        inputs = capture_inputs(model, lambda: sample(pipeline, conditions[:1], [seed], sampling))
        if anatomy is not None and anatomy.model != kind_of(model):
            raise ProfileError(f"the anatomy is that of a {anatomy.model}, found {kind_of(model)}")
        anatomy = anatomy or survey(model, inputs)
        time = find_time_embedding(model, inputs, anatomy)
        steps = len(pipeline.scheduler.timesteps)
        steps_kept = steps_of_priors(priors, anatomy, steps)
        if decision_blocks is None:
            usual = usual_decision_block(anatomy)
            decision_blocks = (usual,) if anatomy.blocks[usual].main_stream else ()
        elif wrong := [block for block in decision_blocks if not 0 <= block < len(anatomy.blocks)]:
            raise ProfileError(f"no block {wrong[0]} in this {anatomy.model}; it has 0 to {len(anatomy.blocks) - 1}")
        blocks = sorted(set(decision_blocks))
        counts = counts_of_first_blocks(first_blocks, anatomy)
        first_lags = min(MOST_LAGS, steps - 1) if counts else 0
        with Recorder(pipeline, model, anatomy, lags, steps_kept, time, counts, first_lags, blocks, ranks) as recorder:

            def call(together: Sequence[tuple[Run, str]]) -> None:
                recorder.runs = len(together)
                sample(pipeline, [condition for _, condition in together], [run.seed for run, _ in together], sampling)

            every = list(zip(planned, conditions, strict=True))
            mine = every if only is None else [every[place] for place in only]
            done = {run.key for run in begun[output][1]} if output in begun else set()
            ahead = [(run, condition) for run, condition in mine if run.key not in done]
            _first_step(pipeline, recorder, lambda: call(ahead[:batch] or every[:1]))
            provenance = provenance_of(pipeline, component, name, anatomy, sampling, recorder, priors)
            for file, (before, runs) in begun.items():
                check_resumable(file, before, provenance, runs, planned)
            need = need_of(recorder, provenance, len(done) + len(ahead))
            progress = progress and ranks.leads
            if progress:
                tqdm.write(f"needs {need}", file=sys.stderr)

            def begin() -> None:
                check_need(need, max_memory, output)
                if output not in begun:
                    storage.create(output, provenance, recorder.priors)

            ranks.ask(begin)

            def make(together: Sequence[tuple[Run, str]]) -> bool:
                """Make some runs and write them; or none of them, if they would have to be taken apart again."""
                addition: storage.Addition | None = None
                with ExitStack() as open_file:

                    def begin_run() -> None:
                        nonlocal addition
                        addition = open_file.enter_context(storage.adding(output))
                        recorder.add_to(addition.priors if steps_kept else None, provenance)

                    recorder.add_to(None, provenance)
                    ranks.ask(begin_run)
                    call(together)
                    failures = [recorder.failure(place) for place in range(len(together))]
                    if steps_kept and len(together) > 1 and any(failures):
                        if addition:
                            addition.drop()
                        return False
                    said = ["ok" if failure is None else f"failed at {failure}" for failure in failures]
                    records = [
                        recorder.record(replace(run, status=status), provenance, place)
                        for place, ((run, _), status) in enumerate(zip(together, said, strict=True))
                    ]

                    def finish_run() -> None:
                        assert addition is not None
                        for record in records:
                            addition.write(record)
                        open_file.close()  # puts the file in its place

                    ranks.ask(finish_run)
                bar.update(len(together))
                return True

            with tqdm(
                total=len(done) + len(ahead),
                initial=len(done),
                desc=f"profile {name}",
                unit="run",
                disable=not progress,
            ) as bar:
                trial = ahead[:batch] if 1 < batch < len(ahead) else []
                alone = []
                for single in trial:
                    make([single])
                    alone.append(recorder.outputs())
                if trial:
                    recorder.add_to(None, provenance)
                    call(trial)
                    for place, outputs in enumerate(alone):
                        _check_alike(outputs, recorder.outputs(place))
                for start in range(len(trial), len(ahead), batch):
                    together = ahead[start : start + batch]
                    if not make(together):
                        for single in together:
                            make([single])
    if only is None:
        ranks.ask(lambda: check_runs(output))
    return output


def check_runs(profile: Path) -> None:
    """Raise ProfileError if every run of a profile failed."""
    _, runs = storage.header(profile)
    if not any(run.ok for run in runs):
        raise ProfileError(f"every run {runs[0].status}: the model's outputs are not finite; try another --dtype")


class _FirstStepDone(BaseException):  # past the pipeline's own `except Exception`
    pass


def _first_step(pipeline: Any, recorder: Recorder, run: Callable[[], Any]) -> None:
    """Call a pipeline and break it off when the first step in which the model is called is done."""

    def stop() -> None:
        if recorder.contexts:
            raise _FirstStepDone

    clock = StepClock(pipeline.scheduler, lambda scheduler: None, stop)
    try:
        run()
    except _FirstStepDone:
        return
    finally:
        clock.detach()
    raise ProfileError(f"the {type(pipeline).__name__} ended without a step in which it calls the model")


def _check_alike(alone: Tensor, together: Tensor) -> None:
    """Refuse what a model makes of a run in a batch, if it is not what it makes of it alone.

    Some pipelines cut a single prompt to its length, and pad several of them.

    Args:
        alone: What the scheduler was given in each step, (steps, ...).
        together: The same of the run in a batch.
    """
    apart = (together.float() - alone.float()).flatten(1).norm(dim=1) / alone.float().flatten(1).norm(dim=1)
    if (apart > LINEAR).any():  # not so of NaN: such a run is kept as failed
        raise ProfileError(
            f"what the model makes of a run depends on the others in its batch: an output of step "
            f"{int((apart > LINEAR).nonzero()[0])} differs by {float(apart.max()):.2g} of its size. Go on with "
            "--batch 1 --resume"
        )
