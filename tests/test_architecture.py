"""Which folder knows which: every import is read from the source, and held to the layers."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import ranks

import mpicomp

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "mpicomp"
MODULES = sorted(PACKAGE.rglob("*.py"))

# From the ground up: a folder or file of mpicomp imports only those that stand before it.
LAYERS = ("errors", "installed", "names", "philox", "layout", "kernels", "mpi", "transport",
          "compressors", "compressor", "exchange", "catalogue", "variants", "advice", "averager",
           "reducer", "optim", "broadcast", "local", "checkpoint", "recovery", "ddp", "nn", "slurm",
           "compat", "bench", "cli", "__main__")
TORCH = {"reducer", "optim", "broadcast", "local", "nn", "ddp", "bench", "checkpoint", "recovery",
         "compat"}
TORCH_IF_NEEDED = {"averager"}  # only inside of functions, where arrays are torch's
MPI = {"mpi", "transport", "exchange", "advice", "averager", "reducer", "broadcast", "local",
       "checkpoint", "recovery", "ddp", "compat", "bench", "cli"}
CUPY = {"device.py", "staging.py"}
MOST_AT_THE_TOP = 29  # folders and files of mpicomp/


def part(path):
    """The part of the package that a file belongs to."""
    first = path.relative_to(PACKAGE).parts[0]
    return {"__init__.py": ""}.get(first, first.removesuffix(".py"))


def imports(path):
    """(dotted name, whether importing the file leaves it out) of everything a file imports."""
    tree = ast.parse(path.read_text())
    functions = [f for f in ast.walk(tree) if isinstance(f, ast.FunctionDef)]
    inner = {id(node) for f in functions for node in ast.walk(f)}
    inner |= {id(node) for block in tree.body if isinstance(block, ast.If)  # TYPE_CHECKING: never
              for node in ast.walk(block)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in inner
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            for alias in node.names:
                yield f"{node.module}.{alias.name}", id(node) in inner


def own_part(name):
    """The part of mpicomp that `mpicomp.x.y` names; "" for the package and its public names."""
    second = [*name.split("."), ""][1]
    known = (PACKAGE / second).is_dir() or (PACKAGE / f"{second}.py").exists()
    return second if second and known else ""


def files(check):
    """A test that holds every file of the package to check(path), and names those that fail."""
    def test():
        wrong = []
        for path in MODULES:
            try:
                check(path)
            except AssertionError as error:
                wrong.append(f"{path.relative_to(PACKAGE)}: {error}")
        assert not wrong, "\n".join(wrong)

    test.__name__, test.__doc__ = check.__name__, check.__doc__
    return test


@files
def test_each_layer_knows_only_those_below(path):
    here = part(path)
    below = LAYERS[:LAYERS.index(here)] if here else ()
    for name, _ in imports(path):
        if name.split(".")[0] == "mpicomp" and own_part(name) not in ("", here):
            assert own_part(name) in below, f"{path.name} imports {name}"


def test_every_folder_is_a_layer():
    found = {part(path) for path in MODULES} - {""}
    assert found == set(LAYERS) and len(found) <= MOST_AT_THE_TOP


@files
def test_torch_mpi4py_and_cupy_stay_in_their_layers(path):
    here = part(path)
    for name, inside in imports(path):
        library = name.split(".")[0]
        if library == "torch":
            needed = here in TORCH_IF_NEEDED and inside
            assert here in TORCH or needed, f"{path.name} imports torch"
        elif library == "mpi4py":
            assert here in MPI, f"{path.name} imports mpi4py"
            assert inside, f"{path.name} imports mpi4py before anybody needs it: MPI_Init"
        else:
            assert library != "cupy" or path.name in CUPY and inside, f"{path.name} imports cupy"


def test_the_table_tells_a_wrong_import(tmp_path):
    """The test of the test: an import of a higher layer is found."""
    source = tmp_path / "strom.py"
    source.write_text("def f():\n    from mpicomp.exchange.base import Codec\n")
    (name, inside), = imports(source)
    assert inside and own_part(name) == "exchange"
    assert LAYERS.index("exchange") > LAYERS.index("compressors")
    assert own_part("mpicomp.Reducer") == "" and own_part("mpicomp.kernels.reference") == "kernels"


MOST_ATTRIBUTES = 15
# Private names of Python, torch and objects of the user's that have no public one.
FOREIGN = ("os.", "sys.", "torch.", "scaler.", "joined.", "gradient._version", "g._version",
           "g._values", "tensor._values")


def private(path):
    """(line, text) of each attribute with a leading underscore that is another object's."""
    tree = ast.parse(path.read_text())
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    own |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name) and node.value.id == "self"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and re.fullmatch(r"_[a-z]\w*", node.attr):
            text = ast.unparse(node)
            if node.attr not in own and not text.startswith(FOREIGN):
                yield node.lineno, text


