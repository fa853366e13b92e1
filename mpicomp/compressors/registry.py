"""The registry: every compressor class by name, and the compressor that a specification names."""

from dataclasses import fields
from typing import TypeVar

from mpicomp.compressors import known
from mpicomp.compressors.base import Compressor
from mpicomp.compressors.options import parse_options
from mpicomp.compressors.spec import split_spec
from mpicomp.errors import SpecError

C = TypeVar("C", bound=type[Compressor])

_REGISTRY: dict[str, type[Compressor]] = {}


def register(cls: C) -> C:
    """Decorates a Compressor class: it is then found under `cls.name`. Returns the class.

    Packages may also name their classes in the entry-point group `mpicomp.compressors`.
    """
    known.add(_REGISTRY, cls, "compressors")
    return cls


def registry() -> dict[str, type[Compressor]]:
    """All registered compressor classes by name: our own, and those of installed packages."""
    known.load("mpicomp.compressors", register)
    return dict(_REGISTRY)


def find(name: str) -> type[Compressor]:
    """The compressor class called `name`; SpecError lists what exists."""
    classes = registry()
    if name not in classes:
        raise SpecError(f"no compressor is called {name!r}; there are: "
                        + ", ".join(sorted(classes)))
    return classes[name]


def from_spec(spec: Compressor | str) -> Compressor:
    """The compressor that a specification describes, such as "onebit" or "residual(strom:tau=1)".

    Raises SpecError that lists what exists for an unknown name, option or value.
    """
    if isinstance(spec, Compressor):
        return spec
    name, inner, options = split_spec(spec)
    cls = find(name)
    bracket = next((f for f in fields(cls) if f.name == "inner"), None)
    needed = bracket is not None and bracket.default is None
    if inner is not None and bracket is None or inner is None and needed:
        raise SpecError(f"{spec!r}: {name} is written "
                        + (f"{name}(another compressor)" if bracket else f"{name}, no bracket"))
    if inner is not None:
        options["inner"] = cls.from_inner(inner, from_spec)
    return cls(**parse_options(name, fields(cls), options))
