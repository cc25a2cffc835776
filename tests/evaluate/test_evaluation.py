import numpy as np
import pytest

from dicache.anatomy import survey
from dicache.evaluate.evaluation import evaluate
from dicache.evaluate.quality import paired_difference, psnr
from dicache.models.loading import load
from dicache.models.sampling import Sampling
from dicache.schedules import Plan, Rule, Schedule, ScheduleError, Target, TeaCachePolicy

STEPS = 6
CONDITIONS = ["1", "7", "4"]


def schedule(pipeline: object, *rules: Rule) -> Schedule:
    return Schedule("test", {}, survey(pipeline.transformer), Target(), STEPS, Plan(STEPS, rules))  # type: ignore[attr-defined]


def test_computing_all_is_identical_and_caching_lies_between_it_and_nonsense() -> None:
    pipeline = load("digits")
    schedules = [
        ("all", schedule(pipeline)),
        ("half", schedule(pipeline, Rule("skip", "C.C.C."))),
        ("once", schedule(pipeline, Rule("skip", "C....."))),
    ]
    uncached, results, fewer = evaluate(
        pipeline, schedules, CONDITIONS, sampling=Sampling(steps=STEPS), timing_rounds=1, progress=False
    )
    whole, half, once = results
    assert whole.psnr.mean == 120
    assert np.array_equal(whole.images, uncached.images)
    assert 120 > half.psnr.mean > once.psnr.mean > 5
    assert half.computed_steps == 3
    assert half.macs_fraction == pytest.approx(schedules[1][1].macs_fraction())
    assert [result.name for result in fewer] == ["3 steps", "1 steps"]
    assert fewer[0].psnr.mean < 120
    assert half.speedup is not None
    assert half.to_json()["psnr"].keys() == {"mean", "low", "high"}
    assert whole.psnr_gain is None  # as many steps are no fewer
    paired = psnr(half.images, uncached.images) - psnr(fewer[0].images, uncached.images)
    assert half.psnr_gain is not None
    assert half.psnr_gain.mean == pytest.approx(paired.mean())
    assert half.psnr_each == pytest.approx(psnr(half.images, uncached.images))
    afterwards = paired_difference(half.psnr_each, fewer[0].psnr_each, CONDITIONS)
    assert afterwards == half.psnr_gain
    assert paired.min() <= half.psnr_gain.low <= half.psnr_gain.mean <= half.psnr_gain.high <= paired.max()


def test_a_policy_is_counted_by_what_it_did() -> None:
    pipeline = load("digits")
    policy = TeaCachePolicy(1e9, (1.0, 0.0), (0.0, 10.0))
    adaptive = Schedule("teacache", {}, survey(pipeline.transformer), Target(), STEPS, policy=policy)
    _, [result], _ = evaluate(
        pipeline,
        [("tea", adaptive)],
        CONDITIONS[:1],
        sampling=Sampling(steps=STEPS),
        fewer_steps=False,
        judges={"mean": lambda images: float(images.mean())},
        timing_rounds=0,
        progress=False,
    )
    assert result.computed_steps == 2  # the first and the last
    assert result.speedup is None
    assert result.judged["mean"] == pytest.approx(result.images.mean())


def test_the_latents_of_each_image_are_compared_with_its_own_whatever_the_batch() -> None:
    pipeline = load("digits")
    policy = TeaCachePolicy(0.0, (1.0, 0.0), (0.0, 10.0))  # computes all, one image at a time
    adaptive = Schedule("teacache", {}, survey(pipeline.transformer), Target(), STEPS, policy=policy)
    sampling = Sampling(steps=STEPS)
    _, [result], _ = evaluate(
        pipeline, [("tea", adaptive)], CONDITIONS, sampling=sampling, timing_rounds=0, progress=False
    )
    assert len(result.latent_error) == STEPS
    assert max(result.latent_error) < 1e-3


def test_a_schedule_of_another_step_count_is_refused() -> None:
    pipeline = load("digits")
    with pytest.raises(ScheduleError, match="6 steps, found 5"):
        evaluate(pipeline, [("x", schedule(pipeline))], ["1"], sampling=Sampling(steps=5), progress=False)


@pytest.mark.parametrize("names", [("x", "x"), ("uncached", "x"), ("x", "3 steps")])
def test_schedules_whose_results_could_not_be_told_apart_are_refused(names: tuple[str, str]) -> None:
    pipeline = load("digits")
    with pytest.raises(ScheduleError, match="is that of several, or of a run without a schedule"):
        evaluate(pipeline, [(name, schedule(pipeline)) for name in names], ["1"], progress=False)
