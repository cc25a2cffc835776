"""The colours of all pictures: the same method, and the same kind of branch, has one colour everywhere.

Okabe and Ito's, which all kinds of colour vision tell apart; where two things share one, their lines or markers differ.
"""

from typing import Any

INK, MUTED = "#222222", "#595959"
BLUE, ORANGE, GREEN = "#0072b2", "#d55e00", "#009e73"
AMBER, SKY, PURPLE, OLIVE = "#e69f00", "#56b4e9", "#cc79a7", "#8a8a00"  # olive for their yellow, too light on white
WINE = "#882255"  # of Tol's, told apart from all of them
LIGHT_BLUE = "#a9d3ee"  # BLUE for what is reused
GRID, FRONT = "#dddddd", "#d9d9d9"
PAPER, HATCH, HATCH_INK = "#ededed", "////", "#b5b5b5"  # cells without a value
COLOURS = "viridis"  # perceptually uniform, and monotone in lightness for all kinds of colour vision

# By what a name holds, the first that fits: what is the same method here and elsewhere has one colour.
METHODS = (
    (("eoc",), WINE),  # before the method that it corrects
    (("dpm-solver",), MUTED),
    (("auto", "forecast", "dp,"), ORANGE),
    (("scm", "mask"), SKY),
    (("dbcache", "first-block", "firstblock"), GREEN),
    (("taylor",), BLUE),
    (("magcache", "teacache", "adacache"), AMBER),
    (("fora", "smoothcache", "pab", "t-gate", "tgate"), PURPLE),
    (("delta",), OLIVE),
    (("uncached", " steps"), INK),
)
BRANCHES = {"attn": BLUE, "joint_attn": BLUE, "cross_attn": GREEN, "mlp": ORANGE, "fused": PURPLE, "conv": OLIVE}

# Of things that are of no method, one after another: a colour, and a line that differs without colours too.
LINES = (
    (BLUE, "-"),
    (ORANGE, "--"),
    (GREEN, "-."),
    (PURPLE, ":"),
    (AMBER, (0, (5, 1, 1, 1, 1, 1))),
    (SKY, (0, (1, 1))),
)


def method_colour(name: str) -> str | None:
    """Return the colour of the method that a name, such as `teacache-1.8x` or `diffusers PAB`, tells of, or None."""
    lower = name.lower()
    return next((colour for words, colour in METHODS if any(word in lower for word in words)), None)


def line_of(name: str, place: int) -> dict[str, Any]:
    """Return colour and style of the line of a thing, by the method that its name tells of, and its place among others.

    Things of one method have one colour, and differ in the style.
    """
    colour, style = LINES[place % len(LINES)]
    return {"color": method_colour(name) or colour, "linestyle": style, "linewidth": 1.8}


def branch_colour(branch: str) -> str:
    """Return the colour of a kind of branch: `mlp`, or `mlp.context` of the other stream."""
    return BRANCHES[branch.partition(".")[0]]
