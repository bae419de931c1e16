"""Formulas as MathML, which browsers draw themselves: converted by docutils while building, nothing is fetched."""

from __future__ import annotations

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError


def convert(tex: str, *, block: bool) -> str:
    """LaTeX to a <math> element.

    Raises:
        ExtensionError: for a formula that docutils cannot convert; the build stops.
    """
    try:
        return tex2mathml(tex, as_block=block)
    except (MathError, SyntaxError) as error:
        raise ExtensionError(f"formula {tex!r}: {error}") from error


def _visit(translator, node: nodes.math) -> None:
    translator.body.append(convert(node.astext(), block=False))
    raise nodes.SkipNode


def _visit_block(translator, node: nodes.math_block) -> None:
    translator.body.append(f'<div class="math-block">{convert(node.astext(), block=True)}</div>\n')
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    app.add_html_math_renderer("mathml", (_visit, None), (_visit_block, None))
