"""Compare model, optimizer and scheduler state of all ranks by checksum.

Everything that should be equal becomes a list of facts (kind, name, fingerprint). The fingerprint
of a tensor is its dtype, shape and the crc32 of its elements; of a number, its repr. The ranks
exchange one 16-byte digest of the list. Only if digests differ do they exchange the lists, and the
error names the first fact that differs, its value on each rank, and what to type.
"""

import zlib
from collections import deque
from collections.abc import Mapping
from hashlib import blake2b

import numpy as np
import torch
from torch.nn.parameter import is_lazy

from mpicomp import mpi
from mpicomp.errors import MismatchError, MpicompError, SpecError
from mpicomp.exchange import exchange

REMEDIES = {
    "step": "load the states of one step on every rank",
    "plan of buckets": "load the states of one step on every rank",
    "parameter": "call mpicomp.broadcast_parameters(model) before the first step; if they were "
                 "equal then, find what one rank alone has changed: an optimizer that the Reducer "
                 "does not know, p.data, a gradient after the exchange, or a forward pass, as that "
                 "of Embedding(max_norm=M): leave max_norm out, and after each step() call, "
                 "without gradients, weight.renorm_(2, 0, M)",
    "statistic": "normalisation layers note their own rank's examples: call mpicomp."
                 "broadcast_parameters(model) before you evaluate or save; on GPUs, torch.nn."
                 "SyncBatchNorm.convert_sync_batchnorm(model) notes those of all ranks",
    "buffer": "call mpicomp.broadcast_parameters(model)",
    "state": "type  model.load_state_dict(comm.bcast(model.state_dict()))  for what only the "
             "model's own state_dict() knows",
    "entry": "only tensors are broadcast: pass the module itself, or give every rank the same by "
             "comm.bcast",
    "option": "a scheduler that decides by a loss needs that of all ranks: "
              "scheduler.step(comm.allreduce(loss) / comm.size); "
              "mpicomp.broadcast_optimizer_state(optimizer) makes them equal",
    "optimizer state": "call mpicomp.broadcast_optimizer_state(optimizer)",
}
ROUNDED = ("with exchange=peers replicas agree up to rounding only: after reducer.deliver() call "
           "mpicomp.broadcast_parameters(model)")


def check_replicas(gradients, model, objects) -> None:
    """See Reducer.check_replicas; `objects`: {kind: what has a state_dict()}."""
    asynchronous = gradients.mode.asynchronous
    if asynchronous:
        gradients.require_settled("check_replicas()")
    if gradients.comm.size > 1:
        remedies = {kind: f"type  {kind}.load_state_dict(comm.bcast({kind}.state_dict()))"
                    for kind, value in objects.items() if hasattr(value, "load_state_dict")}
        if asynchronous and not gradients.link.exchange.owns:
            remedies["parameter"] = ROUNDED
        compare(gradients.comm, lambda: _facts(gradients, model, objects), gradients.link.timeout,
                remedies)


def check_start(gradients) -> None:
    """Before the first step, and the first of a loaded state: step, buckets and parameters.

    Where something else than gradients is sent, also the optimizer that it is made from.
    Parameters need not be equal on the way with an asynchronous exchange: they differ by rounding.
    """
    if gradients.comm.size > 1:
        apart = gradients.mode.asynchronous and gradients.step
        names = {id(p): name for name, p in gradients.parameters}
        optimizers = gradients.optimizers if gradients.sends else ()  # what is sent is in its state
        compare(gradients.comm, lambda: [
            ("step", "", str(gradients.step)),
            ("plan of buckets", "", f"{gradients.buckets.plan:016x}"),
            *_options(optimizers, names),
            *_tensors("parameter", [] if apart else gradients.parameters),
            *_states(optimizers, names)], gradients.link.timeout)


def bad_every(every, method):
    """What is wrong with check_replicas_every for this method, or None."""
    if every is not None and method and exchange(method.exchange).asynchronous:
        return SpecError(f"check_replicas_every={every}: with exchange={method.exchange} replicas "
                         "differ on the way; call reducer.deliver(), then reducer.check_replicas()")


