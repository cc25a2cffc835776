import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from dicache.anatomy import Inputs, describe
from dicache.models.loading import load
from dicache.models.sampling import Sampling, sample
from dicache.profiler import ProfileError, storage
from dicache.profiler.describing import hashed
from dicache.profiler.priors import Prior, Priors
from dicache.profiler.profiling import profile_pipeline
from dicache.schedules import Plan, Rule, Schedule, Target
from tests.tiny import anatomy_of, arguments, dit, pipeline_of, pixart

SAMPLING = Sampling(steps=4, guidance=4.0)
CONDITIONS = ["1", "2", "3"]


def profiled(path: Path, conditions: list[str] = CONDITIONS, **options: Any) -> Path:
    return profile_pipeline(
        pipeline_of(dit), "tiny", path, conditions, sampling=SAMPLING, lags=2, progress=False, **options
    )


def test_a_profile_holds_every_run_and_where_it_came_from(tmp_path: Path) -> None:
    profile = storage.load(profiled(tmp_path / "p.h5"))
    assert [(run.prompt, run.seed, run.ok) for run in profile.runs] == [("1", 0, True), ("2", 1, True), ("3", 2, True)]
    assert profile.steps == 4
    assert profile.delta_cosine.shape == (3, 1, 4, 4)
    assert profile.sites["dot"].shape == (3, 1, 4, 8, 2)
    assert profile.arrays["teacache/output"].shape == (3, 1, 4, 2)
    assert profile.provenance.layout == "batched"
    assert profile.provenance.target.scheduler == "DDIMScheduler"
    assert profile.provenance.target.num_inference_steps == 4
    assert profile.provenance.target.latents == (4, 8, 8)
    assert profile.provenance.settings["guidance"] == 4.0
    assert np.isfinite(profile.delta_cosine[:, :, 1:]).all()


def test_a_model_that_was_described_by_hand_is_measured_by_that(tmp_path: Path) -> None:
    inputs = Inputs((), arguments(dit()))
    anatomy = describe(dit(), inputs, {"transformer_blocks": {"attn": "attn1"}})
    profile = storage.load(profiled(tmp_path / "p.h5", CONDITIONS[:1], anatomy=anatomy))
    assert profile.anatomy == anatomy
    assert profile.anatomy.sites == ("0.attn", "1.attn", "2.attn", "3.attn")
    with pytest.raises(ProfileError, match="the anatomy is that of a PixArtTransformer2DModel, found DiTTransformer"):
        profiled(tmp_path / "other.h5", anatomy=anatomy_of(pixart))


def test_the_names_in_the_file_are_the_contract(tmp_path: Path) -> None:
    shapes = storage.array_shapes(profiled(tmp_path / "p.h5"))
    sites = {f"/sites/{name}" for name in ("diff_l1", "abs_l1", "dot", "norm2")}
    teacache = {f"/teacache/{name}" for name in ("input", "residual", "body", "output")}
    body = {f"/body/{name}" for name in ("weights", "gram", "output", "branches")}
    body |= {f"/first_block/{name}" for name in ("size", "change")}
    runs = {"/runs/prompt", "/runs/seed", "/runs/status"}
    motion = {f"/motion/{name}" for name in ("diff_l1", "abs_l1", "between_frames")}
    assert set(shapes) == {*runs, "/delta/gram", "/delta/cosine", "/magnitude", *sites, *teacache, *body, *motion}


def test_similarity_is_one_for_equal_and_follows_from_the_stored_products(tmp_path: Path) -> None:
    profile = storage.load(profiled(tmp_path / "p.h5"))
    similarity = profile.similarity("attn", lag=2)
    dot, norm2 = (profile.sites[name][0, 0, :, 2, :] for name in ("dot", "norm2"))  # site 2 is 1.attn
    assert similarity[0, 0, 3, 1] == pytest.approx(dot[3, 1] / np.sqrt(norm2[3, 0] * norm2[1, 0]))
    assert np.isnan(similarity[0, 0, :2]).all()
    with pytest.raises(ProfileError, match="lag 3 was not measured"):
        profile.similarity("attn", lag=3)
    with pytest.raises(ProfileError, match="it has attn, mlp"):
        profile.similarity("cross_attn")


