import numpy as np
import pytest

from dicache.models.loading import load
from dicache.models.names import ModelError
from dicache.models.sampling import Sampling
from dicache.models.schedulers import compatible, with_scheduler
from tests.models.folders import PIPELINES, SIZE, folder
from tests.models.test_folders import images

STOCHASTIC = ("DDPM", "LCM", "Ancestral")


@pytest.mark.parametrize("kind", PIPELINES)
def test_every_scheduler_that_is_offered_samples_the_same_way_for_the_same_seed(kind: str) -> None:
    offered = compatible(load(str(folder(kind))))
    assert len(offered) >= 2
    for name in offered:
        pipeline = with_scheduler(load(str(folder(kind))), name)
        assert type(pipeline.scheduler).__name__ == name
        few = Sampling(steps=5, height=SIZE, width=SIZE)
        made = images(pipeline, sampling=few)
        assert np.isfinite(made).all()
        assert np.array_equal(made, images(pipeline, sampling=few)), name


@pytest.mark.parametrize("kind", ["dit", "pixart", "sd3", "flux"])
def test_schedulers_that_solve_the_same_equation_agree_where_steps_are_many(kind: str) -> None:
    many = Sampling(steps=30, height=SIZE, width=SIZE)
    own = images(load(str(folder(kind))), sampling=many)
    for name in compatible(load(str(folder(kind)))):
        if not any(word in name for word in STOCHASTIC):
            other = images(with_scheduler(load(str(folder(kind))), name), sampling=many)
            assert np.abs(own - other).mean() < 0.02, name


@pytest.mark.parametrize(
    ("kind", "name", "found"),
    [
        ("dit", "dpm", "DPMSolverMultistepScheduler"),
        ("dit", "dpmsolvermultistep", "DPMSolverMultistepScheduler"),
        ("pixart", "euler", "EulerDiscreteScheduler"),
        ("pixart", "EulerAncestralDiscreteScheduler", "EulerAncestralDiscreteScheduler"),
        ("sd3", "euler", "FlowMatchEulerDiscreteScheduler"),
        ("sd3", "flow-heun", "FlowMatchHeunDiscreteScheduler"),
    ],
)
def test_a_scheduler_is_known_by_its_class_and_by_a_short_name(kind: str, name: str, found: str) -> None:
    pipeline = load(str(folder(kind)), scheduler=name)
    assert type(pipeline.scheduler).__name__ == found


def test_the_models_own_settings_are_kept() -> None:
    pipeline = load("digits")
    before = dict(pipeline.scheduler.config)
    after = with_scheduler(pipeline, "dpm").scheduler.config
    assert all(after[key] == before[key] for key in ("beta_start", "beta_end", "beta_schedule", "prediction_type"))
    assert load(str(folder("sd3")), scheduler="unipc").scheduler.config["flow_shift"] == 3.0


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("dit", "nothing", "scheduler 'nothing' is unknown with DiTPipeline of DDIMScheduler; needed one of DDIM"),
        ("dit", "flow-euler", "scheduler 'flow-euler' cannot be used with DiTPipeline"),
        ("dit", "euler", "scheduler 'euler' cannot be used with DiTPipeline"),  # starts from unit noise whatever it is
        ("pixart", "EDMEuler", "scheduler 'EDMEuler' cannot be used with PixArtAlphaPipeline"),
        ("sd3", "ddim", "scheduler 'ddim' cannot be used with StableDiffusion3Pipeline"),
        ("flux", "flow-heun", "scheduler 'flow-heun' cannot be used with FluxPipeline"),
    ],
)
def test_a_scheduler_that_the_model_cannot_be_sampled_with_is_refused(kind: str, name: str, message: str) -> None:
    with pytest.raises(ModelError, match=message) as error:
        load(str(folder(kind)), scheduler=name)
    assert "\n" not in str(error.value)
