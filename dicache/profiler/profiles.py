"""A profile: what was measured on a model over many runs, and where it came from."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from dicache.anatomy import Anatomy
from dicache.schedules import Target

FORMAT = "dicache.profile/1"


class ProfileError(ValueError):
    """A profile file is broken, or does not hold what is asked of it."""


@dataclass(frozen=True)
class Run:
    """One prompt and one seed.

    Attributes:
        prompt: Text, or the number of the class.
        seed: Of the noise.
        status: `ok`, or `failed at step 3 in 7.mlp` when a NaN or an infinity was met there.
    """

    prompt: str
    seed: int
    status: str = "ok"

    @property
    def ok(self) -> bool:
        return self.status == "ok"


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
        layout: `batched` if a pass holds the guided and the unguided half in one batch, else `separate`.
    """

    model: str
    anatomy: Anatomy
    target: Target
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    lags: int
    contexts: tuple[str, ...]
    layout: str

    def to_json(self) -> dict[str, Any]:
        return {
            **vars(self),
            "anatomy": self.anatomy.to_json(),
            "target": self.target.to_json(),
            "settings": dict(self.settings),
            "versions": dict(self.versions),
            "contexts": list(self.contexts),
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Provenance":
        return cls(
            **{
                **content,
                "anatomy": Anatomy.from_json(content["anatomy"]),
                "target": Target.from_json(content["target"]),
                "contexts": tuple(content["contexts"]),
            }
        )


@dataclass(frozen=True)
class Profile:
    """The measurements of all finished runs. Axes: r runs that did not fail, c contexts, s steps, b blocks.

    Attributes:
        provenance: Where it came from.
        runs: All runs, the failed ones too; they have no rows in the arrays.
        sites: `diff_l1`, `abs_l1`, `dot` and `norm2`, each (r, c, s, sites, lags): mean |x_i - x_(i-k)|, mean |x_i|,
            the inner product and |x_i|^2 of each site's output, k = 1 first. NaN where there is no step i - k.
        delta_cosine: Cosine of each block's delta with that of the step before, (r, c, s, b). NaN at step 0.
        teacache: `input`, `residual`, `body` and `output`, each (r, c, s, 2): mean |difference| to the step before and
            mean |step before| of the modulated input, the body's residual, the body's output, the model's output.
    """

    provenance: Provenance
    runs: tuple[Run, ...]
    sites: Mapping[str, np.ndarray]
    delta_cosine: np.ndarray
    teacache: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def anatomy(self) -> Anatomy:
        return self.provenance.anatomy

    @property
    def steps(self) -> int:
        return int(self.delta_cosine.shape[2])

    @cached_property
    def branches(self) -> tuple[str, ...]:
        """Kinds of branch, in the order in which a block calls them."""
        return tuple(dict.fromkeys(key.partition(".")[2] for key in self.anatomy.sites))

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
        dot, norm2 = self.sites["dot"][..., lag - 1], self.sites["norm2"][..., 0]
        before = np.full_like(norm2, np.nan)
        before[:, :, lag:] = norm2[:, :, :-lag]
        with np.errstate(invalid="ignore", divide="ignore"):
            cosine = dot / np.sqrt(norm2 * before)  # (r, c, s, sites)
        runs, contexts, steps, _ = cosine.shape
        out = np.full((runs, contexts, steps, len(self.anatomy.blocks)), np.nan)
        for place, key in enumerate(self.anatomy.sites):
            block, _, kind = key.partition(".")
            if kind == branch:
                out[..., int(block)] = cosine[..., place]
        return out

    def relative_l1(self, what: str) -> np.ndarray:
        """Return mean |x_i - x_(i-1)| / mean |x_(i-1)|, shape (r, c, s - 1), of one of `teacache`'s four signals.

        References:
            TeaCache, arXiv 2411.19108, equation 3.
        """
        if what not in self.teacache:
            raise ProfileError(f"no signal {what!r} in this profile; it has {', '.join(self.teacache)}")
        pairs = self.teacache[what][:, :, 1:]
        with np.errstate(invalid="ignore", divide="ignore"):
            ratio: np.ndarray = pairs[..., 0] / pairs[..., 1]
        return ratio
