"""Sphinx settings: `pip install -e '.[docs]'`, then `sphinx-build docs docs/_build`."""

project = "mpicomp"
extensions = ["myst_parser"]
html_theme = "furo"
exclude_patterns = ["_build"]
