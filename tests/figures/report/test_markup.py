from dicache.figures.report.markup import element, join


def test_text_and_attributes_are_escaped_and_markup_is_not() -> None:
    made = element("p", "1 < 2 & ", element("b", "<i>"), title="\"'>", hidden=True, id=None)
    assert made == '<p title="&quot;&#x27;&gt;" hidden>1 &lt; 2 &amp; <b>&lt;i&gt;</b></p>'


def test_children_come_one_by_one_or_in_collections() -> None:
    assert element("ul", (element("li", name) for name in "ab"), class_="short") == (
        '<ul class="short"><li>a</li><li>b</li></ul>'
    )
    assert join("a>", element("br"), ["b"]) == "a&gt;<br>b"


def test_an_attribute_is_written_with_hyphens() -> None:
    assert element("div", aria_label="a", data_rows=3, for_="x") == '<div aria-label="a" data-rows="3" for="x"></div>'
