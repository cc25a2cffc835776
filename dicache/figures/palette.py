"""The colours of methods: one method looks the same in every figure."""

from dicache.figures.page import BLUE, GREEN, INK, MUTED, ORANGE

AMBER, SKY, PURPLE, OLIVE = "#e69f00", "#56b4e9", "#cc79a7", "#8a8a00"  # Okabe and Ito's others; olive for their yellow
# By what a name holds, the first that fits: what is the same method here and elsewhere has one colour.
FAMILIES = (
    (("uncached", "fewer steps", " steps"), INK),
    (("dpm-solver",), MUTED),
    (("auto", "forecast", "dp"), ORANGE),
    (("scm", "mask"), SKY),
    (("dbcache", "first-block", "firstblock"), GREEN),
    (("taylor",), BLUE),
    (("magcache", "teacache", "adacache"), AMBER),
    (("fora", "smoothcache", "pab", "t-gate", "tgate"), PURPLE),
    (("delta",), OLIVE),
)


def colour_of(name: str) -> str | None:
    """Return the colour of the method that a name tells of, or None if it tells of none."""
    name = name.lower()
    return next((color for words, color in FAMILIES if any(word in name for word in words)), None)
