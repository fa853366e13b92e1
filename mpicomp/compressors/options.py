"""Options of a compressor: dataclass fields with a sentence and limits, and their check."""

from collections.abc import Sequence
from dataclasses import field, fields
from numbers import Integral, Real
from typing import Any, TypeVar

from mpicomp.compressors.spec import show
from mpicomp.errors import SpecError

T = TypeVar("T")


def option(default: T, doc: str, *, choices: Sequence[T] | None = None,
           above: float | None = None, least: float | None = None,
           most: float | None = None) -> T:
    """A dataclass field with `doc`, a sentence for errors and listings, and its limits.

    `choices`: the values it may have; `above`, `least`, `most`: a number's bounds.
    """
    limits = dict(doc=doc, choices=choices, above=above, least=least, most=most)
    return field(default=default, metadata=limits)


def check_options(compressor: Any) -> None:
    """Raise SpecError for a field whose value is outside of what `option` declared.

    Converts a whole number given for a float or a text, and NumPy's numbers, to the field's type.
    """
    for f in fields(compressor):
        value = getattr(compressor, f.name)
        number = {float: Real, int: Integral, str: Integral}.get(f.type)
        if number and isinstance(value, number) and not isinstance(value, bool):
            object.__setattr__(compressor, f.name, f.type(value))
        _check(compressor.name, f, getattr(compressor, f.name))


def _check(owner, f, value):
    wrong = None
    limits = f.metadata
    if f.type in (int, float) and isinstance(value, bool) or not isinstance(value, f.type):
        wrong = f"of type {f.type.__name__}"
    elif limits.get("choices") and value not in limits["choices"]:
        wrong = "one of " + ", ".join(map(str, limits["choices"]))
    elif isinstance(value, float) and not abs(value) < float("inf"):
        wrong = "a finite number"
    elif limits.get("above") is not None and not value > limits["above"]:
        wrong = f"more than {limits['above']}"
    elif limits.get("least") is not None and not value >= limits["least"]:
        wrong = f"at least {limits['least']}"
    elif limits.get("most") is not None and not value <= limits["most"]:
        wrong = f"at most {limits['most']}"
    if wrong:
        raise SpecError(f"{owner}: {f.name}={show(value)} found, {f.name} must be {wrong} "
                        f"({f.metadata.get('doc', '')})")


_BOOL = {"yes": True, "true": True, "1": True, "no": False, "false": False, "0": False}


def parse_value(owner, f, text):
    """The value of field `f` from its text in a specification."""
    if not isinstance(text, str):
        return float(text) if f.type is float and type(text) is int else text
    try:
        return _BOOL[text.lower()] if f.type is bool else f.type(text)
    except (KeyError, ValueError):
        kind = {bool: "yes or no", int: "a whole number", float: "a number"}.get(f.type, "text")
        raise SpecError(f"{owner}: {f.name}={text} found, {f.name} must be {kind} "
                        f"({f.metadata.get('doc', '')})") from None


def parse_options(name, known, options: dict) -> dict:
    """Typed keyword arguments for `name`, whose options are the dataclass fields `known`."""
    known = {f.name: f for f in known}
    for option_name in options:
        if option_name not in known:
            listed = [f"{f.name}={show(f.default)} ({f.metadata.get('doc', '')})"
                      for f in known.values()]
            raise SpecError(f"{name} has no option {option_name!r}; it has "
                            + (", ".join(listed) or "none"))
    values = {key: parse_value(name, known[key], text) for key, text in options.items()}
    for key, value in values.items():
        _check(name, known[key], value)
    return values
