"""The registry of exchanges: every class by the name that stands in exchange=NAME."""

from dataclasses import Field
from typing import TypeVar

from mpicomp.errors import SpecError
from mpicomp.exchange.base import Exchange

C = TypeVar("C", bound=type[Exchange])

_REGISTRY: dict[str, type[Exchange]] = {}


def register(cls: C) -> C:
    """Make an Exchange class known under `cls.name`; usable as a decorator.

    Packages may also name their classes in the entry-point group `mpicomp.exchanges`.
    """
    known = _REGISTRY.get(cls.name)
    if known is not None and known is not cls:
        raise SpecError(f"two exchanges are called {cls.name!r}: {known.__module__}."
                        f"{known.__qualname__} and {cls.__module__}.{cls.__qualname__}")
    if any(isinstance(value, Field) for value in vars(cls).values()):
        raise SpecError(f"{cls.__qualname__} has options: write @dataclass(eq=False, repr=False) "
                        "above the class, below @register")
    _REGISTRY[cls.name] = cls
    return cls


def exchanges() -> dict[str, type[Exchange]]:
    """All registered exchange classes by name: our own, and those of installed packages."""
    from importlib.metadata import entry_points

    if not getattr(exchanges, "complete", False):
        exchanges.complete = True
        for point in entry_points(group="mpicomp.exchanges"):
            register(point.load())
    return dict(_REGISTRY)


def exchange(name: str) -> type[Exchange]:
    """The exchange class called `name`; SpecError lists what exists."""
    classes = exchanges()
    if name not in classes:
        raise SpecError(f"no exchange is called {name!r}; there are: {', '.join(classes)}")
    return classes[name]
