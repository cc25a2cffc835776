"""How much of the ideal speed-up a compiled replay reaches: `python -m benchmarks.compiled`.

The ideal takes, for the steps that are computed, the time of the compiled model without a schedule, and for the others
that of a compiled function, written by hand, which runs what is left of the model and nothing else. All variants
advance in lockstep (`benchmarks.lockstep`), and a second uncached copy shows the noise. On a GPU rows are captured as
CUDA graphs as well.
"""

import argparse
import platform
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

import dicache
from benchmarks.lockstep import Variant, in_turns
from benchmarks.loops import SHAPES, Loop, cached, head, make_model
from dicache.anatomy import survey
from dicache.calibrate.fora import Fora
from dicache.cli.command import table
from dicache.schedules import Plan, Rule, Schedule, Target
from dicache.schedules.rows import distinct_rows

Step = Callable[..., Any]  # model, latents of both halves, times, labels and what was kept -> output and what is kept


def compute_branches(
    model: Any, both: Tensor, times: Tensor, labels: Tensor
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Run the model, and return the outputs of attention and MLP of each block besides."""
    x, kept = model.pos_embed(both), []
    for block in model.transformer_blocks:
        normed, gate_attn, shift, scale, gate_mlp = block.norm1(x, times, labels, hidden_dtype=x.dtype)
        attn = block.attn1(normed)
        x = gate_attn.unsqueeze(1) * attn + x
        mlp = block.ff(block.norm3(x) * (1 + scale[:, None]) + shift[:, None])
        x = gate_mlp.unsqueeze(1) * mlp + x
        kept.append((attn, mlp))
    return head(model, x, times, labels), kept


def reuse_branches(
    model: Any, both: Tensor, times: Tensor, labels: Tensor, kept: list[tuple[Tensor, Tensor]]
) -> Tensor:
    """Run only modulation layers and gated sums."""
    x = model.pos_embed(both)
    for block, (attn, mlp) in zip(model.transformer_blocks, kept, strict=True):
        norm = block.norm1
        embedded = norm.linear(norm.silu(norm.emb(times, labels, hidden_dtype=x.dtype)))
        _, _, gate_attn, _, _, gate_mlp = embedded.chunk(6, dim=1)
        x = gate_attn.unsqueeze(1) * attn + x
        x = gate_mlp.unsqueeze(1) * mlp + x
    return head(model, x, times, labels)


def compute_body(model: Any, both: Tensor, times: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Run the model, and return the change that all blocks make together besides."""
    x = into = model.pos_embed(both)
    for block in model.transformer_blocks:
        x = block(x, timestep=times, class_labels=labels)
    return head(model, x, times, labels), x - into


def skip_body(model: Any, both: Tensor, times: Tensor, labels: Tensor, kept: Tensor) -> Tensor:
    """Run no block."""
    return head(model, model.pos_embed(both) + kept, times, labels)


CAPTURED = ", CUDA graphs"
BY_HAND: dict[str, tuple[Step, Step]] = {
    "FORA N=2": (compute_branches, reuse_branches),
    "body skip N=2": (compute_body, skip_body),
}


def by_hand(model: Any, computes: str, compute: Step, reuse: Step) -> Iterator[Tensor]:
    """Sample with two compiled functions."""
    loop = Loop(model, len(computes))
    latents, kept = loop.start, None
    yield latents
    for t, letter in zip(loop.scheduler.timesteps, computes, strict=True):
        both, times = torch.cat([latents, latents]), t.expand(2)
        if letter == "C":
            noise, kept = compute(model, both, times, loop.labels)
        else:
            noise = reuse(model, both, times, loop.labels, kept)
        latents = loop.denoise(latents, t, noise)
        yield latents


def uncached(model: Any, run: Step, steps: int) -> Iterator[Tensor]:
    """Sample with the compiled model."""
    loop = Loop(model, steps)
    yield (latents := loop.start)
    for t in loop.scheduler.timesteps:
        noise = run(torch.cat([latents, latents]), timestep=t.expand(2), class_labels=loop.labels).sample
        latents = loop.denoise(latents, t, noise)
        yield latents


@torch.no_grad()
def compared(size: str, steps: int, repetitions: int, device: str) -> list[list[str]]:
    """Return the rows of the table for one size."""
    make = partial(make_on, device, size)
    anatomy = survey(make())
    computes = "".join("C" if i % 2 == 0 else "." for i in range(steps))
    plans = {"FORA N=2": Fora(2, "start").plan(anatomy, steps), "body skip N=2": Plan(steps, (Rule("skip", computes),))}
    plain, again = make(), make()
    run, run_again = (torch.compile(model, fullgraph=True) for model in (plain, again))
    loops: dict[str, Variant] = {
        "uncached": lambda: uncached(plain, run, steps),
        "again": lambda: uncached(again, run_again, steps),
    }
    graphs: dict[str, CompileCounterWithBackend] = {}
    for name, plan in plans.items():
        schedule = Schedule("benchmark", {}, anatomy, Target(), steps, plan)
        model, hand = make(), make()
        graphs[name] = counter = CompileCounterWithBackend("inductor")
        loops[name] = partial(cached, model, steps, dicache.apply(model, schedule, compile={"backend": counter}))
        if device == "cuda":
            model = make()
            loops[f"{name}{CAPTURED}"] = partial(
                cached, model, steps, dicache.apply(model, schedule, compile="cudagraphs")
            )
        compute, reuse = (torch.compile(step, fullgraph=True) for step in BY_HAND[name])
        loops[f"{name} by hand"] = partial(by_hand, hand, computes, compute, reuse)
    counters.clear()
    seconds, last = in_turns(loops, steps, repetitions, device)
    breaks = sum(counters["graph_break"].values())
    base = seconds["uncached"].sum()
    computed = np.array([letter == "C" for letter in computes])
    rows = [[f"{size} noise", f"{base / seconds['again'].sum():.3f}", "-", "-", "-", "-", "-"]]
    for name, plan in plans.items():
        hand = f"{name} by hand"
        ideal = np.where(computed, seconds["uncached"], seconds[hand]).sum()
        for variant in (name, f"{name}{CAPTURED}"):
            if variant not in seconds:
                continue
            error = (last[variant] - last[hand]).abs().max() / last["uncached"].abs().max()
            assert error < 1e-4, f"{size}: {variant} is not what is done by hand, {error}"
            speedup, possible, written = base / seconds[variant].sum(), base / ideal, base / seconds[hand].sum()
            counted = f"{graphs[name].frame_count} of {distinct_rows(plan, anatomy)}"
            figures = [f"{speedup:.2f}", f"{possible:.2f}", f"{speedup / possible:.3f}", f"{speedup / written:.3f}"]
            rows.append([f"{size} {variant}", *figures, counted, str(breaks)])
    return rows


def make_on(device: str, size: str) -> Any:
    return make_model(*SHAPES[size]).to(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--sizes", nargs="+", choices=list(SHAPES), default=["small", "medium"])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for size in options.sizes:
        repetitions = max(5, options.repetitions // (3 if size == "medium" else 1))
        rows += compared(size, options.steps, repetitions, options.device)
    columns = ["", "speed-up", "ideal", "of ideal", "of by hand", "graphs of rows", "breaks"]
    device = torch.cuda.get_device_name() if options.device == "cuda" else "one thread of the CPU, no GPU"
    machine = f"{platform.processor() or platform.machine()}, {device}"
    text = (
        f"{machine}, torch {torch.__version__}, diffusers {diffusers.__version__}, inductor, "
        f"{options.steps} steps, every second computed; speed-ups over the compiled model without a schedule\n"
        f"{table(columns, rows)}\n"
    )
    if options.device == "cpu":
        text += "Not measured: CUDA graphs, since there was no CUDA device.\n"
    print(text)  # noqa: T201
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "compiled.txt").write_text(text)


if __name__ == "__main__":
    main()
