"""How much of the ideal speed-up a schedule reaches, and other projects' caches: `python -m benchmarks.replay`.

Ideal is what the steps that a variant computes take unhooked, and its other steps in a loop written by hand that truly
skips the work (`benchmarks.loops`). A second unhooked model shows the noise. What is compared with one another runs in
lockstep, in one process: in the peers' environment, which is made on first use (`benchmarks.peers`).
"""

import argparse
import json
import logging
import os
import platform
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch

import dicache
from benchmarks import peers
from benchmarks.lockstep import Measured, Variant, held, measure
from benchmarks.loops import SHAPES, body_by_hand, branches_by_hand, cached, make_model, plain
from dicache.anatomy import survey
from dicache.calibrate.fora import Fora
from dicache.cli.command import table
from dicache.schedules import Corrections, Plan, Rule, Schedule, Target
from dicache.schedules.corrections import name_of

# name: layers, heads, width, tokens a side, steps, share of the repetitions
PACE = {"medium": (6, 0.5)}  # steps, and share of the repetitions
SIZES = {name: (*shape, *PACE.get(name, (18, 1.0))) for name, shape in SHAPES.items()}
USUAL = ("noop", "digits", "small", "medium")
PLAIN, AGAIN, HAND, EOC = "unhooked", "unhooked again", "by hand", "dicache EOC on FORA N=2"
COLUMNS = ["", "computed", "time / unhooked", "speed-up", "ideal", "achieved / ideal", "held", "held after"]


class Bench:
    """One size: makes the models, each variant one of its own, and what runs on them."""

    def __init__(self, size: str, steps: int | None, device: str, with_peers: bool) -> None:
        *shape, usual, self.share = SIZES[size]
        self.shape: tuple[int, ...] = tuple(int(x) for x in shape)
        self.size, self.device, self.with_peers = size, device, with_peers
        self.steps = steps or int(usual)
        self.anatomy = survey(self.model())
        _, _, width, side = self.shape
        self.activation = 2 * side**2 * width * 4  # bytes of one of a guided pass

    def model(self) -> Any:
        return make_model(*self.shape).to(self.device)

    def schedule(self, plan: Plan) -> Schedule:
        return Schedule("benchmark", {}, self.anatomy, Target(), self.steps, plan)

    def ours(self, schedule: Schedule) -> Variant:
        model = self.model()
        return partial(cached, model, self.steps, dicache.apply(model, schedule))

    def beside(self, which: str, interval: int | None = None) -> dict[str, Variant]:
        """Return the loops of the peers, empty where they are not installed."""
        if not self.with_peers:
            return {}
        from benchmarks import attached

        make = getattr(attached, which)
        found = make() if interval is None else make(interval)
        name = "{}" if interval is None else f"{{}} N={interval}"
        return {
            name.format(peer): partial(attached.loop, self.model(), self.steps, attach)
            for peer, attach in found.items()
        }

    def unhooked(self) -> dict[str, Variant]:
        return {name: partial(plain, self.model(), self.steps) for name in (PLAIN, AGAIN)}

    def computing(self) -> dict[str, Variant]:
        return {
            **self.unhooked(),
            "dicache": self.ours(self.schedule(Plan(self.steps))),
            **self.beside("computing"),
        }

    def branches(self) -> dict[str, Variant]:
        plans = {n: self.schedule(Fora(n, "start").plan(self.anatomy, self.steps)) for n in (2, 3)}
        _, _, width, side = self.shape
        return {
            **self.unhooked(),
            HAND: partial(branches_by_hand, self.model(), self.steps, letters(2, self.steps)),
            **{f"dicache N={n}": self.ours(schedule) for n, schedule in plans.items()},
            EOC: self.ours(corrected(plans[2], tokens=side**2, width=width)),
            **self.beside("branches", 2),
            **self.beside("branches", 3),
        }

    def bodies(self) -> dict[str, Variant]:
        computes = letters(2, self.steps)
        return {
            **self.unhooked(),
            HAND: partial(body_by_hand, self.model(), self.steps, computes),
            "dicache N=2": self.ours(self.schedule(Plan(self.steps, (Rule("skip", computes),)))),
            **self.beside("bodies", 2),
        }

    def workloads(self) -> Iterator[tuple[str, dict[str, Variant]]]:
        yield "everything computed", self.computing()
        yield "attention and MLP", self.branches()
        yield "body", self.bodies()


def letters(interval: int, steps: int) -> str:
    """Return a letter a step, `C` for each `interval`th one from the first on."""
    return "".join("C" if step % interval == 0 else "." for step in range(steps))


