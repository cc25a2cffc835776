"""What the README says of the tests is so. Its commands and examples run in tests/docs."""

from tests.docs.snippets import ROOT
from tests.pipelines.samplers import KINDS
from tests.transformers import TRANSFORMERS

README = (ROOT / "README.md").read_text()


def test_as_many_classes_and_samplers_are_tested_as_it_says() -> None:
    kinds = {tiny.kind for tiny in TRANSFORMERS.values()}
    said = " ".join(README.split())
    assert f"{len(kinds)} transformer classes of diffusers" in said
    assert f"{len(KINDS)} samplers" in said
