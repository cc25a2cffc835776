"""`dicache calibrate teacache` with a published polynomial or the time embedding, as a user types it."""

import json
from pathlib import Path

import pytest

from dicache.models import configs
from dicache.schedules import Schedule
from tests.cli.test_commands import dicache, refused

STEPS = 8


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("profiles") / "clips.h5"
    dicache("profile", "--model", "clips", "--runs", 3, "--steps", STEPS, "-o", file)
    return file


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def wrong(*words: object) -> str:
    """Return what a command says of wrong usage."""
    result = dicache("calibrate", "teacache", *words, fails=True)
    assert result.exit_code == 2
    return " ".join(result.stderr.split())


def test_the_published_polynomial_of_flux_needs_no_profile_and_no_weights() -> None:
    told = dicache("calibrate", "teacache", "--published", "flux", "--threshold", 0.4).stdout
    assert "Wrote teacache.json: teacache, 28 steps of flux, decides at run time" in told
    quoted = "Quoted for flux as published (--negative reference, 28 steps): 0.25 1.5x; 0.4 1.8x; 0.6 2x; 0.8 2.25x."
    assert quoted in told
    assert "saves nothing" not in told
    schedule = Schedule.load("teacache.json")
    assert schedule.policy is not None
    assert (schedule.anatomy.model, len(schedule.anatomy.blocks)) == ("FluxTransformer2DModel", 19 + 38)
    assert schedule.to_json()["policy"]["input_range"] == [0.0, 1.0]
    shown = dicache("schedules", "show", "teacache.json").stdout
    assert quoted in shown
    assert "the range of x that it was fitted on is not known; in [0, 1] it is not negative" in shown
    assert "published for FLUX.1-dev: https://github.com/ali-vilab/TeaCache" in shown
    at_50 = dicache("calibrate", "teacache", "--published", "flux", "--threshold", 0.4, "--steps", 50)
    assert "Note: the thresholds are those of 28 steps, found 50" in at_50.stderr


def test_a_published_polynomial_is_taken_as_it_is_or_held_where_it_is_told() -> None:
    words = ("calibrate", "teacache", "--published", "latte", "--threshold", 0.2, "--model", "clips", "--steps", 6)
    dicache(*words, "--negative", "reference", "--first-steps", 2, "--last-steps", 0)
    policy = Schedule.load("teacache.json").to_json()["policy"]
    assert (policy["negative"], policy["first_steps"], policy["last_steps"]) == ("reference", 2, 0)
    assert "x is taken as it is" in dicache("schedules", "show", "teacache.json").stdout
    dicache(*words, "--input-range", "0.01,0.15")
    assert Schedule.load("teacache.json").to_json()["policy"]["input_range"] == [0.01, 0.15]
    assert "[0.01, 0.15] was given" in dicache("schedules", "show", "teacache.json").stdout


def test_a_polynomial_of_the_time_embedding_gives_a_plan_from_the_models_own_weights(profile: Path) -> None:
    name = "wan2.1-t2v-1.3b-retention"
    words = ("calibrate", "teacache", "--published", name, "--threshold", 0.3)
    found = dicache(*words, "--model", "clips", "--steps", STEPS, "-o", "model.json")
    assert "published for WanTransformer3DModel, found a LatteTransformer3DModel" in found.stderr
    assert "of 8 steps computed, whatever the prompt" in found.stdout
    dicache(*words, "--profile", profile, "-o", "profile.json")
    of_model, of_profile = Schedule.load("model.json"), Schedule.load("profile.json")
    assert not of_model.adaptive
    assert of_model.table() == of_profile.table()
    letters = of_model.table()["0.attn"]
    assert letters.startswith("CCCCC")
    assert of_model.target.timesteps == of_profile.target.timesteps is not None
    assert of_model.target.weights == of_profile.target.weights is not None
    assert of_model.settings["signal"] == "time-projected"
    assert refused("schedules", "freeze", "model.json", "--profile", profile).endswith("it is a plan already")
    dicache("generate", "--model", "clips", "--steps", STEPS, "--schedule", "model.json", "--prompt", "x", "-o", "out")


def test_the_time_embedding_of_a_profile_is_fitted_to_a_plan(profile: Path) -> None:
    words = ("calibrate", "teacache", "--profile", profile, "--signal", "time", "--degree", 1)
    said = json.loads(dicache(*words, "--target-speedup", 1.3, "--json").stdout)
    assert said["macs_fraction"] <= 1 / 1.3
    schedule = Schedule.load("teacache.json")
    assert not schedule.adaptive
    assert schedule.target.timesteps is not None


def test_on_a_profile_a_published_polynomial_is_judged(profile: Path) -> None:
    told = dicache("calibrate", "teacache", "--profile", profile, "--published", "latte", "--threshold", 0.2).stdout
    assert "on this profile: R2 " in told
    shown = json.loads(dicache("profiles", "show", profile, "--json").stdout)["teacache"]
    assert shown["own"]["rmse"] > 0
    assert list(shown["published"]) == ["latte"]  # clips is a Latte
    judged = Schedule.load("teacache.json").measured["published"]["on_profile"]
    assert shown["published"]["latte"] == judged
    asked = ("--published", "ltx", "--published", "wan2.1-i2v-480p")
    assert "published for ltx: R2" in dicache("profiles", "show", profile, *asked).stdout
    for name in ("ltx", "wan2.1-i2v-480p"):
        dicache("plot", "teacache", profile, "--published", name, "-o", f"{name}.png")
        assert Path(f"{name}.png").stat().st_size > 10_000


def test_what_cannot_be_done_is_said_in_a_line() -> None:
    teacache = ("calibrate", "teacache")
    said = refused(*teacache, "--published", "wan", "--threshold", 0.1)
    assert "nothing is published as 'wan'; known are flux, tangoflux" in said
    assert "give a --threshold. Quoted for flux as published" in wrong("--published", "flux")
    assert "--published out" in wrong("--published", "flux", "--search", "--max-macs", 0.5)
    assert "--degree is of a fit of your own" in wrong("--published", "flux", "--threshold", 0.4, "--degree", 3)
    assert "Mochi 1 has no short name; say which --model" in wrong("--published", "mochi", "--threshold", 0.06)
    assert "go with --published" in wrong("--model", "digits", "--threshold", 0.1)
    assert "write it like 0.01,0.3" in wrong("--published", "flux", "--threshold", 0.4, "--input-range", "much")
    said = refused(*teacache, "--published", "flux", "--target-speedup", 2)
    assert "only known from a profile" in said
    said = refused(*teacache, "--published", "flux", "--threshold", 0.4, "--signal", "time")
    assert "the polynomial of flux is of the signal modulated" in said


def test_the_time_embedding_is_not_made_up_where_there_are_no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    words = ("calibrate", "teacache", "--published", "cogvideox-2b", "--threshold", 0.1, "--model")
    assert "dit" in configs.NAMES  # a configuration, without weights
    said = refused(*words, "dit")
    assert "takes the model's weights to compute; give a --model with weights, or a --profile" in said
    assert "DiTTransformer2DModel makes no time embedding before its blocks" in refused(*words, "digits")
