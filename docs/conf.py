"""Sphinx settings: `.venv/bin/python -m sphinx -W docs docs/_build` makes the pages.

-W: whatever Sphinx complains of is an error. The api-*.md pages take signatures and docstrings from
the package, which must therefore be importable. Docstrings are plain text; `as_rst` translates it.
"""

import inspect
import re

project = "mpicomp"
extensions = ["myst_parser", "sphinx.ext.autodoc"]
html_theme = "furo"
myst_heading_anchors = 3  # links such as step.md#loss-scaling lead to headings
exclude_patterns = ["_build"]
smartquotes = False  # "text" is what is typed
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 76

ROW = re.compile(r"([\w*]\S*(?: \S+)*)  +(?=\S)")  # a name, two spaces or more, what it is


def setup(app):
    app.connect("autodoc-process-docstring", translate)


def translate(app, what, name, obj, options, lines):
    """Sphinx's event: put the reStructuredText of a docstring in the place of its lines."""
    try:
        parameters = set(inspect.signature(obj).parameters)
    except (TypeError, ValueError):
        parameters = set()
    lines[:] = as_rst(lines, parameters)


def as_rst(lines, parameters=frozenset()):
    """Plain text as reStructuredText: paragraphs, tables of two columns, and what is indented.

    A table whose names are all `parameters` becomes their description.
    """
    blocks = re.split(r"\n(?: *\n)+", "\n".join(lines).strip("\n"))
    out, before = [], ""
    for block in blocks:
        kind, text = _block(block.split("\n"), parameters)
        if kind == "literal" and before != "literal":
            out += ["::", ""]
        out, before = [*out, *text, ""], kind
    return out


def _block(lines, parameters):
    """(kind, lines of reStructuredText) of lines without an empty one between them."""
    if lines[0].startswith(" "):
        return "literal", lines
    if not ROW.match(lines[0]):
        return "paragraph", [_inline(" ".join(lines))]
    rows = []
    for line in lines:
        if match := ROW.match(line):
            rows.append([match[1], line[match.end():]])
        else:
            rows[-1][1] += " " + line.strip()
    if parameters.issuperset(name for name, _ in rows):
        return "table", [f":param {name}: {_inline(text)}" for name, text in rows]
    return "table", [line for name, text in rows
                     for line in (f"``{name}``", f"    {_inline(text)}")]


def _inline(text):
    """`code` as ``code``; nothing else means more than itself."""
    parts = re.split(r"`([^`]+)`", text)
    return "".join(f"``{part}``" if number % 2 else re.sub(r"([\\*_|`])", r"\\\1", part)
                   for number, part in enumerate(parts))
