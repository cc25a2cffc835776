"""Profiles from strangers: nothing outside of the file is read, and no more memory taken than it says."""

import json
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from dicache.profiler import ProfileError, storage
from dicache.profiler.storage import checking
from tests.hostile import changed
from tests.profiler.test_merging import PROVENANCE, RUNS, write

WRITTEN = Path(__file__).parent.parent / "written"
DOCUMENTS = [json.loads(json.dumps(PROVENANCE.to_json()))]


def read(path: Path) -> None:
    """Read all of a profile."""
    profile = storage.load(path)
    for name in profile.arrays:
        assert len(profile.arrays[name]) == sum(run.ok for run in profile.runs)
    if storage.has_priors(path):
        for site in profile.anatomy.sites:
            if f"/priors/{site}" in storage.array_shapes(path):
                storage.load_prior(path, site)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path / "p.h5", RUNS[:2])


def replaced(file: h5py.File, name: str, **made: Any) -> None:
    del file[name]
    file.create_dataset(name, **made)


def linked(file: h5py.File, link: Any) -> None:
    del file["delta/gram"]
    file["delta/gram"] = link


def in_another_file(file: h5py.File) -> None:
    size = file["magnitude"].shape
    replaced(file, "magnitude", shape=size, dtype="f8", external=[("/etc/passwd", 0, 8 * int(np.prod(size)))])


def assembled_from_another_file(file: h5py.File) -> None:
    layout = h5py.VirtualLayout(file["magnitude"].shape, "f8")
    layout[:] = h5py.VirtualSource("/tmp/other.h5", "x", layout.shape)
    del file["magnitude"]
    file.create_virtual_dataset("magnitude", layout)


def with_rows_that_explode(file: h5py.File) -> None:
    dataset = file["delta/gram"]
    dataset.id.write_direct_chunk((0,) * dataset.ndim, zlib.compress(bytes(10**5), 9))


def with_a_filter_of_another_kind(file: h5py.File) -> None:
    shape = file["magnitude"].shape
    replaced(file, "magnitude", shape=shape, chunks=(1, *shape[1:]), dtype="f8", compression="lzf", shuffle=True)


def with_a_group_in_the_place_of_numbers(file: h5py.File) -> None:
    del file["delta/gram"]
    file.create_group("delta/gram")


def with_an_empty_group_in_the_place_of_numbers(file: h5py.File) -> None:
    del file["magnitude"]
    file.create_group("magnitude")


def with_ten_billion_runs(file: h5py.File) -> None:
    for name in ("prompt", "seed", "status"):
        file[f"runs/{name}"].resize(10**10, axis=0)


def with_rows_that_are_not_there(file: h5py.File) -> None:
    file["magnitude"].resize(1, axis=0)
    file["magnitude"].resize(2, axis=0)


def with_numbers_for_prompts(file: h5py.File) -> None:
    replaced(file, "runs/prompt", data=np.zeros(2))


def with_bytes_for_prompts(file: h5py.File) -> None:
    file["runs/prompt"][0] = b"\xff\xfe"


def with_more_prompts_than_seeds(file: h5py.File) -> None:
    file["runs/prompt"].resize(3, axis=0)
    file["runs/prompt"][2] = "more"


def with_a_prior_of_other_steps(file: h5py.File) -> None:
    file["priors/0.mlp"].attrs["steps"] = [0, 1, 2]


def with_numbers_that_numpy_has_not(file: h5py.File) -> None:
    kind = h5py.h5t.IEEE_F64LE.copy()
    kind.set_ebias(10**6)
    shape = file["magnitude"].shape
    del file["magnitude"]
    h5py.h5d.create(file.id, b"magnitude", kind, h5py.h5s.create_simple(shape))


def with_a_name_that_is_not_text(file: h5py.File) -> None:
    h5py.h5g.create(file.id, b"\x9e")


def of_no_text(file: h5py.File) -> None:
    file.attrs["format"] = np.zeros(3)


