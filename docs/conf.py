"""Sphinx: `make docs` builds the pages of this folder and the API reference from docstrings into build/docs."""

import re

import miras_kernels

project = "miras-kernels"
author = copyright = "The miras-kernels authors"
release = miras_kernels.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
myst_fence_as_directive = ["math"]  # as GitHub writes display formulas

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_class_signature = "separated"

html_theme = "furo"
html_title = "miras-kernels"

REPOSITORY = "https://github.com/miras-kernels/miras-kernels/blob/main/"


def link_to_repository(app, docname, source):
    """Links to files that are not pages of the site lead to the repository."""
    source[0] = re.sub(r"\]\((?:\.\./)?((?:kernels/|bench/|CONTRIBUTING)[^)]*)\)", rf"]({REPOSITORY}\1)", source[0])


def setup(app):
    app.connect("source-read", link_to_repository)
    app.connect("include-read", lambda app, path, docname, source: link_to_repository(app, docname, source))
