"""The registry of exchanges: every class by the name that stands in exchange=NAME."""

from dataclasses import Field
from typing import TypeVar

from mpicomp.compressors import known
from mpicomp.errors import SpecError
from mpicomp.exchange.base import Exchange

C = TypeVar("C", bound=type[Exchange])

_REGISTRY: dict[str, type[Exchange]] = {}


def register(cls: C) -> C:
    """Make an Exchange class known under `cls.name`; usable as a decorator.

    Packages may also name their classes in the entry-point group `mpicomp.exchanges`.
    """
    if any(isinstance(value, Field) for value in vars(cls).values()):
        raise SpecError(f"{cls.__qualname__} has options: write @dataclass(eq=False, repr=False) "
                        "above the class, below @register")
    known.add(_REGISTRY, cls, "exchanges")
    return cls


def exchanges() -> dict[str, type[Exchange]]:
    """All registered exchange classes by name: our own, and those of installed packages."""
    known.load("mpicomp.exchanges", register)
    return dict(_REGISTRY)


def exchange(name: str) -> type[Exchange]:
    """The exchange class called `name`; SpecError lists what exists."""
    classes = exchanges()
    if name not in classes:
        raise SpecError(f"no exchange is called {name!r}; there are: {', '.join(classes)}")
    return classes[name]