@files
def test_nobody_reaches_into_the_private_parts_of_others(path):
    assert not list(private(path))


@files
def test_no_class_has_too_many_attributes(path):
    for cls in ast.walk(ast.parse(path.read_text())):
        if isinstance(cls, ast.ClassDef):
            own = {node.attr for function in cls.body if isinstance(function, ast.FunctionDef)
                   for node in ast.walk(function) if isinstance(node, ast.Attribute)
                   and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self"}
            assert len(own) <= MOST_ATTRIBUTES, f"{cls.name}: {sorted(own)}"


@files
def test_calls_are_found_by_a_search_for_their_name(path):
    """No star imports, no module __getattr__, and nothing is looked up by text put together."""
    tree = ast.parse(path.read_text())
    top = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert "__getattr__" not in top or path == PACKAGE / "__init__.py"
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert all(alias.name != "*" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "import_module"):
            assert not any(isinstance(part, ast.JoinedStr) for part in node.args[1:])


def test_the_tests_of_the_house_tell_what_is_wrong(tmp_path):
    source = tmp_path / "odd.py"
    source.write_text("def f(reducer):\n    return reducer._plan, self._own\n")
    assert list(private(source)) == [(2, "reducer._plan")]


@files
def test_a_module_opens_with_one_sentence(path):
    said = ast.get_docstring(ast.parse(path.read_text()))
    assert said or path.name == "__main__.py"


KINDS = ("", ".py", ".md", ".cpp", ".h", ".txt", ".sh", ".cu", ".cuh")


def text_files():
    """Everything in the tree that people read, as far as it is there."""
    for folder in ("mpicomp", "tests", "launch", "docs", ".ci", "jobs"):
        for path in sorted((ROOT / folder).rglob("*")):
            inner = path.parent.relative_to(ROOT / folder).parts  # __pycache__, .pytest_cache ...
            hidden = any(part.startswith((".", "_")) for part in inner)
            if path.is_file() and path.suffix in KINDS and not hidden:
                yield path
    yield from (p for p in ROOT.glob("*") if p.suffix in (".md", ".cfg", ".toml", ".py"))


def test_lines_have_at_most_100_columns():
    long = [f"{path.relative_to(ROOT)}:{number}" for path in text_files()
            if path.suffix in (".py", ".cpp", ".h", ".md", "", ".cu", ".cuh")
            for number, line in enumerate(path.read_text().splitlines(), 1)
            if len(line) > 100 and not line.startswith("|")]  # a row of a table in Markdown
    assert not long


def test_no_file_names_a_place_on_somebodys_machine():
    pattern = re.compile(r"/(home|Users|root|work|tmp)" r"/\w")
    found = [f"{path.relative_to(ROOT)}:{number}: {line.strip()}" for path in text_files()
             for number, line in enumerate(path.read_text().splitlines(), 1)
             if pattern.search(line)]
    assert not found


# ---- importing is free ----------------------------------------------------------------------


def fresh(code):
    """What a new interpreter prints that runs this code."""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, text=True,
                          capture_output=True, timeout=ranks.JOB)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_import_loads_nothing_and_says_nothing():
    heavy = "{'numpy', 'torch', 'mpi4py', 'cupy'}"
    out, err = fresh(f"import sys, mpicomp; assert not {heavy} & set(sys.modules); mpicomp.__all__")
    assert out == err == ""


def test_import_takes_well_under_100_ms():
    """Of this process's own time on a core, which others on the machine do not take away."""
    code = "import time; t = time.process_time(); import mpicomp; print(time.process_time() - t)"
    assert min(float(fresh(code)[0]) for _ in range(3)) < 0.1


def test_methods_need_neither_torch_nor_mpi():
    code = ("import sys, mpicomp; mpicomp.methods(); mpicomp.method('onebit');"
            "assert not {'torch', 'mpi4py.MPI'} & set(sys.modules)")
    assert fresh(code) == ("", "")


def test_public_names():
    assert set(mpicomp.__all__) >= {
        "Reducer", "DistributedOptimizer", "broadcast_parameters", "broadcast_optimizer_state",
        "method", "methods", "Method", "Compressor", "register", "from_spec", "MpicompError",
        "SpecError", "MismatchError", "NonFiniteError", "LaunchError", "PacketError", "StallError"}
    for name in mpicomp.__all__:
        assert getattr(mpicomp, name).__doc__ and name in dir(mpicomp)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        assert mpicomp.nothing
