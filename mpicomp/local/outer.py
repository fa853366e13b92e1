"""Outer optimizers: what moves the anchor by the mean of all ranks' differences."""

import torch

from mpicomp.compressors.spec import split_spec
from mpicomp.errors import SpecError
from mpicomp.reducer.replicas import fingerprint, leaves

# torch.optim.SGD's options. "nesterov" is torch's: buf = momentum * buf + D, and the anchor moves
# by lr * (D + momentum * buf); "heavy-ball" moves it by lr * buf.
KNOWN = {"average": dict(lr=1.0),
         "nesterov": dict(lr=0.7, momentum=0.9),
         "heavy-ball": dict(lr=0.7, momentum=0.9)}


def made(outer, anchors) -> torch.optim.Optimizer:
    """The optimizer of these tensors that a specification or a function gives; SpecError if none.
    """
    if not isinstance(outer, str):
        optimizer = outer(anchors) if callable(outer) else outer
        if not isinstance(optimizer, torch.optim.Optimizer) or optimizer is outer:
            raise SpecError(
                f"outer: {type(optimizer).__name__} found, expected one of {', '.join(KNOWN)}, or "
                "a function that makes an optimizer of a list of tensors: "
                "outer=lambda anchors: torch.optim.Adam(anchors, lr=0.01)")
        given = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not given.issuperset(map(id, anchors)):
            raise SpecError(f"outer: {type(optimizer).__name__} found without some of the tensors "
                            "that the function was given, expected with all: "
                            "outer=lambda anchors: torch.optim.Adam(anchors, lr=0.01)")
        return optimizer
    name, inner, options = split_spec(outer)
    if name not in KNOWN or inner is not None:
        raise SpecError(f"outer={outer!r} found, expected one of {', '.join(KNOWN)}")
    chosen = dict(KNOWN[name])
    for option, text in options.items():
        if option not in chosen:
            raise SpecError(f"outer={outer!r}: {name} has the options {', '.join(chosen)}, found "
                            f"{option!r}")
        try:
            chosen[option] = float(text)
        except ValueError:
            raise SpecError(f"outer={outer!r}: {option}={text} found, expected a number") from None
    try:
        return torch.optim.SGD(anchors, nesterov=name == "nesterov", **chosen)
    except ValueError as error:
        raise SpecError(f"outer={outer!r}: {error}") from None


def facts(optimizer) -> list[str]:
    """What all ranks must agree on of an outer optimizer now, a line each."""
    return [type(optimizer).__name__,
            *(f"{name} of group {number}={fingerprint(leaf)}"
              for number, group in enumerate(optimizer.param_groups)
              for name, leaf in leaves({**group, "params": len(group["params"])}))]


def objection(name, optimizer, kind, state) -> str | None:
    """Why the saved state of an optimizer of this class does not fit this one, or None."""
    now = type(optimizer).__name__
    if kind != now:
        return f"saved with {kind} as the {name} optimizer, this has {now}"
    found, expected = ([len(group["params"]) for group in groups]
                       for groups in (state["param_groups"], optimizer.param_groups))
    if found != expected:
        return (f"the saved state of the {name} optimizer has groups of {found} parameters, "
                f"expected {expected}")
    return None
