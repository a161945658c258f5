"""The pages as a site: sphinx-build -W docs build/docs."""

project = "qlab"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["README.md"]  # index.rst includes it
myst_heading_anchors = 3
suppress_warnings = ["myst.xref_missing"]  # links to files outside docs/; tests check every link
autodoc_member_order = "alphabetical"
autodoc_typehints = "signature"
napoleon_numpy_docstring = False
html_title = "qlab"
html_theme_options = {"page_width": "1100px"}
