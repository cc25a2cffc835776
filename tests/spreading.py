"""What the tests of models that are spread, over processes or over devices, have in common."""

import multiprocessing
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dicache import apply
from dicache.anatomy import Anatomy
from dicache.anatomy.inputs import Inputs
from dicache.conformance import LAWS, Subject
from dicache.schedules import Plan, Rule, Schedule, Target
from tests.profiler.test_two_models import pipeline
from tests.tiny import adaptive, arguments, first_block, flux
from tests.transformers import TRANSFORMERS

STEPS = 8
ROUNDING = 1e-4
POLICIES = {"teacache": (adaptive, 0.25), "first-block": (first_block, 0.5)}
PATIENCE = 600.0  # seconds, for all that a process has to do
Told = dict[str, Any]


def made(name: str) -> tuple[nn.Module, Inputs]:
    """Return a model, and what to call it with: context parallelism wants a tuple of it."""
    if name == "flux":  # of 16 tokens and 8 of text
        model = flux()
        return model, Inputs((), {**arguments(model), "return_dict": False})
    tiny = TRANSFORMERS[name]
    return tiny.build(), Inputs((), {**tiny.inputs().kwargs, "return_dict": False})


def replayed(model: nn.Module, schedule: Schedule, inputs: Inputs) -> tuple[str, torch.Tensor]:
    """Return what was done at each step of latents that change, in two generations, and what came of it in the last."""
    letters = ""
    with torch.no_grad(), apply(model, schedule) as cache:
        for _ in range(2):
            cache.begin_generation()
            for step in range(schedule.steps):
                cache.begin_step()
                latents = inputs.kwargs["hidden_states"]
                given = {**inputs.kwargs, "hidden_states": latents * (1 + 0.05 * step + 0.02 * step**2)}
                out = model(**given)[0]
            letters += cache.stats.steps["0"]
        return letters, out


def plan_of(anatomy: Anatomy, weights: str) -> Schedule:
    """Return a plan that reuses branches at one step and skips all blocks at another, of these weights."""
    rules = (Rule("reuse", "C.CCC.CC"), Rule("skip", "CCC.CC.C"))
    return Schedule("test", {}, anatomy, Target(weights=weights), STEPS, Plan(STEPS, rules))


def laws(model: nn.Module, inputs: Inputs, anatomy: Anatomy) -> Told:
    said = {}
    for law, check in LAWS.items():
        try:
            said[law] = "kept" if check(Subject(model, inputs, anatomy)) > 0 else "not tried"
        except Exception:
            said[law] = traceback.format_exc()
    return said


def pipeline_of_one() -> Any:
    pipe = pipeline()
    pipe.register_to_config(boundary_ratio=None)
    pipe.transformer_2 = None
    return pipe


def attempted(act: Callable[[], Told]) -> Told:
    try:
        return act()
    except Exception:
        return {"failed": traceback.format_exc()}


def in_processes(count: int, act: Callable[..., None], *args: object) -> None:
    """Do something in processes that are forked, each with its place before the other arguments."""
    fork = multiprocessing.get_context("fork")  # the parent's imports take a while
    processes = [fork.Process(target=act, args=(place, *args)) for place in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(PATIENCE)
        assert process.exitcode == 0, "a process waits for ever, or was killed"
