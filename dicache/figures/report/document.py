"""The page: its parts in their order, its style and its script, and the file."""

import base64
import hashlib
import os
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from dicache import __version__
from dicache.figures import FigureError
from dicache.figures.heatmap import describe
from dicache.figures.pareto import Measured
from dicache.figures.report.achieved import Ran, achieved, images
from dicache.figures.report.decided import schedules as decided
from dicache.figures.report.fit import teacache
from dicache.figures.report.front import pareto
from dicache.figures.report.markup import Markup, element, join
from dicache.figures.report.measured import blocks, model_name, provenance, similarity
from dicache.figures.report.plots import Section
from dicache.profiler import Profile
from dicache.schedules import Schedule
from dicache.schedules.replacing import replacing


def report(
    profile: Profile,
    schedules: Sequence[tuple[str, Schedule]] = (),
    *,
    file: str = "",
    measured: Measured | None = None,
    ran: Ran | None = None,
) -> str:
    """Return a page on a profile, on schedules for its model, and on what they do.

    Args:
        profile: What was measured.
        schedules: Names and schedules, in the order of the page.
        file: What the profile's file is called.
        measured: What evaluations found, as `read_series` reads it.
        ran: What the model made with the schedules, as `run` gives it.

    Raises:
        ProfileError: If the profile has no finished run, or only one step.
        FigureError: If a schedule is not for what was profiled.
    """
    check(profile, schedules)
    detail = describe(profile)
    title = f"{model_name(profile)}: what repeats from step to step"
    parts = [provenance(profile, file), similarity(profile), blocks(profile), teacache(profile, schedules)]
    if schedules:
        parts.append(decided(schedules))
    if measured is not None:
        parts.append(pareto(measured))
    if ran is not None:
        parts += [achieved(schedules, ran), images(schedules, ran)]
    return _document(title, detail, parts)


def check(profile: Profile, schedules: Sequence[tuple[str, Schedule]]) -> None:
    """Raise a FigureError if a schedule is not for what was profiled."""
    for name, schedule in schedules:
        if differences := profile.differences(schedule):
            raise FigureError(
                f"{name} was made for {'; '.join(differences)} in the profile; needed schedules for the model, the "
                "weights and the sampler that were profiled"
            )


def save(page: str, path: str | os.PathLike[str]) -> None:
    """Write a page in one go: a reader never sees a part of it."""
    with replacing(Path(path)) as part:
        part.write_text(page, encoding="utf-8")


def _document(title: str, detail: str, sections: Sequence[Section]) -> str:
    style, script = (Markup(files(__package__).joinpath(f"report.{kind}").read_text("utf-8")) for kind in ("css", "js"))
    # Nothing is fetched and no other script is run, whatever stands in the page.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", name="generator", content=f"dicache {__version__}"),
        element("title", title),
        element("style", style),
    )
    body = element(
        "body",
        element("a", "To the content", href="#content", class_="skip"),
        element("header", element("h1", title), element("p", detail), _contents(sections)),
        element("main", (each.markup for each in sections), id="content"),
        element("footer", element("p", f"Made by dicache {__version__}.")),
        element("div", class_="tip", role="status", aria_live="polite"),
        element("script", script),
    )
    return "<!doctype html>\n" + element("html", head, body, lang="en") + "\n"


def _contents(sections: Sequence[Section]) -> Markup:
    links = (element("a", each.title, href=f"#{each.id}") for each in sections)
    return element("nav", join(links), aria_label="Contents")
