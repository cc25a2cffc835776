"""A profile: what was measured on a model over many runs, and where it came from."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from dicache.anatomy import Anatomy
from dicache.anatomy.parts import block_of, branch_of, check_keys
from dicache.schedules import Schedule, Target

FORMAT = "dicache.profile/1"
MOST_LAGS = 16  # of the first blocks, after which a simulation computes: a third of 50 steps in a row
RATES = 12  # steps back that a decision block's residuals are compared with: the largest published rate of AdaCache
RESIDUALS = ("attn", "rest", "block")  # what a block's attention adds to the stream, what all behind it adds, and both


class ProfileError(ValueError):
    """A profile file is broken, or does not hold what is asked of it."""


@dataclass(frozen=True)
class Run:
    """One prompt and one seed.

    Attributes:
        prompt: Text, or the number of the class; `sha256:` and 16 digits where prompts are not to be written down.
        seed: Of the noise.
        status: `ok`, or `failed at step 3 in 7.mlp` when a NaN or an infinity was met there.
    """

    prompt: str
    seed: int
    status: str = "ok"

    @property
    def ok(self) -> bool:
        return self.status == "ok"

    @property
    def key(self) -> tuple[int, str]:
        """By which runs are told apart and put in order."""
        return self.seed, self.prompt


@dataclass(frozen=True)
class Provenance:
    """Where a profile came from.

    Attributes:
        model: As it was named: `digits`, a hub id or a folder.
        anatomy: Its blocks and sites.
        target: Weights, sampler and size: what a schedule calibrated from it is for.
        settings: How the pipeline was called: guidance, height, width, and what the sampler was configured with.
        versions: Of dicache, torch and diffusers.
        lags: How many steps back a branch's output was compared with.
        contexts: Names of the guidance passes.
        parts: How many samples each pass has in its batch: 2 if it holds the guided and the unguided half, else 1.
        time_signals: Which of `time` and `time_projected` were measured: what the model makes of its timestep alone.
        decision_blocks: Blocks of which what they add to the stream was measured, for AdaCache.
        first_blocks: How many of the first blocks the residuals were compared of; none in profiles of older versions.
        first_block_lags: With how many steps back.
    """

    model: str
    anatomy: Anatomy
    target: Target
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    lags: int
    contexts: tuple[str, ...]
    parts: tuple[int, ...]
    time_signals: tuple[str, ...] = ()
    decision_blocks: tuple[int, ...] = ()
    first_blocks: tuple[int, ...] = ()
    first_block_lags: int = 0

    @property
    def layout(self) -> str:
        """How guidance is laid out: `batched` where a pass holds both halves, else `separate`."""
        return "batched" if max(self.parts) > 1 else "separate"

    def differences(self, other: "Provenance") -> list[str]:
        """Names of what is not the same in two profiles, so that runs of both cannot stand in one file.

        The versions of the software are not compared.
        """
        one, two = (json.loads(json.dumps(provenance.to_json())) for provenance in (self, other))
        return [key for key in one if key != "versions" and one[key] != two[key]]

    def to_json(self) -> dict[str, Any]:
        return {
            **vars(self),
            "anatomy": self.anatomy.to_json(),
            "target": self.target.to_json(),
            "settings": dict(self.settings),
            "versions": dict(self.versions),
            "contexts": list(self.contexts),
            "parts": list(self.parts),
            "time_signals": list(self.time_signals),
            "decision_blocks": list(self.decision_blocks),
            "first_blocks": list(self.first_blocks),
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Provenance":
        """Read what `to_json` returns; the last lists are not in files of before they were measured.

        Raises:
            ProfileError: If a key is unknown or missing, or a value is not of its kind.
        """
        kinds: dict[str, type] = {"model": str, "settings": Mapping, "versions": Mapping, "lags": int}
        lists: dict[str, type] = {"contexts": str, "parts": int}
        later: dict[str, type] = {"time_signals": str, "decision_blocks": int, "first_blocks": int}
        check_keys("provenance", content, {*kinds, *lists, "anatomy", "target"}, optional={*later, "first_block_lags"})
        for name, kind in {**kinds, "first_block_lags": int}.items():
            if not isinstance(value := content.get(name, 0), kind) or isinstance(value, bool):
                raise ProfileError(f"its {name} cannot be {value!r}")
        for name, kind in (lists | later).items():
            value = content.get(name, [])
            if not isinstance(value, list) or not all(type(item) is kind for item in value):
                raise ProfileError(f"its {name} cannot be {value!r}")
        anatomy = Anatomy.from_json(content["anatomy"])
        blocks = range(len(anatomy.blocks))
        if content["lags"] < 1 or not blocks or any(b not in blocks for b in content.get("decision_blocks", [])):
            raise ProfileError(f"it has {len(blocks)} blocks, lags up to {content['lags']} and decisions by others")
        if not content["contexts"] or len(content["contexts"]) != len(content["parts"]) or min(content["parts"]) < 1:
            raise ProfileError(f"its passes {content['contexts']} cannot have the parts {content['parts']}")
        made = {name: tuple(content.get(name, ())) for name in (*lists, *later)}
        return cls(**{**content, **made, "anatomy": anatomy, "target": Target.from_json(content["target"])})


@dataclass(frozen=True)
class Profile:
    """The measurements of all finished runs. Axes: r runs that did not fail, c contexts, s steps, b blocks.

    Attributes:
        provenance: Where it came from.
        runs: All runs, the failed ones too; they have no rows in the arrays.
        arrays: By their names in the file, float64, read when they are first asked for. NaN where nothing could be
            measured: at step 0 there is no step before.

            - `sites/diff_l1`, `sites/abs_l1`, `sites/dot`, `sites/norm2`, (r, c, s, sites, lags): mean |x_i - x_(i-k)|,
              mean |x_i|, <x_i, x_(i-k)> and |x_i|^2 of each site's output, k = 1 first.
            - `delta/gram`, (r, c, s, 2b, 2b): products of the blocks' deltas of this step, then of the step before,
              each with each. Of the streams that leave the segment; NaN between blocks of different segments.
            - `delta/cosine`, (r, c, s, b): of each block's delta with that of the step before.
            - `teacache/input`, `teacache/residual`, `teacache/body`, `teacache/output`, (r, c, s, 2): mean |difference|
              to the step before and mean |step before| of the modulated input, the body's residual, the body's output,
              the model's output.
            - `teacache/time`, `teacache/time_projected`, (r, c, s, 2): the same of the time embedding and its
              projection, where `provenance.time_signals` has them.
            - `magnitude`, (r, c, s, 3): over tokens, mean and deviation of the ratio of the body residual's norm to
              that of the step before, and mean of 1 - their cosine (MagCache, arXiv 2506.09045).
            - `motion/abs_l1`, `motion/diff_l1`, (r, c, s, d, 3) and (r, c, s, d, 3, 12): mean |x_i| and mean
              |x_i - x_(i-k)|, k = 1 first, of what each of d decision blocks adds to the stream of the latents: its
              attention, all behind that, and both (`RESIDUALS`), after their gates. `motion/between_frames`,
              (r, c, s, d, 3): of a video, how much each differs from frame to frame, from 0 to 1. Not in profiles of
              before 0.1.0's AdaCache.
            - `first_block/size`, (r, c, s, n), and `first_block/change`, (r, c, s, n, lags): mean |h_i| and, k = 1
              first, mean |h_i - h_(i-k)|, of the change h that the first blocks make to the latents' stream, for each
              of the n `first_blocks` of the provenance; not there where that has none.
            - `body/weights`, (r, s, parts): with which the parts of all passes add up to what the scheduler is given.
            - `body/gram`, `body/output`, (r, s, s): products of the guided body residuals, and of the guided outputs of
              the model, of all steps with one another.
            - `body/branches`, (r, branches, s, s): the same of the sites of each kind of branch, estimated from a
              random projection of each site to 1031 numbers; of one site the relative deviation is about 0.04.
    """

    provenance: Provenance
    runs: tuple[Run, ...]
    arrays: Mapping[str, np.ndarray]

    @property
    def anatomy(self) -> Anatomy:
        return self.provenance.anatomy

    @property
    def steps(self) -> int:
        return len(self.provenance.target.timesteps or ()) or int(self.delta_cosine.shape[2])

    @property
    def origin(self) -> dict[str, Any]:
        """What a schedule tells of the profile that it was made from: the model's name, how many runs, and guidance."""
        runs = sum(run.ok for run in self.runs)
        return {"model": self.provenance.model, "runs": runs, "guidance": self.provenance.settings.get("guidance")}

    @property
    def delta_cosine(self) -> np.ndarray:
        return self.arrays["delta/cosine"]

    @cached_property
    def sites(self) -> Mapping[str, np.ndarray]:
        """The four statistics of `sites/`."""
        return {name: self.arrays[f"sites/{name}"] for name in ("diff_l1", "abs_l1", "dot", "norm2")}

    @cached_property
    def branches(self) -> tuple[str, ...]:
        """Kinds of branch, in the order in which a block calls them."""
        return tuple(dict.fromkeys(branch_of(key) for key in self.anatomy.sites))

    def differences(self, schedule: Schedule) -> list[str]:
        """Return one sentence for each thing that a schedule was made for and that this profile is not of."""
        if schedule.anatomy.sites != self.anatomy.sites:
            mine, theirs = len(self.anatomy.sites), len(schedule.anatomy.sites)
            return [f"the {theirs} sites of a {schedule.anatomy.model}, found {mine} of a {self.anatomy.model}"]
        if schedule.steps != self.steps:
            return [f"{schedule.steps} steps, found {self.steps}"]
        return schedule.target.differences(**vars(self.provenance.target))

    def similarity(self, branch: str, lag: int = 1) -> np.ndarray:
        """Return the cosine between a branch's outputs at step i and i - lag, shape (r, c, s, b).

        NaN where there is no such step, and for blocks that do not have the branch.

        Raises:
            ProfileError: If no block has the branch, or the lag was not measured.
        """
        if branch not in self.branches:
            raise ProfileError(f"no branch {branch!r} in this profile; it has {', '.join(self.branches)}")
        if not 1 <= lag <= self.provenance.lags:
            raise ProfileError(f"lag {lag} was not measured; this profile has lags 1 to {self.provenance.lags}")
        dot, norm2 = self.arrays["sites/dot"][..., lag - 1], self.arrays["sites/norm2"][..., 0]
        before = np.full_like(norm2, np.nan)
        before[:, :, lag:] = norm2[:, :, :-lag]
        with np.errstate(invalid="ignore", divide="ignore"):
            cosine = dot / np.sqrt(norm2 * before)  # (r, c, s, sites)
        runs, contexts, steps, _ = cosine.shape
        out = np.full((runs, contexts, steps, len(self.anatomy.blocks)), np.nan)
        for place, key in enumerate(self.anatomy.sites):
            if branch_of(key) == branch:
                out[..., block_of(key)] = cosine[..., place]
        return out

    def relative_l1(self, what: str) -> np.ndarray:
        """Return mean |x_i - x_(i-1)| / mean |x_(i-1)|, shape (r, c, s - 1), of one of `teacache`'s signals.

        References:
            TeaCache, arXiv 2411.19108, equation 3.
        """
        try:
            pairs = self.arrays[f"teacache/{what}"][:, :, 1:]
        except KeyError:
            known = ", ".join(name.partition("/")[2] for name in self.arrays if name.startswith("teacache/"))
            raise ProfileError(f"no signal {what!r} in this profile; it has {known}") from None
        with np.errstate(invalid="ignore", divide="ignore"):
            ratio: np.ndarray = pairs[..., 0] / pairs[..., 1]
        return ratio

    def residual_change(self, block: int, residual: str) -> np.ndarray:
        """Return |r_i - r_(i-k)| / |r_(i-k)| in the 1-norm of what a decision block adds, (r, c, s, 12), k = 1 first.

        Args:
            block: One of the decision blocks that were measured.
            residual: `attn`, `rest` or `block`.

        Raises:
            ProfileError: If the block was not measured, or what its attention adds cannot be told from the rest.

        References:
            AdaCache, arXiv 2411.02397, equation 3, before it is divided by the rate.
        """
        place, kind = self._decision(block, residual)
        change = self.arrays["motion/diff_l1"][:, :, :, place, kind]  # (r, c, s, lags)
        size = self.arrays["motion/abs_l1"][:, :, :, place, kind]  # (r, c, s)
        before = np.full_like(change, np.nan)
        for lag in range(1, min(change.shape[-1], size.shape[-1] - 1) + 1):
            before[:, :, lag:, lag - 1] = size[:, :, :-lag]
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(change / before)

    def between_frames(self, block: int, residual: str) -> np.ndarray | None:
        """Return how much what a decision block adds differs from frame to frame, shape (r, c, s); None without frames.

        Raises:
            ProfileError: As `residual_change`.
        """
        place, kind = self._decision(block, residual)
        found = self.arrays["motion/between_frames"][:, :, :, place, kind]
        return None if np.isnan(found).all() else np.asarray(found)

    def _decision(self, block: int, residual: str) -> tuple[int, int]:
        """Return the places of a decision block and a residual in the arrays of `motion`."""
        measured = self.provenance.decision_blocks
        if not measured:
            raise ProfileError("this profile does not say what a decision block adds to the stream; profile again")
        if block not in measured:
            raise ProfileError(
                f"block {block} was not measured as a decision block, but {', '.join(map(str, measured))}; take that, "
                f"or profile again with --decision-blocks {block}"
            )
        if residual != "block" and not self.anatomy.blocks[block].middle:
            raise ProfileError(
                f"what the attention of block {block} adds cannot be told from what the rest of it adds: no module is "
                "given the stream between the two. Take the branch `block`, or another decision block"
            )
        return measured.index(block), RESIDUALS.index(residual)

    def first_block_change(self, count: int) -> np.ndarray:
        """Return mean |h_i - h_(i-k)| / mean |h_(i-k)|, shape (r, c, s, lags), k = 1 first.

        h is what the first `count` blocks add to the latents' stream. NaN where there is no such step.

        Raises:
            ProfileError: If it was not measured.
        """
        counts = self.provenance.first_blocks
        if count not in counts:
            has = f"of the first {' and '.join(map(str, counts))}" if counts else "of none"
            raise ProfileError(
                f"this profile does not hold the residuals of the first {count} blocks, it has those {has}; profile "
                f"again with --first-blocks {','.join(map(str, sorted({*counts, count})))}"
            )
        place = counts.index(count)
        size, change = (self.arrays[f"first_block/{name}"][:, :, :, place] for name in ("size", "change"))
        kept = np.full_like(change, np.nan)
        for lag in range(1, change.shape[-1] + 1):
            kept[:, :, lag:, lag - 1] = size[:, :, :-lag]
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(change / kept)

    def range_cosine(self, start: int, stop: int) -> np.ndarray:
        """Return the cosine between a block range's delta at each step and the step before, shape (r, c, s).

        Args:
            start: First block.
            stop: The block behind the last.

        Raises:
            ProfileError: If there is no such range, or no one delta can stand for it.

        References:
            Delta-DiT, arXiv 2406.01125, figure 5, for ranges of one block.
        """
        now, before, cross = self._range_products(start, stop)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(cross / np.sqrt(now * before))

    def range_error(self, start: int, stop: int) -> np.ndarray:
        """Return |delta_i - delta_(i-1)| / |delta_i| in the 2-norm of a block range's delta, shape (r, c, s).

        It is the relative error of what a step adds in this range when it takes the delta of the step before.

        Args:
            start: First block.
            stop: The block behind the last.

        Raises:
            ProfileError: If there is no such range, or no one delta can stand for it.
        """
        now, before, cross = self._range_products(start, stop)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(np.sqrt(np.maximum(now + before - 2 * cross, 0) / now))

    def _range_products(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return |delta_i|^2, |delta_(i-1)|^2 and <delta_i, delta_(i-1)> of a block range, each (r, c, s)."""
        blocks = len(self.anatomy.blocks)
        if not 0 <= start < stop <= blocks:
            raise ProfileError(f"no blocks {start} to {stop - 1} in this model; it has 0 to {blocks - 1}")
        if self.anatomy.segment(start) != self.anatomy.segment(stop - 1):
            segments = ", ".join(f"{a}-{b - 1}" for a, b in self.anatomy.segments)
            raise ProfileError(f"no one delta stands for blocks {start} to {stop - 1}; choose them within {segments}")
        gram = self.arrays["delta/gram"]
        now, before = slice(start, stop), slice(blocks + start, blocks + stop)
        pairs = ((now, now), (before, before), (now, before))
        one, two, cross = (gram[..., down, right].sum(axis=(-2, -1)) for down, right in pairs)
        return one, two, cross
