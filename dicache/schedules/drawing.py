"""A plan drawn with letters: a line for blocks that are treated alike, the steps along it."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TypeVar

from dicache.anatomy.parts import block_of, branch_of, span

Row = TypeVar("Row")

INDENT = "  "
MANY = 100  # steps, from which on a number every five of them is more than the eye wants


def alike(rows: Mapping[str, Row]) -> list[tuple[str, Row]]:
    """Return neighbouring blocks that have the same row as one, branch by branch: `("attn 0-11", row)`.

    Args:
        rows: Of each site, by its key, in the order of the blocks.
    """
    lines: list[tuple[str, Row]] = []
    for branch in dict.fromkeys(branch_of(key) for key in rows):
        mine = [(block_of(key), row) for key, row in rows.items() if branch_of(key) == branch]
        for row, group in groupby(mine, key=lambda item: item[1]):
            blocks = [block for block, _ in group]
            lines.append((f"{branch} {span(blocks[0], blocks[-1])}", row))
    return lines


def against(lines: Sequence[tuple[str, tuple[str, str]]]) -> list[tuple[str, str]]:
    """Return for each pair of rows a line A, a line B, and one with a mark where they differ."""
    width = max((len(name) for name, _ in lines), default=0)
    drawn = []
    for name, (a, b) in lines:
        marks = "".join(" " if x == y else "^" for x, y in zip(a, b, strict=True))
        drawn += [(f"{name.ljust(width)} A", a), (f"{'':{width}} B", b), ("", marks)]
    return drawn


def draw(lines: Sequence[tuple[str, str]], width: int) -> str:
    """Return lines under a ruler of step numbers; where they are too long for the width, one stretch below the other.

    A number's first digit stands over its step. The stretches begin at multiples of ten and are about equally long.

    Args:
        lines: Name and a letter a step.
        width: Columns of the page.
    """
    head = "step"
    names = max(len(name) for name in (head, *(name for name, _ in lines)))
    steps = max(len(letters) for _, letters in lines)
    fits = max((width - len(INDENT) - names - 2) // 10 * 10, 10)
    stretches = -(-steps // fits) if steps > width - len(INDENT) - names - 2 else 1
    length = -(-steps // stretches)
    if stretches > 1:
        length = -(-length // 10) * 10

    def line(name: str, text: str) -> str:
        return f"{INDENT}{name.ljust(names)}  {text}".rstrip()

    drawn = []
    for start in range(0, steps, length):
        stop = min(start + length, steps)
        drawn.append([line(head, _ruler(start, stop, 10 if steps > MANY else 5))])
        drawn[-1] += [line(name, letters[start:stop]) for name, letters in lines]
    return "\n\n".join("\n".join(stretch) for stretch in drawn)


def _ruler(start: int, stop: int, every: int) -> str:
    return "".join(str(step).ljust(every) for step in range(start, stop, every))
