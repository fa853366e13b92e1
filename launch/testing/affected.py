"""Finds the test files that a change can break: those that reach it through imports and file names.

`launch/test --changed` runs what `tests()` lists. Git says what differs from where this branch left
main, uncommitted and new files included. A file needs what it imports, also within
functions and in programs that it keeps in strings, and the scripts and pages that it names; a test
file needs all that those need in turn. What every test needs (EVERYTHING) selects them all.
"""

import ast
import re
import subprocess
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EVERYTHING = {"setup.cfg", "setup.py", "pyproject.toml", "launch/constraints.txt",
              "tests/conftest.py", "tests/ranks.py"}
ALWAYS = "tests/test_architecture.py"  # reads every file
USED_BY = {  # files other than Python, and the modules that read them
    "mpicomp/kernels/cpu/src/": "mpicomp/kernels/cpu/library.py",
    "mpicomp/kernels/gpu/src/": "mpicomp/kernels/gpu/device.py",
    "tests/fixture/": "tests/test_golden.py",
    "launch/data-requirements.txt": "launch/data.py",
}
TOP = ("", "tests/", "launch/", "jobs/")  # where `import name` may find name.py
NAMED = ("launch/", "jobs/", "docs/", "tests/")  # files that others know by name


def git(*words):
    """The lines that git prints; [] where there is no git, or it refuses."""
    try:
        done = subprocess.run(["git", *words], cwd=ROOT, text=True, capture_output=True)
    except OSError:
        return []
    return done.stdout.splitlines() if done.returncode == 0 else []


def changed():
    """Paths that differ from where this branch left main, deleted and new ones included."""
    base = git("merge-base", "HEAD", "origin/main") or git("merge-base", "HEAD", "main") or ["HEAD"]
    return {*git("diff", "--name-only", "--no-renames", base[0]), *new()}


def new():
    return git("ls-files", "--others", "--exclude-standard")


@cache
def words(text):
    return tuple(_words(text))


def _words(text):
    """Yields ("import", dotted name) and ("file", path or its end) for what a program uses.

    A string that imports something is a program, too. Text that is not Python yields nothing.
    """
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        match node:
            case ast.Import():
                yield from (("import", alias.name) for alias in node.names)
            case ast.ImportFrom():
                yield from (("import", f"{node.module}.{alias.name}") for alias in node.names)
            case ast.Attribute(ast.Name("mpicomp"), name):
                yield "import", f"mpicomp.{name}"
            case ast.List(items) | ast.Call(args=items) if {"-m", "mpicomp"} <= {
                    getattr(item, "value", None) for item in items if hasattr(item, "value")
                    and isinstance(item.value, str)}:
                yield "import", "mpicomp.__main__"
            case ast.BinOp(op=ast.Div(), right=ast.Constant(str(name))):  # LAUNCH / "run"
                yield "file", name
            case ast.Constant(str(string)) if id(node) not in docstrings:
                if re.search(r"\bimport\b", string):
                    yield from words(string)
                elif re.fullmatch(r"[\w-]*[./][\w./-]+", string):
                    yield "file", string


class Graph:
    """Which of these files need which; `text(path)` gives the content of one."""

    def __init__(self, files, text):
        self.files, self.text = set(files), text
        home = re.findall(r'"(\w+)": "([\w.]+)",', text("mpicomp/__init__.py"))
        self.public = {name: f"mpicomp.{module}" for name, module in home}
        self.needs = cache(self.needs)

    def module(self, name):
        """The files of a dotted name: its module, and the packages around it."""
        path = name.replace(".", "/")
        found = {file for top in TOP for file in (f"{top}{path}.py", f"{top}{path}/__init__.py")
                 if file in self.files}
        package, _, last = name.rpartition(".")
        if package == "mpicomp" and last in self.public:
            found |= self.module(self.public[last])
        return found | (self.module(package) if package else set())

    def needs(self, path):
        """The files that one file imports or names."""
        found = {file for file in self.files for start, reader in USED_BY.items()
                 if reader == path and file.startswith(start)}
        for kind, name in words("" if path.endswith(".md") else self.text(path)):
            if kind == "import":
                found |= self.module(name)
            elif re.fullmatch(r"mpicomp\.\w+\.", name):  # import_module(f"mpicomp.exchange.{name}")
                folder = name.replace(".", "/")
                found |= {file for file in self.files if file.startswith(folder)}
            elif path.startswith(NAMED):
                found |= {file for file in self.files if file.startswith(NAMED)
                          and not file.startswith("tests/test_")
                          and (f"/{file}".endswith(f"/{name}")
                               or name == "docs" and file.startswith("docs/"))}
        return found - {path}

    def reach(self, path):
        """All files that a file needs, directly or through others."""
        seen, todo = {path}, [path]
        while todo:
            more = self.needs(todo.pop()) - seen
            seen |= more
            todo += more
        return seen


def tests(differ=None):
    """The test files, as paths for pytest, that a change of these paths (git's) can break."""
    differ = changed() if differ is None else set(differ)
    files = {*git("ls-files"), *new(), *differ}

    def text(path):
        try:
            return (ROOT / path).read_text()
        except (OSError, UnicodeDecodeError):  # deleted, a folder or no text
            return ""

    graph = Graph(files, text)
    every = sorted(f for f in files if re.fullmatch(r"tests/test_\w+\.py", f) and text(f))
    if differ & EVERYTHING:
        return every
    chosen = [file for file in every if graph.reach(file) & differ]
    return sorted({*chosen, ALWAYS}) if differ else []


if __name__ == "__main__":
    print(*tests(), sep="\n")