def compare(comm, facts, timeout, remedies=None) -> None:
    """Raise MismatchError on all ranks unless facts(), a list, gives the same on each. Collective.

    What facts() raises on one rank becomes the error of all. StallError after `timeout` seconds.
    """
    try:
        mine = list(facts())
    except Exception as error:  # whatever it is, the others wait to hear of it
        mine = [("problem", "", in_words(error))]
    text = "\n".join(sorted(map(" ".join, mine)))  # the order in dictionaries may differ
    told = np.frombuffer(blake2b(text.encode(), digest_size=16).digest(), np.uint64)
    heard = np.zeros((comm.size, 2), np.uint64)
    mpi.wait(comm, comm.Iallgather(told, heard), timeout, "comparing replicas")
    if (heard != told).any():
        everyone = mpi.allgather(comm, mine, "telling what differs", timeout)
        raise MismatchError(_first_difference(everyone, REMEDIES | (remedies or {})))
    if mine and mine[0][0] == "problem":
        raise SpecError(mine[0][2])


def _first_difference(everyone, remedies):
    """In words: the first fact, in rank 0's order, that is not the same on all ranks."""
    for rank, facts in enumerate(everyone):
        if facts and facts[0][0] == "problem":
            return f"rank {rank}: {facts[0][2]}"
    tables = [{} for _ in everyone]
    for table, facts in zip(tables, everyone):
        for kind, name, text in facts:  # dictionaries may have 1 and "1"
            table[kind, name] = ", ".join(filter(None, [table.get((kind, name)), text]))
    keys = dict.fromkeys(key for table in tables for key in table)
    apart = [key for key in keys if len({table.get(key) for table in tables}) > 1]
    kind, name = apart[0]
    ranks = {}
    for rank, table in enumerate(tables):
        ranks.setdefault(table.get(apart[0], "nothing"), []).append(rank)
    said = "; ".join(f"{text} on {_list(who)}" for text, who in list(ranks.items())[:4])
    remedy = remedies.get(kind, f"give every rank the same {kind}")
    others = f", the first of {len(apart)} differences" if len(apart) > 1 else ""
    what = f"{kind} {name!r}" if name else kind
    return f"replicas differ in {what}{others}: {said}. {remedy}"


def in_words(error) -> str:
    """An exception as a text for other ranks; this package's own need not say what they are."""
    return str(error) if isinstance(error, MpicompError) else f"{type(error).__name__}: {error}"


def _list(ranks):
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return f"rank{'s'[:len(ranks) > 1]} {', '.join(map(str, ranks[:8]))}{more}"


# ---- what should be equal


def _facts(gradients, model, objects):
    """Of all that belongs to a training; with an asynchronous exchange no optimizer state."""
    asynchronous = gradients.mode.asynchronous
    optimizers = [*gradients.optimizers, *(value for value in objects.values()
                                          if isinstance(value, torch.optim.Optimizer))]
    optimizers = list({id(optimizer): optimizer for optimizer in optimizers}.values())
    modules = [*_tensors("parameter", gradients.parameters)] if model is None else \
        [*facts_of_module(model)]
    named = gradients.parameters if model is None else model.named_parameters()
    names = {id(p): name for name, p in named}
    yield "step", "", str(gradients.step)
    yield from _options(optimizers, names)
    for kind, value in objects.items():
        if not isinstance(value, torch.optim.Optimizer):
            state = value.state_dict() if hasattr(value, "state_dict") else value
            for name, leaf in leaves(state):
                yield kind, name, fingerprint(leaf)
    yield from (fact for fact in modules if fact[0] == "parameter")
    if not asynchronous:  # there it is each rank's own, or an owner's
        yield from _states(optimizers, names)
    yield from (fact for fact in modules if fact[0] != "parameter")


def facts_of_module(module):
    """Parameters, buffers (also those that no state_dict has), and what else its state_dict has."""
    yield from _tensors("parameter", module.named_parameters())
    seen = set()
    for prefix, part in module.named_modules():
        norm = isinstance(part, torch.nn.modules.batchnorm._NormBase)
        for name, buffer in part.named_buffers(prefix, recurse=False):
            if id(buffer) not in seen:
                seen.add(id(buffer))
                yield "statistic" if norm else "buffer", name, fingerprint(buffer)
    for name, leaf in extra_entries(module):
        yield "state", name, fingerprint(leaf)


