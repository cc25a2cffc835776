"""What stands in for an output that is not computed, made from those that are kept."""

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from dicache.anatomy.nested import each, tensors_of
from dicache.runtime.stats import Stats
from dicache.schedules import Corrections, ScheduleError
from dicache.schedules.corrections import Form, name_of


def foretell(outputs: Sequence[Any], coefficients: Sequence[float], scale: float = 1.0) -> Any:
    """Return the last output and, added to it, the weighted differences of successive ones.

    Args:
        outputs: The last one first: tensors, or equally nested tuples, lists and dictionaries of them.
        coefficients: With which their differences are weighed, one fewer than outputs.
        scale: What the last output is multiplied with.
    """
    if not isinstance(outputs[0], Tensor):
        return each(outputs, lambda parts: foretell(parts, coefficients, scale))
    last, *older = outputs
    if not older:
        return last * scale
    # The differences are taken first: of two half-precision numbers that are close, the difference is exact.
    total = torch.add(last, last - older[0], alpha=coefficients[0])
    for newer, before, coefficient in zip(older, older[1:], coefficients[1:], strict=False):
        total.add_(newer - before, alpha=coefficient)
    return total if scale == 1 else total.add_(last, alpha=scale - 1)


class Corrector:
    """Corrects what is held of one site at one step of one guidance pass.

    Args:
        corrections: The schedule's.
        context: The guidance pass.
        site: Its key.
        step: The step.
        stats: Told how much memory the trend takes.

    Raises:
        ScheduleError: If the schedule has no trends for the guidance pass.
    """

    def __init__(self, corrections: Corrections, context: str, site: str, step: int, stats: Stats) -> None:
        if context not in corrections.contexts:
            raise ScheduleError(
                f"the schedule corrects the guidance passes {', '.join(corrections.contexts)}, but the pipeline has a "
                f"pass {context}. Calibrate with the guidance that is used"
            )
        self._corrections = corrections
        self._name = name_of(context, site, step)
        self._trend = corrections.tensors[self._name]  # (parts, tokens, channels)
        self._stats = stats
        self._known: set[Hashable] = set()  # the calls that the trend was found to fit
        self._factors: list[Tensor] = []  # of each tensor, (parts, its tokens, channels)

    def __call__(self, out: Any, batch: int) -> Any:
        """Return an output corrected.

        Args:
            out: What is held.
            batch: Samples in the call: equally many for each part.

        Raises:
            ScheduleError: If the trend is for another batch or another size.
        """
        return corrected(out, self.factors(out, batch), self._corrections.form)

    def factors(self, out: Any, batch: int) -> list[Tensor]:
        """Return what each tensor of an output is multiplied by, or what is added to it: (parts, its tokens, channels).

        Args:
            out: What is held.
            batch: Samples in the call: equally many for each part.

        Raises:
            ScheduleError: If the trend is for another batch or another size.
        """
        tensors = list(tensors_of(out))
        known = (batch, tensors[0].shape, tensors[0].dtype, tensors[0].device)
        if known not in self._known:
            self._check(tensors, batch)
            self._known.add(known)
        self._load(tensors, batch)
        return self._factors

    def _check(self, tensors: list[Tensor], batch: int) -> None:
        parts, tokens, channels = self._trend.shape
        fits = batch % parts == 0 and all(len(x) % batch == 0 and x.shape[-1] == channels for x in tensors)
        if not fits or sum(_tokens(x, batch) for x in tensors) != tokens:
            shapes = ", ".join(str(tuple(x.shape)) for x in tensors)
            raise ScheduleError(
                f"the schedule corrects {self._name} for {tokens} tokens of {channels} channels in {parts} parts of a "
                f"batch, but {shapes} is held for a batch of {batch}. Calibrate with the guidance and the size that "
                "are used"
            )

    def _load(self, tensors: list[Tensor], batch: int) -> None:
        """Put on the device what each tensor is multiplied by, or what is added to it."""
        if self._factors and (self._factors[0].device, self._factors[0].dtype) == (tensors[0].device, tensors[0].dtype):
            return
        whole = self._corrections.weight * torch.tensor(self._trend).float()
        if self._corrections.form == "multiply":
            whole = 1 + whole
        before = sum(factor.nbytes for factor in self._factors)
        self._factors = [
            factor.to(device=x.device, dtype=x.dtype).contiguous()
            for factor, x in zip(whole.split([_tokens(x, batch) for x in tensors], dim=1), tensors, strict=True)
        ]
        self._stats.bytes_of_corrections += sum(factor.nbytes for factor in self._factors) - before


def corrected(out: Any, factors: Sequence[Tensor], form: Form) -> Any:
    """Return an output with each of its tensors multiplied by a factor, or with it added.

    Args:
        out: A tensor, or several in tuples, lists and dictionaries; its first axis holds equally many samples for each
            part of a factor.
        factors: Of each tensor, (parts, its tokens, channels).
        form: `multiply` or `add`.
    """
    left = iter(factors)
    act = torch.mul if form == "multiply" else torch.add

    def correct(tensors: Sequence[Tensor]) -> Tensor:
        factor, (tensor,) = next(left), tensors
        if tensor.numel() == factor.numel():
            return act(tensor, factor.view(tensor.shape))
        rows = tensor.reshape(len(factor), -1, *factor.shape[1:])
        return act(rows, factor[:, None]).view(tensor.shape)

    return each([out], correct)


def _tokens(tensor: Tensor, batch: int) -> int:
    """Return how many tokens a tensor has for each sample."""
    return tensor.numel() // (batch * tensor.shape[-1])