def test_the_first_blocks_that_are_asked_for_are_watched_and_others_refused(tmp_path: Path) -> None:
    assert storage.load(profiled(tmp_path / "default.h5", CONDITIONS[:1])).provenance.first_blocks == (1,)
    profile = storage.load(profiled(tmp_path / "both.h5", CONDITIONS[:1], first_blocks=(3, 1)))
    assert profile.provenance.first_blocks == (1, 3)
    assert profile.arrays["first_block/change"].shape == (1, 1, 4, 2, 3)  # no more steps back than there are
    assert np.isfinite(profile.arrays["first_block/change"][0, 0, 3]).all()
    with pytest.raises(
        ProfileError, match=r"first 2 blocks, it has those of the first 1 and 3; .*--first-blocks 1,2,3"
    ):
        profile.first_block_change(2)
    with pytest.raises(ProfileError, match=r"--first-blocks: found 4; .* which in this DiT.* are 1 to 3"):
        profiled(tmp_path / "more.h5", first_blocks=(1, 4))


def test_a_profile_of_an_older_version_holds_no_first_blocks_and_can_be_read(tmp_path: Path) -> None:
    path = profiled(tmp_path / "p.h5", CONDITIONS[:1])
    with h5py.File(path, "r+") as file:
        provenance = json.loads(file.attrs["provenance"])
        del provenance["first_blocks"], provenance["first_block_lags"], file["first_block"]
        file.attrs["provenance"] = json.dumps(provenance)
    profile = storage.load(path)
    assert profile.provenance.first_blocks == ()
    assert "first_block/size" not in profile.arrays
    with pytest.raises(
        ProfileError, match=r"first 1 blocks, it has those of none; profile again with --first-blocks 1"
    ):
        profile.first_block_change(1)
    assert profile.delta_cosine.shape == (1, 1, 4, 4)


def test_a_profile_broken_off_goes_on_at_the_next_run_and_equals_an_undisturbed_one(tmp_path: Path) -> None:
    whole = storage.load(profiled(tmp_path / "whole.h5"))
    profiled(tmp_path / "part.h5", CONDITIONS[:1])
    part = storage.load(profiled(tmp_path / "part.h5", resume=True))
    assert part.runs == whole.runs
    for name, values in whole.arrays.items():
        assert np.array_equal(part.arrays[name], values, equal_nan=True), name


def test_a_file_that_is_there_is_not_overwritten(tmp_path: Path) -> None:
    path = profiled(tmp_path / "p.h5", CONDITIONS[:1])
    before = path.read_bytes()
    with pytest.raises(ProfileError, match="exists, with 1 runs; pass --resume"):
        profiled(path)
    with pytest.raises(ProfileError, match="other prompts or seeds"):
        profiled(path, ["7", "8"], resume=True)
    pipeline = pipeline_of(dit)
    with pytest.raises(ProfileError, match="begun with another lags"):
        profile_pipeline(pipeline, "tiny", path, CONDITIONS, sampling=SAMPLING, lags=3, resume=True, progress=False)
    assert path.read_bytes() == before


def test_a_failed_run_is_kept_with_its_place_and_left_out(tmp_path: Path) -> None:
    path = profiled(tmp_path / "p.h5")
    pipeline = pipeline_of(dit)
    pipeline.transformer.transformer_blocks[2].ff.net[2].bias.data.fill_(torch.nan)
    with pytest.raises(ProfileError, match=r"every run failed at step 0 in 2\.mlp"):
        profile_pipeline(pipeline, "tiny", tmp_path / "bad.h5", ["1"], sampling=SAMPLING, progress=False)
    provenance, runs = storage.header(path)
    rows = {name: np.zeros(shape) for name, shape in storage.shapes(provenance).items()}
    storage.append(path, storage.RunRecord(replace(runs[0], status="failed at step 1 in 0.attn"), rows))
    profile = storage.load(path)
    assert len(profile.runs) == 4
    assert len(profile.delta_cosine) == 3


def test_wrong_files_are_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="does not exist; make a profile"):
        storage.load(tmp_path / "nowhere.h5")
    path = profiled(tmp_path / "p.h5", CONDITIONS[:1])
    (tmp_path / "cut.h5").write_bytes(path.read_bytes()[:3000])
    with pytest.raises(ProfileError, match="cannot be read as a profile"):
        storage.load(tmp_path / "cut.h5")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = 1
    with pytest.raises(ProfileError, match=r"other\.h5: not a profile: found format None, needed"):
        storage.load(tmp_path / "other.h5")