def extra_entries(module):
    """(name, leaf) of what module.state_dict() returns besides parameters and buffers."""
    own = {_memory(tensor) for tensor in (*module.parameters(), *module.buffers())}
    return [(name, leaf) for name, leaf in leaves(module.state_dict())
            if not isinstance(leaf, torch.Tensor) or _memory(leaf) not in own]


def _memory(tensor):
    """A key that is equal for two tensors that share the same elements in memory."""
    if is_lazy(tensor) or tensor.layout not in (torch.strided, torch.sparse_coo):
        return None
    where = tensor._values() if tensor.layout is torch.sparse_coo else tensor
    return where.device, where.data_ptr(), tensor.shape, where.stride(), tensor.dtype


def _tensors(kind, named):
    for name, tensor in named:
        yield kind, name, fingerprint(tensor)


def _labels(optimizers):
    """(how to call it, optimizer) of each."""
    many = len(optimizers) > 1
    return [(type(o).__name__ + f" {i}" * many, o) for i, o in enumerate(optimizers)]


def _options(optimizers, names):
    """Learning rates and all other options of the groups, and which parameters are in them."""
    for label, optimizer in _labels(optimizers):
        for number, group in enumerate(getattr(optimizer, "param_groups", ())):
            own = [names.get(id(p), list(p.shape)) for p in group["params"]]
            yield ("option", f"parameters of group {number} of {label}",
                   f"{len(own)}, checksum {zlib.crc32(repr(own).encode()):08x}")
            for key in (key for key in group if key not in ("params", "param_names")):
                for name, leaf in leaves(group[key], key):
                    yield "option", f"{name} of group {number} of {label}", fingerprint(leaf)


def _states(optimizers, names):
    """Momenta, step counts and whatever else an optimizer keeps of a parameter."""
    for label, optimizer in _labels(optimizers):
        state = getattr(optimizer, "state", {})
        for number, group in enumerate(getattr(optimizer, "param_groups", ())):
            for index, p in enumerate(group["params"]):
                of = names.get(id(p), f"parameter {index} of group {number}")
                for name, leaf in leaves(state[p] if p in state else {}):
                    yield "optimizer state", f"{name} of {of} ({label})", fingerprint(leaf)


# ---- values as text


def leaves(value, name=""):
    """(name, value) of all that nested dictionaries, lists and tuples hold, in their order."""
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, (list, tuple, deque)):
        items = enumerate(value)
    else:
        yield name, value
        return
    for key, inner in items:
        yield from leaves(inner, f"{name}.{key}" if name else str(key))


def fingerprint(value) -> str:
    """A text that is equal if and only if the values are, to the bit; for an unknown object, its
    class only.
    """
    if isinstance(value, torch.Tensor):
        if is_lazy(value):
            return "not initialised"
        crc = "no values" if value.is_meta else f"checksum {_checksum(value):08x}"
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}, {crc}"
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        return f"{value.dtype} {list(value.shape)}, checksum {zlib.crc32(value.tobytes()):08x}"
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, (set, frozenset)):
        return repr(sorted(map(fingerprint, value)))
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
        return repr(value)
    return type(value).__name__


def _checksum(tensor):
    """crc32 of the elements of a tensor, in order, wherever they lie in memory."""
    tensor = tensor.detach()
    if tensor.layout is not torch.strided:
        tensor = tensor.to_sparse().coalesce()
        return zlib.crc32(f"{_checksum(tensor.indices())} {_checksum(tensor.values())}".encode())
    flat = as_bytes(tensor.dequantize() if tensor.is_quantized else tensor)
    return zlib.crc32(flat.numpy())


def as_bytes(tensor):
    """The stored elements of a strided tensor as a flat uint8 tensor on the host."""
    tensor = without_expanded(tensor).resolve_conj().resolve_neg().cpu().contiguous()
    flat = tensor.as_strided((tensor.numel(),), (1,))  # one element may have a stride of 0
    return flat.view(torch.uint8) if flat.numel() else flat.new_empty(0, dtype=torch.uint8)


def without_expanded(tensor):
    """The tensor with dimensions that expand() made (stride 0) cut to length 1."""
    tensor = tensor.detach()
    for dimension, stride in enumerate(tensor.stride()):
        if stride == 0 and tensor.shape[dimension] > 1:
            tensor = tensor.narrow(dimension, 0, 1)
    return tensor