HOSTILE: dict[str, tuple[Callable[[h5py.File], None], str]] = {
    "external link": (lambda file: linked(file, h5py.ExternalLink("/etc/passwd", "/")), "delta|gram in it is a link"),
    "soft link": (lambda file: linked(file, h5py.SoftLink("/magnitude")), "gram in it is a link"),
    "external storage": (in_another_file, "magnitude lie in another file"),
    "virtual": (assembled_from_another_file, "magnitude lie in another file"),
    "bomb": (with_rows_that_explode, "row 0 of its /delta/gram has not the"),
    "lzf": (with_a_filter_of_another_kind, "magnitude is not stored as what a profile measures"),
    "group": (with_a_group_in_the_place_of_numbers, "gram in it is no array"),
    "empty group": (with_an_empty_group_in_the_place_of_numbers, "its magnitude is no array of numbers or texts"),
    "runs": (with_ten_billion_runs, "is not stored as a profile's runs are"),
    "no rows": (with_rows_that_are_not_there, "cannot be read as a profile"),
    "numbers": (with_numbers_for_prompts, "prompt is not stored as a profile's runs are"),
    "odd numbers": (with_numbers_that_numpy_has_not, "its magnitude is of numbers that cannot be read"),
    "name": (with_a_name_that_is_not_text, r"the name b'\\x9e' in it is not text"),
    "bytes": (with_bytes_for_prompts, "row 0 of its /runs/prompt is not text"),
    "one prompt more": (with_more_prompts_than_seeds, "3 prompts, 2 seeds and 2 states of runs"),
    "prior": (with_a_prior_of_other_steps, r"prior of 0\.mlp is not of as many steps as it says"),
    "format": (of_no_text, "not a profile: found format array"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_profile_is_refused(name: str, path: Path) -> None:
    change, message = HOSTILE[name]
    with h5py.File(path, "r+") as file:
        change(file)
    with pytest.raises(ProfileError, match=message) as refused:
        read(path)
    assert str(refused.value).startswith(str(path))


def test_a_row_that_explodes_takes_no_memory(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with h5py.File(path, "r+") as file:
        with_rows_that_explode(file)
        wanted: list[int] = []
        inflate = zlib.decompressobj

        class Watched:
            def __init__(self) -> None:
                self.inner = inflate()

            def decompress(self, data: bytes, most: int) -> bytes:
                out = self.inner.decompress(data, most)
                wanted.append(len(out))
                return out

        monkeypatch.setattr(zlib, "decompressobj", Watched)
        with pytest.raises(ProfileError, match="has not the"):
            checking.measured_rows(file["delta/gram"])
        assert wanted == [8 * int(np.prod(file["delta/gram"].shape[1:])) + 1]


def test_a_row_that_says_it_is_of_four_gigabytes_takes_no_memory(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        dataset = file["magnitude"]
        dataset.id.write_direct_chunk((0,) * dataset.ndim, b"x" * 12345)
    content = path.read_bytes()
    assert content.count((12345).to_bytes(4, "little")) == 1
    path.write_bytes(content.replace((12345).to_bytes(4, "little"), b"\xff" * 4))
    with pytest.raises(ProfileError, match=r"row 0 of its /magnitude takes 4294967295 bytes for its"):
        read(path)


def test_what_does_not_fit_into_memory_is_refused_before_it_is_read(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checking, "host_memory", lambda: 100)
    profile = storage.load(path)
    with pytest.raises(ProfileError, match=r"p\.h5: its /delta/gram takes 512 bytes of memory, and 100 are free"):
        profile.arrays["delta/gram"]


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changed(DOCUMENTS))
def test_a_changed_provenance_is_read_or_refused(path: Path, document: Any) -> None:
    with h5py.File(path, "r+") as file:
        file.attrs["provenance"] = json.dumps(document)
    with suppress(ProfileError):
        read(path)


@pytest.mark.parametrize("at", range(5))
def test_a_profile_with_broken_bytes_is_read_or_refused(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    places = np.random.default_rng(at).integers(0, len(data), 20)
    for place in places:
        data[place] ^= 1 << at
    path.write_bytes(data)
    with suppress(ProfileError):
        read(path)


@pytest.mark.parametrize("file", sorted(WRITTEN.glob("profiles-1/*.h5")), ids=lambda file: file.stem)
def test_a_file_of_every_format_that_was_written_is_read(file: Path) -> None:
    with h5py.File(file) as opened:
        assert opened.attrs["format"] == "dicache.profile/1"
    read(file)
    assert storage.header(file)[1][0].ok


def test_a_profile_of_the_future_says_what_to_install(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file.attrs["format"] = "dicache.profile/2"
        file.attrs["dicache"] = "0.4.0"
    with pytest.raises(ProfileError, match=r"p\.h5: not a profile: .*newer .*: `pip install 'dicache>=0\.4\.0'`"):
        storage.load(path)


@pytest.mark.parametrize("shape", [(2, 2, 1), (1, 1, 1), (2, 4, 4)])
def test_rows_of_another_shape_are_not_joined(shape: tuple[int, ...], path: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "other.h5", RUNS[2:4])
    with h5py.File(other, "r+") as file:
        made = {"chunks": (1, *shape), "compression": "gzip", "shuffle": True}
        replaced(file, "delta/cosine", shape=(2, *shape), dtype="f8", **made)
        file["delta/cosine"][:] = 1.5
    before = path.read_bytes()
    with pytest.raises(ProfileError, match=r"other.h5.* a row of its delta/cosine is of shape"):
        storage.merge([path, other], path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("padded", [lambda data: data + b"EVIL" * 1000, lambda data: with_empty_blocks(data)])
def test_rows_that_are_stored_in_more_than_they_need_are_refused(
    padded: Callable[[bytes], bytes], path: Path, tmp_path: Path
) -> None:
    other = write(tmp_path / "other.h5", RUNS[2:4])
    with h5py.File(other, "r+") as file:
        dataset = file["magnitude"]
        place = (0,) * dataset.ndim
        _, data = dataset.id.read_direct_chunk(place)
        dataset.id.write_direct_chunk(place, padded(data))
    with pytest.raises(ProfileError, match="row 0 of its /magnitude takes"):
        read(other)
    with pytest.raises(ProfileError, match="row 0 of its /magnitude takes"):
        storage.merge([path, other], tmp_path / "whole.h5")
    assert not (tmp_path / "whole.h5").exists()


def with_empty_blocks(data: bytes) -> bytes:
    """Return the same numbers, with thousands of blocks before them that hold nothing."""
    return data[:2] + b"\x00\x00\x00\xff\xff" * 5000 + data[2:]