def test_a_profile_killed_twice_at_random_equals_an_undisturbed_one(tmp_path: Path) -> None:
    path, runs = tmp_path / "killed.h5", 24
    script = (
        "import sys; from pathlib import Path; from tests.profiler.test_profiling import profiled;"
        "profiled(Path(sys.argv[1]), [str(i) for i in range(24)], resume=True, priors=True)"
    )
    random = np.random.default_rng(0)
    counts = [0]
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "-c", script, str(path)])
        deadline = time.monotonic() + 120
        while not path.exists() or len(storage.header(path)[1]) <= counts[-1]:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(random.uniform(0, 0.1))
        process.kill()
        process.wait()
        counts.append(len(storage.header(path)[1]))
    assert counts == sorted(counts)
    assert counts[-1] < runs, "it finished before it was killed"
    conditions = [str(i) for i in range(runs)]
    killed = storage.load(profiled(path, conditions, resume=True, priors=True))
    whole = storage.load(profiled(tmp_path / "whole.h5", conditions, priors=True))
    assert killed.runs == whole.runs
    for name, values in whole.arrays.items():
        assert np.array_equal(killed.arrays[name], values, equal_nan=True), name
    for site in whole.anatomy.sites:
        one, two = (storage.load_prior(file, site)[1] for file in (path, tmp_path / "whole.h5"))
        assert np.array_equal(one, two), site
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".part"] == []


def test_priors_are_the_mean_outputs_of_the_halves(tmp_path: Path) -> None:
    path = profiled(tmp_path / "p.h5", priors=True)
    pipeline = pipeline_of(dit)
    seen: list[torch.Tensor] = []
    mlp = pipeline.transformer.transformer_blocks[2].ff
    mlp.register_forward_hook(lambda module, args, out: seen.append(out.clone()))
    for seed, condition in enumerate(CONDITIONS):
        sample(pipeline, [condition], [seed], SAMPLING)
    steps, prior = storage.load_prior(path, "2.mlp")
    assert steps == (0, 1, 2, 3)
    want = torch.stack(seen).unflatten(0, (3, 4)).mean(0).transpose(0, 1)  # (halves, steps, tokens, channels)
    assert prior == pytest.approx(want.numpy(), abs=1e-6)
    with pytest.raises(ProfileError, match=r"no prior of 9\.mlp"):
        storage.load_prior(path, "9.mlp")


def test_a_failed_run_is_no_part_of_the_priors(tmp_path: Path) -> None:
    path = profiled(tmp_path / "p.h5", priors=True)
    before = storage.load_prior(path, "0.attn")[1]
    provenance, runs = storage.header(path)
    rows = {name: np.zeros(shape) for name, shape in storage.shapes(provenance).items()}
    with storage.adding(path) as addition:
        addition.priors.add("0.attn", 1, 0, torch.full(before[:, 1].shape, torch.nan))
        addition.write(storage.RunRecord(replace(runs[0], status="failed at step 1 in 0.attn"), rows))
    assert np.array_equal(storage.load_prior(path, "0.attn")[1], before)
    assert len(storage.header(path)[1]) == 4


def test_a_run_that_is_broken_off_is_no_part_of_the_priors(tmp_path: Path) -> None:
    path = profiled(tmp_path / "p.h5", priors=True)
    content = path.read_bytes()

    def break_off() -> None:
        with storage.adding(path) as addition:
            addition.priors.add("0.attn", 1, 0, torch.ones(storage.load_prior(path, "0.attn")[1][:, 1].shape))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        break_off()
    assert path.read_bytes() == content
    assert [file.name for file in tmp_path.iterdir()] == ["p.h5"]


def test_a_step_that_one_pass_leaves_out_has_no_prior() -> None:
    prior = Prior((0, 1), np.zeros((2, 2), int), torch.zeros(2, 2, 1, 1))
    priors = Priors({"0.attn": prior})
    for step, part, value in ((0, 0, 1.0), (0, 1, 5.0), (1, 0, 7.0), (0, 0, 2.0), (0, 0, 6.0)):
        priors.add("0.attn", step, part, torch.full((1, 1, 1), value))
    assert prior.counts.tolist() == [[3, 1], [1, 0]]
    assert prior.means[:, :, 0, 0].tolist() == [[3.0, 7.0], [5.0, 0.0]]


def test_priors_for_a_plan_are_of_its_reused_steps_and_their_sources(tmp_path: Path) -> None:
    plan = Plan(4, (Rule("reuse", "C..C", "1-2", "mlp"), Rule("reuse", "CCC.", "0", "attn")))
    base = Schedule("fora", {}, anatomy_of(dit), Target(), 4, plan)
    path = profiled(tmp_path / "p.h5", priors=base)
    kept = {name for name in storage.array_shapes(path) if name.startswith("/priors/")}
    assert kept == {"/priors/1.mlp", "/priors/2.mlp", "/priors/0.attn"}
    everything = profiled(tmp_path / "all.h5", priors=True)
    for site, steps in (("1.mlp", (0, 1, 2)), ("0.attn", (2, 3))):
        found, prior = storage.load_prior(path, site)
        assert found == steps
        assert np.array_equal(prior, storage.load_prior(everything, site)[1][:, list(steps)])
    with pytest.raises(ProfileError, match="found 4 steps of a DiT"):
        profiled(tmp_path / "no.h5", priors=replace(base, steps=5, plan=Plan(5)))
    with pytest.raises(ProfileError, match="begun with another settings"):
        profiled(path, priors=True, resume=True)


