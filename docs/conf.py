"""How the documentation is built: ``sphinx-build -W --keep-going docs docs/_build``."""

from lightning_adalfl import __version__

project = "lightning_adalfl"
author = "The lightning_adalfl developers"
release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "lightning_adalfl"
html_static_path = ["_static"]
html_css_files = ["cards.css"]
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_default_options = {"members": True}
# Sources that autodoc reaches through inheritance and that are not ours to mend.
suppress_warnings = ["autodoc.import_object"]
