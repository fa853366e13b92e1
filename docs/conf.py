"""Sphinx settings: `pip install -e '.[docs]'`, then `sphinx-build -W docs docs/_build`.

-W: a link that leads nowhere is an error. tests/test_docs.py finds those, too, without Sphinx.
"""

project = "mpicomp"
extensions = ["myst_parser"]
html_theme = "furo"
myst_heading_anchors = 3  # links such as step.md#loss-scaling lead to headings
exclude_patterns = ["_build"]
