"""Sphinx's settings for the documentation: ``python -m sphinx -W --keep-going docs build/docs``.

Builds and reads offline: no font, script or picture is fetched, formulas become MathML while building.
"""

import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS))  # site_tools is the extension; what is documented is the installed package

from rlvr_fast import __version__  # noqa: E402

project = "rlvr_fast"
author = "the rlvr_fast authors"
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode",
              "site_tools"]
# Tables that programs write, for a page to show: Markdown without a title.
fragments = [str(path.relative_to(DOCS)) for path in sorted(DOCS.glob("*/*.md"))
             if path.read_text(encoding="utf-8").lstrip().startswith("|")]
exclude_patterns = ["README.md", "site_tools", "_static", *fragments]

myst_enable_extensions = ["attrs_block", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
html_math_renderer = "mathml"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_inherit_docstrings = False
autodoc_default_options = {"members": True}
napoleon_numpy_docstring = False
# Attributes are named several at a time, which are no targets; what is returned is prose, not "type: description".
napoleon_custom_sections = [("Attributes", "params_style"), "Returns"]

# Adapters are described without their frameworks.
autodoc_mock_imports = ["openrlhf", "skyrl", "transformers", "trl", "verl"]

html_theme = "furo"
html_title = f"rlvr_fast {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False
pygments_style = "friendly"
pygments_dark_style = "monokai"
