"""How Sphinx builds the documentation: `make docs` writes it to build/docs."""

import re
import sys
from pathlib import Path

import sphinx.application

import dicache

sys.path.insert(0, str(Path(__file__).parent / "extensions"))

project = "dicache"
author = "the authors of dicache"
release = version = dicache.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_click", "mathml"]
exclude_patterns = ["extensions", "static"]

smartquotes = False  # two dashes begin an option

html_theme = "furo"
html_title = "dicache"
html_show_sourcelink = False
html_copy_source = False
html_show_copyright = False
html_static_path = ["static"]
html_css_files = ["site.css"]
pygments_style = "friendly"
html_math_renderer = "mathml"

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

default_role = "literal"  # docstrings put code between single backticks
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_use_ivar = True  # what a class has is told once, under its docstring
napoleon_use_rtype = False


def plain(_app: object, _what: str, _name: str, _object: object, _options: object, lines: list[str]) -> None:
    """Keep what docstrings write in formulas, such as |x_i| and x_(i-k), from being read as markup."""
    for number, line in enumerate(lines):
        parts = re.split(r"(`[^`]*`)", line)
        parts[::2] = [re.sub(r"[|*]|(?<=\w)_(?!\w)", r"\\\g<0>", part) for part in parts[::2]]
        lines[number] = "".join(parts)


def setup(app: sphinx.application.Sphinx) -> None:
    app.connect("autodoc-process-docstring", plain, priority=100)  # before napoleon
