"""Every command and example of the README and of docs/ runs, or says why it cannot."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from dicache.cli.calibrate import calibrate
from tests.docs.snippets import (
    FENCE,
    LANGUAGES,
    PAGES,
    ROOT,
    Snippet,
    SnippetError,
    check_names,
    parse,
    run,
    snippets,
    spans,
)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_snippets_of_a_page_run_in_their_order(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / ".cache"))
    monkeypatch.setenv("COLUMNS", "110")  # as wide as the pages, so that no table is folded
    names: dict[str, Any] = {"__name__": "__main__"}
    for snippet in snippets(page):
        try:
            run(snippet, names)
        except Exception as error:
            error.add_note(f"in {snippet.where}")
            raise


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_shows_is_of_a_kind_that_is_checked(page: Path) -> None:
    for snippet in snippets(page):
        assert snippet.language in LANGUAGES or snippet.language.startswith("{"), snippet.where
        if snippet.language == "json":
            json.loads(snippet.text)
    indented = re.search(
        r"^ {4,}(\$ )?(dicache|import dicache|torchrun) ?.*", FENCE.sub("", page.read_text()), re.MULTILINE
    )
    assert not indented, f"put it between fences: {indented[0]}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_in_running_text_are_there(page: Path) -> None:
    for words in spans(page):
        check_names(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", FENCE.sub("", page.read_text())):
        assert (page.parent / link).exists(), link


def test_every_method_has_its_place_among_the_methods() -> None:
    page = (ROOT / "docs" / "methods.md").read_text()
    assert [name for name in calibrate.commands if f"| [`{name}`](#" not in page] == []


def test_every_result_is_told_of_on_their_page() -> None:
    page = (ROOT / "docs" / "results.md").read_text()
    results = [path.name for path in (ROOT / "benchmarks" / "results").glob("*.txt")]
    assert [name for name in results if f"results/{name})" not in page] == []


def test_output_is_compared_but_for_numbers() -> None:
    shown = "$ dicache cost --model dit --steps 20\ndit: 50 steps, 2 passes a step, 512 x 512\n"
    run(Snippet("page:1", "console", shown), {})
    with pytest.raises(SnippetError, match="Bungled"):
        run(Snippet("page:1", "console", "$ dicache models\nBungled:\n"), {})


@pytest.mark.parametrize(
    "words",
    [
        ["profil", "--model", "digits"],
        ["profile", "--model", "digits", "--step", "20"],
        ["calibrate", "fora", "--interval", "two"],
        ["calibrate", "auto", "--speedup", "2"],
    ],
)
def test_what_is_no_command_is_refused(words: list[str]) -> None:
    with pytest.raises(SnippetError):
        parse(words)
