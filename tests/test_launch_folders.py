"""launch/ has commands at its top and libraries in folders, which know each other in one order."""

import ast
import graphlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_architecture import imports

LAUNCH = Path(__file__).resolve().parent.parent / "launch"
FOLDERS = ("hosts", "testing", "trainer", "claims")  # each imports only itself and those before it
MODULES = sorted(path for folder in FOLDERS for path in (LAUNCH / folder).glob("*.py"))
COMMANDS = {"run", "test", "bootstrap", "demo", "cluster", "reproduce", "train.py", "sweep.py",
            "data.py", "constraints.txt", "data-requirements.txt"}


def name(path):
    """How others import this file."""
    return ".".join(path.relative_to(LAUNCH).with_suffix("").parts).removesuffix(".__init__")


def known(path):
    """{module of launch/ that a file imports: is that inside of a function?}"""
    names = {name(module) for module in MODULES}
    return {found if found in names else found.rpartition(".")[0]: inside
            for found, inside in imports(path) if found.split(".")[0] in FOLDERS}


def test_the_top_holds_commands_only():
    found = {path.name for path in LAUNCH.iterdir() if not path.name.startswith(("_", "."))}
    assert found == COMMANDS | set(FOLDERS)


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_folders_know_those_before_them(path):
    below = FOLDERS[:FOLDERS.index(path.parent.name) + 1]
    for found, inside in known(path).items():
        assert found.split(".")[0] in below, f"{name(path)} imports {found}"
        assert not inside, f"{name(path)} imports {found} within a function"


def test_no_module_needs_itself():
    graphlib.TopologicalSorter({name(path): known(path) for path in MODULES}).prepare()


def test_train_shows_its_loop_in_60_lines_of_code():
    """Of the file without its docstring: the loop over the steps ends there."""
    tree = ast.parse((LAUNCH / "train.py").read_text())
    loops = [node for node in ast.walk(tree) if isinstance(node, ast.For)]
    assert len(loops) == 1 and loops[0].end_lineno - tree.body[0].end_lineno <= 60
    assert "DistributedOptimizer" in ast.unparse(tree)


@pytest.mark.parametrize("command", ["run", "test", "reproduce"])
def test_a_command_says_what_it_does_before_anything_is_installed(command):
    """In a Python without site-packages: it may import nothing that bootstrap installs."""
    done = subprocess.run([sys.executable, "-S", "-B", LAUNCH / command, "--help"], text=True,
                          capture_output=True, env={"PATH": os.environ["PATH"]})
    assert done.returncode == 0 and f"usage: launch/{command}" in done.stdout, done.stderr
