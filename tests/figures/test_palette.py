from matplotlib.colors import to_rgb

from dicache.anatomy.parts import BRANCHES
from dicache.figures.palette import AMBER, METHODS, branch_colour, method_colour


def luminance(colour: str) -> float:
    """WCAG 2's relative luminance."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_a_method_has_one_colour_whoever_runs_it_and_at_whatever_setting() -> None:
    assert method_colour("teacache-1.8x") == method_colour("TeaCache") == AMBER
    assert (
        method_colour("diffusers FirstBlockCache") == method_colour("first-block") == method_colour("cache-dit DBCache")
    )
    assert method_colour("deep blocks") is None


def test_all_methods_and_branches_can_be_seen_on_white() -> None:
    colours = [colour for _, colour in METHODS] + [branch_colour(branch) for branch in BRANCHES]
    assert min(1.05 / (luminance(colour) + 0.05) for colour in colours) > 2
    assert branch_colour("mlp.context") == branch_colour("mlp")
