"""Classes by name: those of this package, and those that others name in entry points."""

from mpicomp.errors import SpecError

_loaded = set()  # groups of entry points


def add(classes, cls, kind) -> None:
    """Put a class into {name: class}; SpecError where another `kind` has its name."""
    known = classes.get(cls.name)
    if known is not None and known is not cls:
        raise SpecError(f"two {kind} are called {cls.name!r}: {known.__module__}."
                        f"{known.__qualname__} and {cls.__module__}.{cls.__qualname__}")
    classes[cls.name] = cls


def load(group, register) -> None:
    """register(class) for each entry point in this group, once in a program."""
    from importlib.metadata import entry_points

    if group not in _loaded:
        _loaded.add(group)
        for point in entry_points(group=group):
            register(point.load())
