"""What schedules did on real runs of the model: achieved against planned, and images beside the uncached ones."""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dicache.evaluate.evaluation import Replayed, reference_run, replay
from dicache.evaluate.quality import psnr, ssim
from dicache.figures.report.maps import OF_STEPS, Axis, kinds_legend, strip
from dicache.figures.report.markup import Markup, element
from dicache.figures.report.plots import Section, figure, section, table
from dicache.models.sampling import Sampling
from dicache.schedules import Schedule

LARGEST = 512 * 512  # pixels; larger images are shown smaller
LOSSLESS = 128 * 128  # up to which an image is kept bit for bit, and each pixel drawn as a square
QUALITY = 92  # of WebP above it, whose marks are far below those of a cache
SMALL, USUAL = 150, 300  # pixels of the page that an image is high, about
MOST_FRAMES = 4  # of a video, evenly spread and side by side


@dataclass(frozen=True)
class Ran:
    """What a model made of some conditions and seeds, uncached and with schedules.

    Attributes:
        conditions: Prompts or classes, one an image.
        seeds: One for each condition.
        uncached: Images in [0, 1], shape (n, h, w, 3), or (n, frames, h, w, 3).
        cached: By schedule, in the order of the report.
    """

    conditions: Sequence[str]
    seeds: Sequence[int]
    uncached: np.ndarray
    cached: Sequence[Replayed]


def run(
    pipeline: Any,
    schedules: Sequence[tuple[str, Schedule]],
    conditions: Sequence[str],
    seeds: Sequence[int],
    sampling: Sampling,
) -> Ran:
    """Run a pipeline uncached and with each schedule.

    Raises:
        ScheduleError: If a schedule does not fit the pipeline as it is called.
    """
    uncached = reference_run(pipeline, conditions, seeds, sampling)
    cached = [replay(pipeline, name, each, conditions, seeds, sampling) for name, each in schedules]
    return Ran(conditions, seeds, uncached.images, cached)


def achieved(named: Sequence[tuple[str, Schedule]], ran: Ran) -> Section:
    """Return the numbers planned and achieved, and at which steps all was computed."""
    rows = []
    strips = []
    for place, ((name, schedule), replayed) in enumerate(zip(named, ran.cached, strict=True)):
        images = replayed.trajectory.images
        decibels, alike = psnr(images, ran.uncached), ssim(images, ran.uncached)
        counts = [np.mean([row.count("C") for row in passes.values()]) for passes in replayed.steps_each]
        spread = "" if min(counts) == max(counts) else f" ({min(counts):g} to {max(counts):g})"
        planned = schedule.macs_fraction() if schedule.foreseen else math.nan
        rows.append(
            (
                name,
                (
                    "-" if math.isnan(planned) else f"{planned:.3f}",
                    f"{replayed.macs_fraction:.3f}",
                    _planned_steps(schedule),
                    f"{np.mean(counts):.4g}{spread}",
                    f"{decibels.mean():.1f}",
                    f"{decibels.min():.1f}",
                    f"{alike.mean():.4f}",
                ),
            )
        )
        axis, letters = _rows(schedule, replayed.steps_each)
        strips.append(strip(f"achieved-{place}", f"{name}: planned and achieved", axis, letters, kinds=OF_STEPS))
    heads = ["schedule", "MACs planned", "achieved", "full steps planned", "computed", "PSNR dB", "lowest", "SSIM"]
    told = element(
        "p",
        f"{len(ran.conditions)} images of seeds that the profile does not have. MACs: multiply-accumulates as a share "
        "of the uncached run's. A full step computes everything in a guidance pass. PSNR and SSIM: against the "
        "uncached images of the same seeds.",
    )
    numbers = table(heads, rows, caption="Planned and achieved")
    return section("achieved", "What was achieved", told, numbers, kinds_legend(OF_STEPS), *strips)


def _planned_steps(schedule: Schedule) -> str:
    """Return at how many steps all is computed; of a policy, on the average of its profile's runs."""
    if not schedule.foreseen:
        return "-"
    count = schedule.expected_steps.count("C")
    return f"{schedule.measured.get('computed_steps', count):.4g}" if schedule.adaptive else str(count)


