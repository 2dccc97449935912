# SPDX-License-Identifier: Apache-2.0
"""Settings of Sphinx: `make docs` builds the pages and the API reference into out/docs.

The sources are the whole checkout, so that links to README.md and other files work as they do on
the web page of the repository. Unknown links and names are warnings, and `-W` makes them errors.
"""

import re
from pathlib import Path
from typing import Any

import distorch

project = "distorch"
author = "the distorch developers"
version = release = distorch.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "docs/README"
include_patterns = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "docs/*.md"]
html_theme = "furo"
html_title = f"distorch {release}"

myst_heading_anchors = 3
nitpicky = True
# Types of others, which have no page here.
nitpick_ignore_regex = [("py:.*", r"(?!distorch\.).*")]
# What pictures and timelines are made of: their docstrings say it.
nitpick_ignore = [
    ("py:class", "distorch.display.picture.Rect"),
    ("py:class", "distorch.display.picture.Text"),
]

smartquotes = False  # quotes in docstrings are those of Python
html_copy_source = False
default_role = "code"  # `name` in docstrings
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the signature has them
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

_CAPTIONS = ("Use it", "Look it up")


def setup(app: Any) -> None:
    """Sphinx calls this."""
    app.connect("source-read", _add_contents)
    app.connect("build-finished", _add_start)


def _add_contents(app: Any, page: str, source: list[str]) -> None:
    """The tables of docs/README.md are the contents of the site: its menu is made of them."""
    if page != root_doc:
        return
    for caption in _CAPTIONS:
        table = source[0].split(f"## {caption}\n")[1].split("\n## ")[0]
        pages = re.findall(r"^\| \[.*?\]\((\w[\w-]*)\.md\)", table, re.MULTILINE)
        entries = "\n".join(pages)
        source[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{entries}\n```\n"
    beside = "../README\n../CHANGELOG\n../CONTRIBUTING\n../SECURITY"
    source[0] += f"\n```{{toctree}}\n:hidden:\n\n{beside}\n```\n"


def _add_start(app: Any, error: Exception | None) -> None:
    """The site begins at docs/README.html, because its sources are the whole checkout."""
    if error is None:
        to = f"{root_doc}.html"
        page = f'<meta http-equiv="refresh" content="0; url={to}"><a href="{to}">distorch</a>\n'
        (Path(app.outdir) / "index.html").write_text(page)
