"""The report as a reader has it: in headless Chromium, from a file, without a network."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from dicache.figures.report import save
from tests.figures.report import pages

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

QUIET = ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run")


@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    driver = pytest.importorskip("playwright.sync_api", reason="playwright, which drives the browser, is not installed")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("Chromium is not installed; on Debian: apt-get install chromium")
    own = [] if os.geteuid() else ["--no-sandbox"]  # as root it refuses to start with one
    with driver.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=found, args=[*QUIET, *own])
        yield started
        started.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("report") / "report.html"
    save(pages.page(), file)
    return file


@pytest.fixture
def page(browser: "Browser", file: Path) -> "Iterator[Page]":
    """The report in a window of its own, in which nothing goes wrong and nothing is asked for elsewhere."""
    window = browser.new_context(viewport={"width": 1400, "height": 900})
    page = window.new_page()
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(file.as_uri())
    yield page
    assert wrong == []
    assert [url for url in asked if not url.startswith("data:")] == [file.as_uri()]
    window.close()


def area(page: "Page", table: str) -> Any:
    return page.locator(f'.area[data-table="{table}"]').first


def point(page: "Page", table: str, across: float, down: float) -> str:
    """Move the pointer to a place of a plot, in shares of it, and return what is told there."""
    plot = area(page, table)
    box = plot.bounding_box()
    plot.hover(position={"x": across * box["width"], "y": down * box["height"]})
    return str(page.locator(".tip").text_content())


def test_the_pointer_reads_the_value_of_the_cell_below_it(page: "Page") -> None:
    profile = pages.profile()
    block, step = 2, 4
    across, down = (step + 0.5) / pages.STEPS, (block + 0.5) / pages.BLOCKS
    cosine = np.nanmean(profile.similarity("mlp", 1)[..., step, block])
    assert point(page, "similarity-mlp-1", across, down) == f"block {block}, step {step}: {cosine:.4g}"
    delta = profile.delta_cosine[..., step, block].mean()
    assert point(page, "delta", across, down) == f"block {block}, step {step}: {delta:.4g}"
    assert point(page, "delta", 0.01, down) == f"block {block}, step 0: none"
    error = np.nanmean(profile.range_error(1, 3))
    assert point(page, "ranges", 2.5 / 3, 1.5 / 3) == f"first block 1, last block 2: {error:.4g}"
    assert point(page, "strip-0-0", 2.5 / 6, 2.5 / 3) == "mlp 1-2, step 2: output reused"
    assert point(page, "strip-1-0", 4.5 / 6, 2.5 / 3) == "block 2, step 4: block skipped, its delta added"


def test_the_pointer_reads_the_point_that_is_nearest(page: "Page") -> None:
    left, top = json.loads(area(page, "points").get_attribute("data-marks"))[1]
    told = point(page, "points", left + 0.01, top - 0.01)
    assert told == f"{pages.HOSTILE}: PSNR dB 35.0, 95 % 34.0 to 36.0, share of the MACs 0.500, speed-up -"
    x = pages.profile().relative_l1("input")[:, :, 2]
    assert f"step 3: modulated input: median {np.median(x):.3g}" in point(page, "along", 3 / 6, 0.1)


def test_the_arrow_keys_go_from_cell_to_cell(page: "Page") -> None:
    area(page, "delta").focus()
    told = page.locator(".tip")

    def press(*keys: str) -> str:
        for key in keys:
            page.keyboard.press(key)
        return str(told.text_content()).partition(":")[0]

    assert press("ArrowRight", "ArrowDown") == "block 1, step 1"
    assert press("End", "ArrowRight", "ArrowDown", "ArrowDown") == "block 2, step 5"  # and not beyond
    assert press("Home") == "block 2, step 0"
    assert press("Escape") == ""
    area(page, "along").focus()
    assert press("End") == "step 5"
    assert press("ArrowLeft") == "step 4"
    page.keyboard.press("Tab")
    assert told.text_content() == ""


def test_a_pointer_that_leaves_a_plot_does_not_hide_what_the_keys_read_in_another(page: "Page") -> None:
    point(page, "delta", 0.5, 0.5)
    area(page, "ranges").focus()
    page.mouse.move(5, 5)
    assert str(page.locator(".tip").text_content()).startswith("first block 0, last block 0: ")


def test_the_slider_uncovers_the_uncached_image_by_key_and_by_pointer(page: "Page") -> None:
    grid = page.locator(".compare").nth(1)
    slider, image, pair = grid.locator("input"), grid.locator("img").first, grid.locator(".pair").first

    def covered() -> str:
        return str(image.evaluate("image => getComputedStyle(image).clipPath"))

    assert covered() == "inset(0px 0px 0px 50%)"
    slider.focus()
    page.keyboard.press("ArrowRight")
    assert covered() == "inset(0px 0px 0px 51%)"
    assert slider.get_attribute("aria-valuetext") == "51 % uncached"
    page.keyboard.press("Home")
    assert covered() == "inset(0px 0px 0px 0%)"
    box = pair.bounding_box()
    assert box is not None
    pair.hover(position={"x": box["width"] * 0.2, "y": 5})
    page.mouse.down()
    pair.hover(position={"x": box["width"] * 0.75, "y": 5})
    page.mouse.up()
    assert covered() == "inset(0px 0px 0px 75%)"
    assert page.locator(".compare img").first.evaluate("image => getComputedStyle(image).clipPath").endswith("50%)")


def test_the_images_are_those_that_were_made(page: "Page") -> None:
    ran = pages.ran()
    pixels = """async source => {
        const image = new Image(); image.src = source; await image.decode();
        const canvas = Object.assign(document.createElement("canvas"), { width: image.width, height: image.height });
        const context = canvas.getContext("2d"); context.drawImage(image, 0, 0);
        return Array.from(context.getImageData(0, 0, image.width, image.height).data);
    }"""
    cached = page.locator(".compare img").nth(1).get_attribute("src")
    behind = page.locator(".pair").nth(1).evaluate("pair => getComputedStyle(pair).backgroundImage")
    for source, wanted in ((cached, ran.cached[0].trajectory.images[1]), (behind[5:-2], ran.uncached[1])):
        shown = np.array(page.evaluate(pixels, source)).reshape(16, 16, 4)[..., :3]
        np.testing.assert_array_equal(shown, np.round(wanted * 255))


def test_tab_goes_through_all_that_can_be_used_in_the_order_of_the_page(page: "Page") -> None:
    count = page.evaluate("""() => {
        const can = [...document.querySelectorAll("a, summary, input, [tabindex]")];
        window.order = can.filter(each => each.checkVisibility());
        return window.order.length;
    }""")
    places = []
    for _ in range(count):
        page.keyboard.press("Tab")
        places.append(page.evaluate("window.order.indexOf(document.activeElement)"))
    assert places == list(range(count))
    assert page.evaluate("window.order[0].textContent") == "To the content"


def test_every_plot_has_a_name_and_a_table_that_says_the_same(page: "Page") -> None:
    plots = page.evaluate("""() => [...document.querySelectorAll(".area")].map(area => [
        area.getAttribute("aria-label"),
        Number(area.dataset.rows || JSON.parse(area.dataset.marks).length),
        document.getElementById(area.dataset.table).tBodies[0].rows.length])""")
    assert len(plots) >= 12
    for label, marks, rows in plots:
        assert re.search(r"\w{3}.*\. Arrow keys", label)
        assert marks == rows
    # What a table is found by is there once.
    assert (
        page.evaluate("(all => all.length - new Set(all).size)([...document.querySelectorAll('[id]')].map(e => e.id))")
        == 0
    )


@pytest.mark.parametrize("width", [400, 1400])
def test_nothing_is_wider_than_the_window(page: "Page", width: int) -> None:
    page.set_viewport_size({"width": width, "height": 900})
    page.evaluate("document.querySelectorAll('details').forEach(each => (each.open = true))")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    narrowest = "Math.min(...[...document.querySelectorAll('.area')].map(each => each.getBoundingClientRect().width))"
    assert page.evaluate(narrowest) > 180  # pixels


def test_it_is_dark_where_the_reader_wants_it_dark_and_never_on_paper(page: "Page") -> None:
    paper = "getComputedStyle(document.body).backgroundColor"
    page.emulate_media(color_scheme="light")
    light = page.evaluate(paper)
    page.emulate_media(color_scheme="dark")
    assert page.evaluate(paper) != light
    page.emulate_media(color_scheme="dark", media="print")
    assert page.evaluate(paper) == light
    assert not page.locator("nav").is_visible()
    assert not page.locator("details").first.is_visible()
    assert page.locator(".area").first.is_visible()


def test_what_stands_in_files_is_text_and_is_never_run(page: "Page") -> None:
    assert page.evaluate("window.hacked") is None
    assert page.locator("section script, section [onerror]").count() == 0
    assert page.locator("#images .under span").first.text_content() == pages.HOSTILE
    assert page.locator("#provenance tbody tr td").first.text_content() == pages.HOSTILE


def test_a_script_that_is_not_its_own_is_not_run(browser: "Browser", file: Path, tmp_path: Path) -> None:
    forged = tmp_path / "forged.html"
    forged.write_text(file.read_text().replace("</main>", "<script>window.hacked = true</script></main>"))
    page = browser.new_page()
    page.goto(forged.as_uri())
    assert page.evaluate("window.hacked") is None
    page.close()
