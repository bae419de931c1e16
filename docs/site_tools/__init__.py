"""What the documentation adds to Sphinx: formulas as MathML, docstrings as they are written here, generated parts."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sphinx.application import Sphinx


def setup(app: Sphinx) -> dict[str, bool]:
    from site_tools import directives, docstrings, mathml  # these need Sphinx, what they call does not

    for part in (mathml, docstrings, directives):
        part.setup(app)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
