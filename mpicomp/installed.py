"""Where this package was installed from, for messages that say how to compile or update it."""

import json
import shlex
import sys
from functools import cache
from importlib import metadata
from pathlib import Path
from urllib.parse import unquote, urlparse

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parent if (HERE.parent / "setup.py").exists() else None


def to_compile() -> str:
    """The command line that compiles the kernels of the package in use.

    With --no-cache-dir, or pip would reuse a wheel that it built without a compiler.
    """
    pip = f"{shlex.quote(sys.executable)} -m pip install --no-deps --no-cache-dir"
    if CHECKOUT:
        return f"{pip} --editable {shlex.quote(str(CHECKOUT))}"
    source = next((where for package, where in _installed() if package == HERE), None)
    if source and not source.endswith(".whl"):
        return f"{pip} --force-reinstall {shlex.quote(source)}"
    return f"{pip} --force-reinstall .  in a checkout of mpicomp"


def shadowed() -> Path | None:
    """Folder of the installed package that this one hides by PYTHONPATH or the working directory.

    None if this is the installed one, or none is installed.
    """
    packages = [package for package, _ in _installed()]
    return packages[0] if packages and HERE not in packages else None


@cache
def _installed():
    """[(folder of the package, source that pip installed it from, or None)] of installations."""
    found = []
    for one in metadata.distributions(name="mpicomp"):
        if not one.read_text("RECORD"):  # the egg-info of a checkout
            continue
        told = json.loads(one.read_text("direct_url.json") or "{}")
        source = _source(told)
        package = Path(one.locate_file("mpicomp"))
        if told.get("dir_info", {}).get("editable"):
            package = Path(source) / "mpicomp"
        found.append((package.resolve(), source))
    return found


def _source(told):
    """What pip was told to install, as direct_url.json (PEP 610) has it, or None."""
    url, git = told.get("url"), told.get("vcs_info")
    if git:
        return f"{git['vcs']}+{url}@{git['commit_id']}"
    return unquote(urlparse(url).path) if url and url.startswith("file:") else url
