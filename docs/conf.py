"""How the documentation is built: ``sphinx-build -W --keep-going docs docs/_build``."""

from pygments.lexers.special import TextLexer
from sphinx.highlighting import lexers

from lightning_adalfl import __version__

lexers["mermaid"] = TextLexer()  # drawn where the pages are read in a repository, shown as text on the site

project = "lightning_adalfl"
author = "The lightning_adalfl developers"
release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "lightning_adalfl"
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_default_options = {"members": True}
# Sources that autodoc reaches through inheritance and that are not ours to mend.
suppress_warnings = ["autodoc.import_object"]
