"""Specifications as text, such as "strom:tau=0.01" and "residual(onebit)"."""

from mpicomp.errors import SpecError


def show(value) -> str:
    """A value as it stands in a specification."""
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def spec_text(name, options: dict) -> str:
    """`name:option=value,option=value`, the inverse of `split_spec`."""
    inner = options.get("inner")
    head = f"{name}({inner!r})" if inner is not None else name
    rest = ",".join(f"{k}={show(v)}" for k, v in options.items() if k != "inner")
    return f"{head}:{rest}" if rest else head


def split_spec(spec: str) -> tuple[str, str | None, dict]:
    """(name, inner specification or None, options as text) of `name(inner):option=value,...`."""
    if not isinstance(spec, str):
        raise SpecError(f"a specification is text such as 'strom:tau=0.01', found {spec!r}")
    head, rest, inner = spec.strip(), "", None
    if "(" in head.split(":")[0]:
        close = head.rfind(")")
        if close < 0:
            raise SpecError(f"{spec!r}: the bracket is not closed")
        opened = head.index("(")
        head, inner, rest = head[:opened], head[opened + 1:close], head[close + 1:].strip()
        if rest and not rest.startswith(":"):
            raise SpecError(f"{spec!r}: ':' expected after ')', found {rest!r}")
        rest = rest[1:]
    elif ":" in head:
        head, rest = head.split(":", 1)
    options = {}
    for part in filter(None, (p.strip() for p in rest.split(","))):
        name, equals, value = part.partition("=")
        if not equals or not name.strip() or not value.strip():
            raise SpecError(f"{spec!r}: option=value expected, found {part!r}")
        if name.strip() in options:
            raise SpecError(f"{spec!r}: the option {name.strip()!r} is given twice")
        options[name.strip()] = value.strip()
    return head.strip(), inner, options