def test_more_memory_than_allowed_is_refused_before_it_is_taken(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"above the 1 kB of --max-memory; take fewer --lags"):
        profiled(tmp_path / "p.h5", max_memory=1000)
    assert not (tmp_path / "p.h5").exists()


def test_the_need_is_what_is_held_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline = pipeline_of(dit)
    path = tmp_path / "p.h5"
    profile_pipeline(pipeline, "tiny", path, CONDITIONS, sampling=SAMPLING, lags=2, priors=True)
    said = capsys.readouterr().err.splitlines()[0]
    disk = float(said.split(" of main memory, ")[1].split()[0]) * 1e3
    assert said.endswith("kB on disk at most")
    assert 0.3 * disk < path.stat().st_size <= disk


def test_prompts_need_not_be_written_down(tmp_path: Path) -> None:
    path = profiled(tmp_path / "p.h5", CONDITIONS[:2], keep_prompts=False)
    assert [run.prompt for run in storage.header(path)[1]] == [hashed("1"), hashed("2")]
    assert hashed("1") == "sha256:6b86b273ff34fce1"
    profiled(path, keep_prompts=False, resume=True)
    assert len(storage.header(path)[1]) == 3
    with pytest.raises(ProfileError, match="other prompts or seeds"):
        profiled(path, resume=True)


def test_provenance_is_told_in_full(tmp_path: Path) -> None:
    provenance, _ = storage.header(profiled(tmp_path / "p.h5", CONDITIONS[:1]))
    assert provenance.contexts == ("0",)
    assert provenance.parts == (2,)
    assert set(provenance.versions) == {"dicache", "torch", "diffusers", "python"}
    assert provenance.settings["scheduler_config"]["beta_schedule"] == "linear"
    assert len(provenance.settings["scheduler_config_hash"]) == 16
    assert provenance.settings["device"] == "cpu"
    assert provenance.target.noise_levels is not None
    assert len(provenance.target.noise_levels) == len(provenance.target.timesteps or ()) == 4


def test_a_file_that_was_tampered_with_is_refused(tmp_path: Path) -> None:
    path = profiled(tmp_path / "p.h5", CONDITIONS[:1])
    with h5py.File(path, "r+") as file:
        del file["delta/gram"]
    with pytest.raises(ProfileError, match="cannot be read as a profile"):
        storage.load(path)
    with h5py.File(path, "r+") as file:
        rows: Any = {"chunks": (1, 1, 4, 2, 2), "compression": "gzip", "shuffle": True}
        file.create_dataset("delta/gram", data=np.zeros((1, 1, 4, 2, 2)), **rows)
    with pytest.raises(ProfileError, match=r"found delta/gram of shape \(1, 1, 4, 2, 2\)"):
        storage.load(path)


def test_the_time_embedding_is_measured_where_the_model_has_one(tmp_path: Path) -> None:
    path = tmp_path / "p.h5"
    pipeline = load("scenes", device="cpu")
    profile_pipeline(pipeline, "scenes", path, ["a red circle"] * 2, sampling=SAMPLING, lags=1, progress=False)
    profile = storage.load(path)
    assert profile.provenance.time_signals == ("time", "time_projected")
    for name in profile.provenance.time_signals:
        x = profile.relative_l1(name)
        assert x.shape == (2, 1, 3)
        assert (x > 0).all()
        assert (x[0] == x[1]).all()  # whatever the seed
    assert storage.load(profiled(tmp_path / "dit.h5")).provenance.time_signals == ()


def test_a_profile_from_before_the_time_embedding_was_measured_is_read(tmp_path: Path) -> None:
    path = profiled(tmp_path / "p.h5")
    with h5py.File(path, "r+") as file:
        content = json.loads(file.attrs["provenance"])
        del content["time_signals"]
        file.attrs["provenance"] = json.dumps(content)
    profile = storage.load(path)
    assert profile.provenance.time_signals == ()
    with pytest.raises(ProfileError, match="no signal 'time' in this profile; it has input"):
        profile.relative_l1("time")
