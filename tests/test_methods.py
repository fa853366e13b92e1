"""`mpicomp methods` and docs/methods.md: all seven, their sources, and nothing made up."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from mpicomp import cli, method, nn, variants
from mpicomp.catalogue import METHODS, common_options, exchange_options
from mpicomp.compressors.registry import find
from mpicomp.kernels import reference
from mpicomp.variants import SEVEN

DOCS = (Path(__file__).parent.parent / "docs" / "methods.md").read_text()
SECTIONS = dict(re.findall(r"^## [^\n]*`(\w+)`\n(.*?)(?=^## )", DOCS, re.DOTALL | re.MULTILINE))


def test_the_seven_come_first_with_their_sources(capsys):
    assert cli.main(["methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    heads = [line.split()[0] for line in lines if line[:1].islower()]
    assert heads[:7] == ["terngrad", "onebit", "dorefa", "strom", "dryden", "dropping", "adacomp"]
    assert set(METHODS) <= set(heads)
    assert max(map(len, lines)) <= 100
    text = "\n".join(lines)
    for publication in ("NIPS 2017", "Interspeech 2014", "1606.06160", "Interspeech 2015",
                        "MLHPC 2016", "EMNLP 2017", "AAAI 2018"):
        assert publication in text


@pytest.mark.parametrize("name", SEVEN)
def test_variants_are_specifications(name):
    publication, named = SEVEN[name]
    assert find(name).source.split(",")[0].split(" ")[0] in publication and len(named) >= 2
    for spec in named.values():
        assert repr(method(spec)) and name in spec
    listed = variants.listing()
    for f in (*fields(find(name)), *common_options(), *exchange_options()):
        assert f" {f.name}=" in listed


def tables(name, *heads):
    """The rows, as lists of cells, of those tables of a section that begin with these heads."""
    rows, inside = [], False
    for line in SECTIONS[name].splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        inside = bool(cells) and (inside or cells[0] in heads)
        if inside and cells[0] not in heads and not cells[0].startswith("---"):
            rows.append(cells)
    return rows


@pytest.mark.parametrize("name", [*SEVEN, "chunks", "topk", "randomk", "powersgd"])
def test_every_option_is_documented_with_its_source(name):
    rows = tables(name, "option")
    assert all(source for _, _, source in rows)
    written = {option for first, *_ in rows for option in re.findall(r"`(\w+)(?:=[^`]*)?`", first)}
    for f in fields(find(name)):
        assert f.name in written, f"docs/methods.md does not say where {f.name} comes from"
    for option in re.findall(r"`(\w+)=", " ".join(first for first, *_ in rows)):
        known = {f.name for f in (*fields(find(name)), *common_options(), *exchange_options())}
        assert option in known, f"docs/methods.md invents {option}="


@pytest.mark.parametrize("name", SEVEN)
def test_documented_functions_exist(name):
    """Those of the equation tables, in the kernels or in mpicomp.nn."""
    rows = tables(name, "equation", "step", "formula")
    found = re.findall(r"`((?:nn\.\w+)|(?:[a-z0-9]+_\w+))`", " ".join(where for _, where in rows))
    kernels = [word for word in found if not word.startswith(("nn.", "_"))]
    assert kernels
    for word in kernels:
        assert hasattr(reference, word), word
    for word in set(found) - set(kernels):
        assert hasattr(nn, word.removeprefix("nn.")), word