def corrected(base: Schedule, *, tokens: int, width: int) -> Schedule:
    """Return a schedule with a correction of every output that it holds, both halves of the batch apart."""
    table = base.table()
    sites = {key: row.replace("R", ".") for key, row in table.items()}
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name_of("0", key, step): torch.randn(2, tokens, width, generator=generator).mul_(0.01).numpy()
        for key, row in table.items()
        for step, letter in enumerate(row)
        if letter == "R"
    }
    return replace(base, corrections=Corrections("multiply", 0.01, {"0": 2}, sites, tensors))


def check(what: str, found: Mapping[str, Measured]) -> None:
    """Refuse figures of a replay that is not what is done by hand."""
    want = found[HAND if HAND in found else PLAIN].latents
    ours = found["dicache" if "dicache" in found else "dicache N=2"].latents
    difference = (ours - want).abs().max() / found[PLAIN].latents.abs().max()
    assert difference < (1e-4 if HAND in found else 1e-30), f"{what}: {difference} from what is done by hand"


def ideal(variant: Measured, found: Mapping[str, Measured]) -> float:
    """Return the seconds of the steps that a variant computes, unhooked, and of its others, by hand."""
    cheap = variant.letters.count(".")
    return variant.letters.count("C") * found[PLAIN].mean("C") + (cheap * found[HAND].mean(".") if cheap else 0)


def rows(bench: Bench, what: str, found: Mapping[str, Measured], loops: Mapping[str, Variant]) -> list[dict[str, Any]]:
    """Return a record for each variant; bytes held are those between steps that the unhooked loop does not hold."""
    base = found[PLAIN].total
    memory = {name: held(loop) for name, loop in loops.items()}
    most, after = memory[PLAIN]
    made: list[dict[str, Any]] = []
    for name, one in found.items():
        record = {
            "size": bench.size,
            "workload": what,
            "variant": name,
            "letters": one.letters,
            "seconds": one.seconds.tolist(),
            "ratio": one.total / base,
            "held": (memory[name][0] - most) / bench.activation,
            "held_after": (memory[name][1] - after) / bench.activation,
        }
        if "." in one.letters:
            record |= {"ideal_seconds": ideal(one, found), "achieved": ideal(one, found) / one.total}
        made.append(record)
    return made


def line(record: Mapping[str, Any], base: float) -> list[str]:
    """Return a row of the table."""
    letters, cheap = record["letters"], "achieved" in record
    return [
        f"  {record['variant']}",
        f"{letters.count('C')}/{len(letters)}",
        f"{record['ratio']:.3f}",
        f"{1 / record['ratio']:.2f}" if cheap else "-",
        f"{base / record['ideal_seconds']:.2f}" if cheap else "-",
        f"{record['achieved']:.3f}" if cheap else "-",
        f"{record['held']:.1f}",
        f"{record['held_after']:.1f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(USUAL))
    parser.add_argument("--workloads", nargs="+", help="words of those to run [default: all]")
    parser.add_argument("--steps", type=int, help="[default: 18, medium 6]")
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--without-peers", action="store_true")
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    if not options.without_peers and Path(sys.prefix) != peers.ENVIRONMENT:
        os.execv(peers.python(), [str(peers.python()), "-m", "benchmarks.replay", *sys.argv[1:]])
    logging.disable(logging.INFO)  # of cache-dit, which tells of every attachment
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    records, lines = [], []
    for size in options.sizes:
        bench = Bench(size, options.steps, options.device, not options.without_peers)
        repetitions = max(3, round(options.repetitions * bench.share))
        for what, loops in bench.workloads():
            if options.workloads and not any(word in what for word in options.workloads):
                continue
            found = measure(loops, bench.steps, repetitions, options.device)
            check(f"{size}, {what}", found)
            made = rows(bench, what, found, loops)
            lines.append([f"{size}: {what}", *[""] * (len(COLUMNS) - 1)])
            lines += [line(record, found[PLAIN].total) for record in made]
            records += made
            write(options, lines, records)  # after each, as all of them take a while
    print((options.output / "replay.txt").read_text())  # noqa: T201


def write(options: argparse.Namespace, lines: list[list[str]], records: list[dict[str, Any]]) -> None:
    """Write what has been measured so far, as a table for people and as records for machines."""
    device = torch.cuda.get_device_name() if options.device == "cuda" else "one thread of the CPU, no GPU"
    machine = (
        f"{platform.processor() or platform.machine()}, {device}, torch {torch.__version__}, "
        f"diffusers {diffusers.__version__}"
    )
    text = (
        f"{machine}\nMedians of {options.repetitions} interleaved repetitions ({max(3, options.repetitions // 2)} of "
        f"medium). Memory in activations.\n{table(COLUMNS, lines)}\n"
    )
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "replay.txt").write_text(text)
    (options.output / "replay.json").write_text(json.dumps({"machine": machine, "records": records}, indent=2) + "\n")


if __name__ == "__main__":
    main()
