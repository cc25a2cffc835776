"""Loops that advance side by side, so that whatever else the machine does falls on all of them alike.

Every variant is a generator that yields when it is ready and after each denoising step. They take turns, one step each
in rotating order, on the thread's CPU clock or, on a GPU, between events of the device. Of a step the median over
repetitions counts.
"""

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dicache.anatomy.macs import TOTAL, MacCounter

Variant = Callable[[], Iterator[Tensor]]


@dataclass(frozen=True)
class Measured:
    """What a variant took and gave.

    Attributes:
        seconds: Of each step.
        letters: A letter a step: `C` if most of the uncached step's multiply-accumulates were done, else `.`.
        latents: What it ended with.
    """

    seconds: np.ndarray
    letters: str
    latents: Tensor

    @property
    def total(self) -> float:
        return float(self.seconds.sum())

    def mean(self, letter: str) -> float:
        """Return the mean seconds of its steps of one kind."""
        return float(self.seconds[[found == letter for found in self.letters]].mean())


@torch.no_grad()
def measure(loops: Mapping[str, Variant], steps: int, repetitions: int, device: str) -> dict[str, Measured]:
    """Run all variants; the first of them is the uncached one that the others' work is compared with."""
    seconds, last = in_turns(loops, steps, repetitions, device)
    work = {name: macs(loop) for name, loop in loops.items()}
    half = next(iter(work.values()))[0] / 2
    letters = {name: "".join("C" if each > half else "." for each in found) for name, found in work.items()}
    return {name: Measured(seconds[name], letters[name], last[name]) for name in loops}


@torch.no_grad()
def in_turns(
    loops: Mapping[str, Variant], steps: int, repetitions: int, device: str
) -> tuple[dict[str, np.ndarray], dict[str, Tensor]]:
    """Return the median seconds of each step of each variant, (steps,), and its last latents."""
    names = list(loops)
    taken = np.zeros((repetitions, len(names), steps))
    last: dict[str, Tensor] = {}
    for repetition in tqdm(range(-1, repetitions), leave=False):  # the first one compiles what is to be compiled
        running = [loops[name]() for name in names]
        for loop in running:
            next(loop)
        for step in range(steps):
            for turn in range(len(names)):
                place = (repetition + step + turn) % len(names)
                spent, last[names[place]] = timed(running[place], device)
                if repetition >= 0:
                    taken[repetition, place, step] = spent
        for loop in running:
            assert next(loop, None) is None
    return dict(zip(names, np.median(taken, axis=0), strict=True)), last


def timed(loop: Iterator[Tensor], device: str) -> tuple[float, Tensor]:
    """Return the seconds that the next step takes, and its latents."""
    if device == "cpu":
        start = time.thread_time()
        latents = next(loop)
        return time.thread_time() - start, latents
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    latents = next(loop)
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000, latents


def macs(variant: Variant) -> list[float]:
    """Return the multiply-accumulates of each step."""
    loop = variant()
    found: list[float] = []
    next(loop)
    while True:
        counter = MacCounter()
        with counter:
            if next(loop, None) is None:
                return found
        found.append(float(counter.macs[TOTAL]))


@torch.no_grad()
def held(variant: Variant) -> tuple[int, int]:
    """Return the most bytes of tensors that are alive between its steps, and those that are after the last one.

    Neither what was alive before it began is counted, nor the latents.
    """
    gc.collect()
    gc.freeze()  # what is there is not looked at again
    found = [alive() - latents.nbytes for latents in variant()]
    gc.unfreeze()
    return max(found), found[-1]


def alive() -> int:
    """Return the bytes of all tensors that Python has made since it was frozen; views of one storage count once."""
    gc.collect()
    storages = {}
    for one in gc.get_objects():
        if issubclass(type(one), Tensor):
            storage = one.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
