"""JSON documents of which one value is another."""

import copy
from typing import Any

from hypothesis import strategies as st

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(10**18), 10**18)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=6)
    | st.sampled_from(["*", "C.C.", "....", "0-999999999", "..", "../x", "skip", "mlp", "0.mlp"])
)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner))


@st.composite
def changed(draw: st.DrawFn, documents: list[Any]) -> Any:
    """Draw one of the documents with a value in it replaced, removed, or given twice."""
    document = copy.deepcopy(draw(st.sampled_from(documents)))
    holders = [document]
    for holder in holders:
        values = holder.values() if isinstance(holder, dict) else holder
        holders += [value for value in values if isinstance(value, (dict, list)) and value]
    holder = draw(st.sampled_from(holders))
    key: Any = draw(st.sampled_from(list(holder) if isinstance(holder, dict) else range(len(holder))))
    action = draw(st.sampled_from(["replace", "replace", "remove", "move"]))
    if action == "remove":
        del holder[key]
    elif action == "move":
        holder[key] = copy.deepcopy(draw(st.sampled_from(holders)))
    else:
        holder[key] = draw(VALUES)
    return document
