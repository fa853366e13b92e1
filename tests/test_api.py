"""The API pages: every public name is there, typed, and in an example that runs."""

import ast
import doctest
import inspect
import operator
import re
import runpy
import tempfile

import pytest
from test_architecture import PACKAGE, ROOT

import mpicomp

PAGES = sorted((ROOT / "docs").glob("api-*.md"))
SHOWN = re.compile(r"^\.\. auto(?!module)\w+:: mpicomp\.(.+)\n((?: +\S.*\n)*)", re.M)
SHOW = {name: options for page in PAGES  # {name behind "mpicomp.": options of the directive}
        for name, options in SHOWN.findall(page.read_text())}
MODULES = sorted(set(mpicomp._MODULES) - {"watchdog"})  # of which the status alone is public


def public():
    """{name behind "mpicomp.": object} of all that users may call or derive from.

    Of a module inside of a public one, such as exchange.packet, that is what the pages show.
    """
    found = {name: getattr(mpicomp, name) for name in mpicomp.__all__}
    for module in (getattr(mpicomp, name) for name in MODULES):
        own = [name for name, value in vars(module).items() if not name.startswith("_")
               and (inspect.isfunction(value) or inspect.isclass(value))
               and value.__module__ == module.__name__]
        for name in getattr(module, "__all__", own):
            value = getattr(module, name)
            place = f"{module.__name__.removeprefix('mpicomp.')}.{name}"
            if inspect.ismodule(value):
                shown = [other for other in SHOW if other.startswith(place + ".")]
                assert shown, place
                found |= {other: operator.attrgetter(other)(mpicomp) for other in shown}
            elif name not in found or found[name] is not value:
                found[place] = value
    return found


def examples(path):
    """The text of a page, with empty lines in the place of all but its examples."""
    kept, inside = [], False
    for line in path.read_text().splitlines():
        inside = line == "```pycon" if line.startswith("```") else inside
        kept.append(line if inside and not line.startswith("```") else "")
    return "\n".join(kept) + "\n"


def test_every_public_name_has_a_place_and_an_example():
    assert set(public()) <= set(SHOW)
    used = {word for page in PAGES
            for example in doctest.DocTestParser().get_examples(examples(page))
            for word in re.findall(r"\w+", example.source)}
    assert {name.split(".")[-1] for name in public()} <= used


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_examples_of_a_page_run(page, monkeypatch, tmp_path):
    """On one rank; what they register, choose or write does not outlive them."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    registry = inspect.getmodule(mpicomp.register)
    monkeypatch.setattr(registry, "_REGISTRY", registry.registry())
    registry = inspect.getmodule(mpicomp.exchange.register)
    monkeypatch.setattr(registry, "_REGISTRY", registry.exchanges())
    monkeypatch.setattr(mpicomp.kernels, "_chosen", None)
    test = doctest.DocTestParser().get_doctest(examples(page), {}, page.name, str(page), 0)
    assert test.examples
    said = []
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=said.append)
    assert not said, "".join(said)


# ---- types -------------------------------------------------------------------------------------


def untyped(function):
    """The parameters of a function without a type, and "return" where it has none."""
    signature = inspect.signature(function)
    return [name for name, parameter in signature.parameters.items()
            if parameter.annotation is parameter.empty and name not in ("self", "cls")] + (
                ["return"] if signature.return_annotation is signature.empty else [])


def members(name, cls):
    """(name, object) of what a page shows of a class, of its own or inherited from the package."""
    chosen = re.search(r":members:([^:]*)", SHOW[name])
    listed = chosen and chosen[1].replace(",", " ").split()
    left_out = re.findall(r"\w+", "".join(re.findall(r":exclude-members:(.*)", SHOW[name])))
    own = {}
    for owner in reversed(cls.__mro__):
        own |= vars(owner) if owner.__module__.startswith("mpicomp.") else {}
    for member, of in own.items():
        if member == "__init__" or chosen and of.__doc__ and member[0] != "_" and (
                member in listed if listed else member not in left_out):
            yield member, of


@pytest.mark.parametrize("name, value", public().items(), ids=list(public()))
def test_a_public_name_is_typed(name, value):
    if inspect.isfunction(value):
        assert not untyped(value)
    elif inspect.isclass(value):
        for member, of in members(name, value):
            of = getattr(of, "__func__", getattr(of, "fget", of))
            assert not (inspect.isfunction(of) and untyped(of)), member


def test_type_checkers_see_the_same_names():
    names = {}
    for node in ast.parse((PACKAGE / "__init__.pyi").read_text()).body:
        if isinstance(node, ast.ImportFrom):
            names |= {alias.asname: (node.module, alias.name) for alias in node.names}
    lazy = {name: (f"mpicomp.{home}", name) for name, home in mpicomp._HOME.items()}
    for name, home in mpicomp._MODULES.items():
        package, _, last = f"mpicomp.{home}".rpartition(".")
        lazy[name] = package, last
    assert names == lazy
    assert (PACKAGE / "py.typed").exists()
    assert "\nmpicomp = py.typed, *.pyi\n" in (ROOT / "setup.cfg").read_text()


# ---- how docstrings become pages ---------------------------------------------------------------


def test_a_plain_docstring_becomes_rst():
    """Without Sphinx: its settings import nothing of it."""
    as_rst = runpy.run_path(str(ROOT / "docs" / "conf.py"))["as_rst"]
    assert as_rst(["`a` of **b, x_", "goes on", "", "    code_", "", "    more"]) == [
        r"``a`` of \*\*b, x\_ goes on", "", "::", "", "    code_", "", "    more", ""]
    table = ["step   of the", "       run", "ranks  how many"]
    assert as_rst(table, {"step", "ranks"}) == [
        ":param step: of the run", ":param ranks: how many", ""]
    assert as_rst(table) == ["``step``", "    of the run", "``ranks``", "    how many", ""]