def _rows(schedule: Schedule, steps: Sequence[Mapping[str, str]]) -> tuple[Axis, list[str]]:
    """Return what was planned and what each image got, pass by pass; images that got the same are one row."""
    rows = {"expected" if schedule.adaptive else "planned": schedule.expected_steps} if schedule.foreseen else {}
    several = len(steps[0]) > 1
    for context in steps[0]:
        of = f", {context}" if several else ""
        each = [passes[context] for passes in steps]
        if len(set(each)) == 1:
            rows[f"every image{of}"] = each[0]
        else:
            rows |= {f"image {i}{of}": letters for i, letters in enumerate(each)}
    return Axis("", list(rows), ""), list(rows.values())


def images(named: Sequence[tuple[str, Schedule]], ran: Ran) -> Section:
    """Return grids of images, a grid a schedule, each with a slider between uncached and cached."""
    uncached = [_flat(image) for image in ran.uncached]
    high, wide = uncached[0].shape[:2]
    video = f" {MOST_FRAMES} frames of each, from left to right." if ran.uncached.ndim == 5 else ""
    told = element(
        "p",
        "Left of the line each image is the uncached one, right of it the cached one of the same prompt and seed. "
        f"{_kept(high, wide)}{video}",
    )
    grids = (
        _grid(name, ran, replayed.trajectory.images, (high, wide))
        for (name, _), replayed in zip(named, ran.cached, strict=True)
    )
    # Each uncached image is on the page once, however many schedules it stands beside.
    sources = "".join(f"--uncached-{i}:url({_encoded(image)});" for i, image in enumerate(uncached))
    return section("images", "What the images look like", told, element("div", grids, style=sources))


def _grid(name: str, ran: Ran, cached: np.ndarray, size: tuple[int, int]) -> Markup:
    decibels = psnr(cached, ran.uncached)
    look = "small" if size[0] * size[1] <= LOSSLESS else ""
    pairs = []
    for i, (condition, seed, image) in enumerate(zip(ran.conditions, ran.seeds, cached, strict=True)):
        described = f"{condition}, seed {seed}: uncached, and with {name}"
        picture = element("img", src=_encoded(_flat(image)), alt=described, width=size[1], height=size[0])
        around = f"background-image:var(--uncached-{i})"
        pair = element("div", picture, element("div", class_="split"), class_="pair", style=around)
        told = element("p", element("span", condition), element("span", f"{decibels[i]:.1f} dB"), class_="under")
        pairs.append(element("div", pair, told))
    slider = element("input", type="range", min="0", max="100", value="50", aria_valuetext="50 % uncached")
    label = element("label", f"How much is shown of uncached, beside {name}", slider, class_="slider")
    least = (SMALL if look else USUAL) * max(1.0, size[1] / size[0])
    grid = element("div", pairs, class_="grid", style=f"--least:{least:.0f}px")
    return figure(f"{name} beside uncached", label, grid, class_=f"compare {look}".strip())


def _kept(high: int, wide: int) -> str:
    if high * wide <= LOSSLESS:
        return f"{wide} x {high} pixels, bit for bit."
    smaller = f", shown at {math.sqrt(LARGEST / high / wide):.0%} of their size" if high * wide > LARGEST else ""
    return f"{wide} x {high} pixels{smaller}, compressed (WebP, quality {QUALITY})."


def _flat(image: np.ndarray) -> np.ndarray:
    """Return an image, or some frames of a video side by side, (h, w, 3)."""
    if image.ndim == 3:
        return image
    some = np.unique(np.linspace(0, len(image) - 1, MOST_FRAMES).round().astype(int))
    return np.concatenate(list(image[some]), axis=1)


def _encoded(image: np.ndarray) -> str:
    """Return an image as the address of itself."""
    from PIL import Image

    picture = Image.fromarray((image.clip(0, 1) * 255).round().astype(np.uint8))
    pixels = picture.width * picture.height
    if pixels > LARGEST:
        share = math.sqrt(LARGEST / pixels)
        size = max(1, round(picture.width * share)), max(1, round(picture.height * share))
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    file = io.BytesIO()
    picture.save(file, format="WEBP", quality=QUALITY, lossless=pixels <= LOSSLESS, method=6)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"
