"""What guidance makes of the passes of one step, and the products of all steps of a run with one another.

How a skipped step errs shows in the *guided* output: the errors of the guided and the unguided pass have cross terms.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from dicache.profiler.together import ALONE, Together

LINEAR = 2e-2  # relative error up to which an output counts as a weighted sum of the passes; float16 and less rounds
CHUNK = 1 << 20  # elements that are multiplied at a time


@dataclass(frozen=True)
class PassOutput:
    """What one guidance pass gave in one step.

    Attributes:
        output: The model's, batch first.
        residual: The body's, tensor by tensor; each (parts, elements of a part).
        sketch: Random projection of the sites' outputs, (sites, parts, buckets).
    """

    output: Tensor
    residual: Sequence[Tensor]
    sketch: Tensor

    @property
    def parts(self) -> int:
        return int(self.sketch.shape[1])

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.output, self.sketch, *self.residual))

    def cpu(self) -> "PassOutput":
        return PassOutput(self.output.cpu(), [tensor.cpu() for tensor in self.residual], self.sketch.cpu())


def guidance_weights(parts: Sequence[Tensor], guided: Tensor) -> np.ndarray | None:
    """Return the weights with which parts of the model's output add up to what the scheduler is given, or None.

    They are measured and not read from settings, since pipelines differ in the order of the halves, rescale or leave
    out guidance at some steps, or change the sign.

    Args:
        parts: Of the outputs of all passes, each of one sample: (channels, ...).
        guided: What the scheduler was given, for the same sample. Learned variances are behind its channels.
    """
    channels = len(guided)
    same = [part[:channels] for part in parts if part.ndim == guided.ndim]
    if len(same) < len(parts) or any(part.shape != guided.shape for part in same):
        return None
    rows = torch.stack([part.flatten() for part in (*same, guided)]).cpu().double()
    gram = (rows @ rows.T).numpy()
    if not np.isfinite(gram).all():
        return None
    weights: np.ndarray = np.linalg.lstsq(gram[:-1, :-1], gram[:-1, -1], rcond=None)[0]
    error = gram[-1, -1] - 2 * weights @ gram[:-1, -1] + weights @ gram[:-1, :-1] @ weights
    return weights if error <= LINEAR**2 * gram[-1, -1] else None


@dataclass
class GuidedSteps:
    """Collects one run's passes and guided outputs on the CPU, and combines them when the run is over.

    Attributes:
        kinds: Branch of each site.
        steps: Of a run.
        together: The ranks that the model is spread over.
    """

    kinds: Sequence[str]
    steps: int
    together: Together = ALONE
    _guided: dict[int, Tensor] = field(default_factory=dict)
    _passes: dict[int, dict[str, PassOutput]] = field(default_factory=dict)

    def add(self, step: int, passes: Mapping[str, PassOutput], guided: Tensor) -> None:
        """Add a step: its passes by name, in order, and what the scheduler was given for the run's sample."""
        self._guided[step] = guided.cpu()
        self._passes[step] = {name: found.cpu() for name, found in passes.items()}

    @property
    def outputs(self) -> Tensor:
        """What the scheduler was given, (steps that were added, ...)."""
        return torch.stack(list(self._guided.values()))

    @property
    def bytes(self) -> int:
        """Memory held."""
        held = sum(tensor.nbytes for tensor in self._guided.values())
        return held + sum(found.bytes for passes in self._passes.values() for found in passes.values())

    def arrays(self, parts: Sequence[tuple[str, int]]) -> dict[str, np.ndarray]:
        """Return the run's datasets, NaN at steps whose guidance is not a weighted sum of the passes.

        Args:
            parts: Of all passes, in the order of the weights.
        """
        weights = np.full((self.steps, len(parts)), np.nan)
        residuals: dict[int, Tensor] = {}
        sketches: dict[int, Tensor] = {}
        for step, passes in self._passes.items():
            found = self._weights(passes, self._guided[step])
            if found is None:
                continue
            names = [(name, part) for name, given in passes.items() for part in range(given.parts)]
            weights[step] = [dict(zip(names, found.tolist(), strict=True)).get(part, 0.0) for part in parts]
            factors = torch.from_numpy(found).float()
            whole = [torch.cat([t.float() for t in given.residual], dim=1) for given in passes.values()]
            if len({rows.shape[1] for rows in whole}) == 1:  # else the passes have texts of different lengths
                residuals[step] = factors @ torch.cat(whole)
                sketch = torch.cat([given.sketch for given in passes.values()], dim=1)  # (sites, all parts, buckets)
                sketches[step] = torch.einsum("p,spb->sb", factors, sketch)
        branches = list(dict.fromkeys(self.kinds))
        by_branch = np.full((len(branches), self.steps, self.steps), np.nan)
        for index, branch in enumerate(branches):
            places = [place for place, kind in enumerate(self.kinds) if kind == branch]
            by_branch[index] = self._gram({step: sketch[places].flatten() for step, sketch in sketches.items()})
        outputs = {step: guided.float().flatten() for step, guided in self._guided.items()}
        body, by_branch = self.together.sums([self._gram(residuals), by_branch])
        return {
            "body/weights": weights,
            "body/gram": body,
            "body/output": self._gram(outputs),
            "body/branches": by_branch,
        }

    def _weights(self, passes: Mapping[str, PassOutput], guided: Tensor) -> np.ndarray | None:
        samples: list[Tensor] = []
        for given in passes.values():
            if len(given.output) != given.parts:  # not one sample a part
                return None
            samples += given.output.unbind()
        return guidance_weights(samples, guided)

    def _gram(self, held: Mapping[int, Tensor]) -> np.ndarray:
        """Return the products of all steps with one another, (steps, steps), summed in float64."""
        gram = np.full((self.steps, self.steps), np.nan)
        if not held or len({len(row) for row in held.values()}) > 1:
            return gram
        steps = sorted(held)
        size = len(held[steps[0]])
        total = torch.zeros(len(steps), len(steps), dtype=torch.float64)
        for start in range(0, size, CHUNK):
            rows = torch.stack([held[step][start : start + CHUNK] for step in steps]).double()
            total += rows @ rows.T
        gram[np.ix_(steps, steps)] = total.numpy()
        return gram
