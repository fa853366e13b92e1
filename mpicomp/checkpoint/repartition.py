"""Divides the residuals of P ranks among another number of ranks; their sum stays the same."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch

from mpicomp.errors import MismatchError
from mpicomp.exchange.shards import cut
from mpicomp.layout import Layout


def repartition(states: Sequence[Mapping[str, Any]], ranks: int, *,
                keep: Literal["sum", "mean"] = "sum",
                holders: Iterable[int] | None = None) -> list[dict[str, Any]]:
    """The states for `ranks` Reducers that go on from those of len(states) others.

    states   state_dict() of the Reducer, Averager or LocalUpdates of every former rank, in rank
             order
    keep     "sum" keeps the sum over ranks of "error" and of "error2", element by element. "mean"
             keeps that sum divided by the number of ranks, which is what a Reducer with
             average=True will still add to the parameters; the sum changes by ranks / len(states)
    holders  the ranks that have residuals: all, or with exchange=hierarchical the first of each
             node, as its state_dict() shows

    First-stage residuals are shared out evenly. Each share is rounded to float32 and makes up for
    the rounding of those before it, so a sum is off by less than one unit in the last place of the
    largest residual involved. Second-stage residuals go, with keep="sum" unrounded, to the rank
    that owns the element (exchange/shards.py). AdaGrad's sums of squares go to all ranks, each of
    which loads the part that it owns. All else, such as the anchors of LocalUpdates and the
    parameters of a rank in the middle of a round, new rank r takes over from former rank r modulo
    their number. What is divided comes back as torch tensors, also where an Averager gave NumPy
    arrays: its load_state_dict takes both. The given states do not change. If the number of ranks
    is the same, load the states themselves: only that continues to the bit. MismatchError if the
    states are of different steps or parameters.
    """
    if keep not in ("sum", "mean"):
        raise ValueError(f"keep={keep!r}: expected 'sum' or 'mean'")
    shapes = _common(states)
    holders = list(range(ranks)) if holders is None else list(holders)
    factor = 1.0 if keep == "sum" else ranks / len(states)
    stepped = any(key.startswith("adagrad/") for key in shapes)
    owners = _owners(shapes, ranks)
    new = [{key: value for key, value in states[rank % len(states)].items() if not _owed(key)}
           for rank in range(ranks)]
    for key, shape in shapes.items():
        kind, _, name = key.partition("/")
        total = torch.zeros(shape, dtype=torch.float64)
        for state in states:
            if key in state:
                total += torch.as_tensor(state[key]).double()
        if kind == "error":
            shares = _even(total * factor, len(holders))
        elif kind == "error2":
            # after AdaGrad it is part of a step, which does not grow with the number of ranks
            second = (total * (1.0 if stepped else factor)).float()
            shares = [torch.where(owners[name] == rank, second, 0.0) for rank in holders]
        else:
            shares = [(total * factor**2).float() for _ in holders]  # squares of a sum over ranks
        for rank, share in zip(holders, shares, strict=True):
            new[rank][key] = share
    return new


def _owed(key):
    """Is this what ranks owe, or AdaGrad's sums, which are divided?"""
    return key.partition("/")[0] in ("error", "error2", "adagrad")


def _common(states):
    """{key: shape} of what is divided; only leaders of nodes have residuals in some."""
    if any("shard" in state for state in states):
        raise MismatchError(f"exchange=server keeps the optimizer's state of a shard with its "
                            f"owner, which cannot be divided: go on with {len(states)} ranks")
    fullest = max(states, key=len)
    shapes = {key: value.shape for key, value in fullest.items() if _owed(key)}
    for rank, state in enumerate(states):
        if state["step"] != states[0]["step"]:
            raise MismatchError(
                f"the state of rank {rank} is of step {state['step']}, that of rank 0 of step "
                f"{states[0]['step']}: take them from one checkpoint")
        for key, value in state.items():
            if _owed(key) and (key not in shapes or shapes[key] != value.shape):
                raise MismatchError(f"the state of rank {rank} has {key!r} of shape "
                                    f"{list(value.shape)}, others have "
                                    f"{list(shapes[key]) if key in shapes else 'nothing'}")
    return shapes


def _even(total, count):
    """`total` (float64) as `count` float32 shares, equal but for rounding."""
    shares = []
    for left in range(count, 0, -1):
        shares.append((total / left).float())
        total = total - shares[-1].double()
    return shares


def _owners(shapes, ranks):
    """{name: int tensor, the owner of each element} of parameters with second-stage residuals.

    A state lists its keys bucket by bucket, in each all of "error" before all of "error2": this
    shows where a bucket ends, and so how `cut` divides it.
    """
    owners, bucket, before = {}, {}, None
    for key in [*shapes, None]:
        kind, _, name = (key or "").partition("/")
        if before == "error2" and kind != "error2":
            owners |= _cut(bucket, ranks)
            bucket = {}
        if kind == "error2":
            bucket[name] = shapes[key]
        before = kind
    return owners


def _cut(bucket, ranks):
    layout = Layout.of(bucket.items())
    flat = np.zeros(layout.size, np.int64)
    for rank, shard in enumerate(cut(layout, ranks)):
        shard.scatter(np.full(shard.layout.size, rank), flat)
    return {s.name: torch.from_numpy(flat[s.slice].copy()).view(s.shape) for s in layout.segments}
