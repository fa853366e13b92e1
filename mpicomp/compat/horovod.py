"""Horovod's PyTorch interface: a script needs `import mpicomp.compat.horovod as hvd`, no more.

What is there has Horovod's names, arguments and results; docs/migrating.md lists what is not.
"""

import pickle
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from mpicomp import broadcast as start_values
from mpicomp import catalogue, mpi
from mpicomp.compat import tensors
from mpicomp.compat.passes import Passes, refuse_passes
from mpicomp.compat.tensors import Exchanged, Op, together
from mpicomp.errors import SpecError
from mpicomp.reducer import Reducer
from mpicomp.reducer.replicas import in_words

if TYPE_CHECKING:
    from mpi4py import MPI

Average, Sum, Adasum, Min, Max, Product = Op
_job: "Job | None" = None


class Job:
    """From init() to shutdown(): the user's communicator, a duplicate of it, and the nodes' ranks.

    draws   the seeds of compressed tensors: a number of its own for each call, 0 being Reducer's
    places  (local rank, local size) of all ranks
    """

    def __init__(self, given):
        self.given = mpi.intracommunicator(given)
        self.comm = mpi.communicator(self.given, None, "hvd.init()")
        self.node = mpi.node(self.comm)
        self.draws = count(1)
        self.places = mpi.allgather(self.comm, (self.node.rank, self.node.size), "hvd.init()")


@dataclass(frozen=True)
class Compression:
    """How gradients travel: Compression.none, Compression.fp16, or any method by `of`."""

    method: catalogue.Method
    none: ClassVar["Compression"]
    fp16: ClassVar["Compression"]

    @staticmethod
    def of(spec: str) -> "Compression":
        """Any method of mpicomp by its specification, such as "onebit" or "strom:tau=0.01"."""
        return Compression(catalogue.method(spec))


Compression.none = Compression.of("dense")
Compression.fp16 = Compression.of("fp16")


# ---- the job ----


def init(comm: "MPI.Comm | None" = None) -> None:
    """Start MPI and meet the other ranks. Collective; a second call does nothing.

    comm  an MPI communicator; None means COMM_WORLD. Lists of ranks are refused
    """
    global _job
    if _job is None:
        _job = Job(comm)


def shutdown() -> None:
    """The end of what init() began; optimizers go on to exchange."""
    global _job
    if _job is not None:
        mpi.release(_job.comm)
        _job = None


def is_initialized() -> bool:
    """Has init() been called, and shutdown() not since?"""
    return _job is not None


def _now() -> Job:
    if _job is None:
        raise SpecError("Horovod's interface is used before hvd.init(): call it first")
    return _job


def rank() -> int:
    """This rank's number, from 0."""
    return _now().comm.rank


def size() -> int:
    """How many ranks there are."""
    return _now().comm.size


def local_rank() -> int:
    """This rank's number among those of its node."""
    return _now().node.rank


def local_size() -> int:
    """How many ranks this node has."""
    return _now().node.size


def cross_rank() -> int:
    """This node's number among those that have a rank with this local rank."""
    return [place for place, _ in _now().places[:rank()]].count(local_rank())


def cross_size() -> int:
    """How many nodes have a rank with this local rank."""
    return [place for place, _ in _now().places].count(local_rank())


def is_homogeneous() -> bool:
    """Have all nodes equally many ranks?"""
    return len({ranks for _, ranks in _now().places}) == 1


def barrier() -> None:
    """Wait until all ranks are here."""
    together(_now().comm, "barrier")


def join(device: int = -1) -> int:
    """Refused on several ranks: SpecError. On one rank it returns 0, as in Horovod.

    It is not needed: a rank without examples calls optimizer.step() as often as the others, and
    its gradient counts as zero.
    """
    if _now().comm.size > 1:
        raise SpecError(
            f"rank {rank()}: hvd.join() found, which mpicomp has not: every rank must call "
            "optimizer.step() equally often. A rank without examples calls zero_grad() and step() "
            "without backward(), and counts as zero")
    return 0


# ---- training ----


def DistributedOptimizer(
        optimizer: torch.optim.Optimizer,
        named_parameters: Iterable[tuple[str, torch.nn.Parameter]] | None = None,
        compression: Compression = Compression.none, backward_passes_per_step: int = 1,
        op: Op = Average, gradient_predivide_factor: float = 1.0, num_groups: int = 0,
        groups: Any = None, sparse_as_dense: bool = False) -> Any:
    """The optimizer itself, which exchanges gradients and has the methods of Horovod's.

    optimizer                  any torch optimizer; its parameters are what is exchanged
    named_parameters           (name, parameter) pairs that name all of its parameters; None:
                               they are called parameter.0, parameter.1, ...
    compression                Compression.none, .fp16, or Compression.of("onebit")
    backward_passes_per_step   gradients of so many backward() calls are added up (not averaged)
                               before they are exchanged
    op                         hvd.Average, or hvd.Sum
    gradient_predivide_factor  1.0, for means are made in float32; others are refused
    num_groups, groups         0 and None, for gradients travel in buckets; others are refused
    sparse_as_dense            either way sparse gradients become dense

    It gets synchronize(), skip_synchronize(), set_backward_passes_per_step(passes) and `reducer`,
    the mpicomp.Reducer; zero_grad() between backward() and step() is refused. step() raises
    NonFiniteError on all ranks where a gradient holds NaN or Inf. Under a GradScaler call
    synchronize() after backward(), as Horovod's examples do: all ranks then skip the same steps.
    A method with a residual would keep that in scaled units; take mpicomp.Reducer for it.

    Raises SpecError, on all ranks, for arguments that are refused.
    """
    job, named, problem = _now(), [], None
    try:
        named = _named(optimizer, named_parameters)
        _refuse(compression, backward_passes_per_step, op, gradient_predivide_factor,
                num_groups or groups)
    except Exception as error:  # whatever it is, the others wait to hear of it
        problem = in_words(error)
    together(job.comm, "hvd.DistributedOptimizer", problem, passes=backward_passes_per_step)
    passes = Passes(optimizer, named, backward_passes_per_step, _same_passes)
    passes.attach(Reducer(named, compression.method, job.given, average=op is Average))
    return optimizer


def _same_passes(passes):
    """SpecError or MismatchError, on all ranks, for a number of passes that cannot be taken."""
    problem = None
    try:
        refuse_passes(passes)
    except SpecError as error:
        problem = str(error)
    together(_now().comm, "set_backward_passes_per_step", problem, passes=passes)


def _no_compression(found):
    """What is wrong with a compression=, in words, or None."""
    if isinstance(found, Compression):
        return None
    return (f"compression={found!r} found, expected hvd.Compression.none, .fp16 or a method of "
            'mpicomp: type  hvd.Compression.of("onebit")')


def _refuse(compression, passes, op, predivide, groups):
    """SpecError for an argument of DistributedOptimizer that cannot be honoured."""
    refuse_passes(passes)
    if problem := _no_compression(compression):
        raise SpecError(problem)
    if op not in (Average, Sum):
        raise SpecError(f"op={op!r} found, expected hvd.Average or hvd.Sum for gradients"
                        + (": mpicomp has no Adasum" if op is Adasum else ""))
    if predivide != 1.0:
        raise SpecError(f"gradient_predivide_factor={predivide!r} found, expected 1.0: leave it "
                        "out, for sums are made in float32 and divided once")
    if groups:
        raise SpecError("num_groups or groups found: leave it out, gradients travel in buckets of "
                        "25 MiB (bucket_bytes of mpicomp.Reducer)")


def _named(optimizer, named_parameters) -> list:
    """(name, parameter) of all that the optimizer steps on. SpecError for those without a name."""
    own = [p for group in optimizer.param_groups for p in group["params"]]
    if named_parameters is None:
        return [(f"parameter.{number}", p) for number, p in enumerate(own)]
    named = list(named_parameters)
    if not all(isinstance(pair, tuple) and len(pair) == 2 for pair in named):
        raise SpecError("named_parameters must be (name, parameter) pairs: pass "
                        "model.named_parameters(), not model.parameters()")
    ids, have = {id(p) for p in own}, {id(p) for _, p in named}
    missing = [p for p in own if id(p) not in have]
    if missing:
        raise SpecError(f"{len(missing)} parameters of the optimizer have no name, the first of "
                        f"shape {list(missing[0].shape)}: pass model.named_parameters() of the "
                        "whole model")
    return [(name, p) for name, p in named if id(p) in ids]


def broadcast_parameters(params: Mapping[str, Any] | Iterable[Any], root_rank: int) -> None:
    """Give every rank root_rank's values of a state_dict, named parameters or tensors, in place."""
    job = _now()
    together(job.comm, "broadcast_parameters", root=root_rank)
    start_values.broadcast_parameters(params, job.given, root_rank)


def broadcast_optimizer_state(optimizer: torch.optim.Optimizer, root_rank: int) -> None:
    """Give every rank root_rank's optimizer state and options, learning rates included."""
    job = _now()
    together(job.comm, "broadcast_optimizer_state", root=root_rank)
    start_values.broadcast_optimizer_state(optimizer, job.given, root_rank)


# ---- tensors ----


def allreduce(tensor: torch.Tensor, average: bool | None = None, name: str | None = None,
              compression: Compression = Compression.none, op: Op | None = None,
              prescale_factor: float = 1.0, postscale_factor: float = 1.0) -> torch.Tensor:
    """The mean over ranks of a tensor (op: hvd.Sum, Min, Max, Product), as a new tensor.

    tensor            numbers of any dtype and shape, the same on all ranks
    average           the older form of op: True for Average, False for Sum
    name              compared over ranks
    compression       none, fp16 or a method without a residual; others, and exchanges or options
                      by which the mean comes late or not at all, are refused. Methods that draw
                      draw anew in each call
    prescale_factor   the tensor is multiplied by it before
    postscale_factor  and the result after

    16-bit floats are scaled and summed in float32 and rounded once; means of integers, and those
    with a factor, are cut towards zero once. A mean or sum can be differentiated. NaN and Inf are
    added up as in Horovod; with a compression, where they cannot be, NonFiniteError names the rank
    and speaks of a gradient, whatever the tensor is. Raises MismatchError on all ranks where they
    differ in anything, StallError if one does not come.
    """
    op, problem = tensors.operation(average, op)
    problem = problem or _no_compression(compression)
    is_tensor = isinstance(tensor, torch.Tensor)
    needed = is_tensor and tensor.requires_grad
    if not problem and needed and op not in (Average, Sum):
        problem = (f"allreduce with op={op.value} of a tensor that needs a gradient found: type  "
                   "tensor.detach()")
    if problem:
        together(_now().comm, "allreduce", problem)
    how = dict(op=op, name=name, before=prescale_factor, after=postscale_factor)
    there = partial(_reduced, **how)
    if compression != Compression.none and is_tensor and tensor.is_floating_point():
        there = partial(_compressed, method=compression.method, **how)
    return Exchanged.apply(tensor, there, there) if needed else there(tensor)


def _reduced(tensor, **arguments):
    return tensors.reduced(_now().comm, tensor, **arguments)


def _compressed(tensor, **arguments):
    return tensors.reduced_compressed(_now().comm, tensor, draws=_now().draws, **arguments)


def allreduce_(tensor: torch.Tensor, average: bool | None = None, name: str | None = None,
               op: Op | None = None, prescale_factor: float = 1.0,
               postscale_factor: float = 1.0) -> torch.Tensor:
    """`allreduce` in place; returns the tensor."""
    op, problem = tensors.operation(average, op)
    if problem:
        together(_now().comm, "allreduce", problem)
    found = _reduced(tensor, op=op, name=name, before=prescale_factor, after=postscale_factor)
    with torch.no_grad():
        return tensor.copy_(found)


def allgather(tensor: torch.Tensor, name: str | None = None) -> torch.Tensor:
    """The tensors of all ranks, one below the other in rank order; first sizes may differ.

    Its gradient is the mean over ranks, of this rank's rows, as in Horovod.
    """
    def there(tensor):
        found, span["first"] = tensors.gathered(_now().comm, tensor, name)
        return found

    def back(gradient):
        mean = _reduced(gradient, op=Average, name=name, before=1.0, after=1.0)
        return mean[span["first"]:span["first"] + len(tensor)]

    span: dict[str, int] = {}
    needed = isinstance(tensor, torch.Tensor) and tensor.requires_grad
    return Exchanged.apply(tensor, there, back) if needed else there(tensor)


def broadcast(tensor: torch.Tensor, root_rank: int, name: str | None = None) -> torch.Tensor:
    """root_rank's tensor on every rank, as a new tensor.

    Its gradient is the sum over ranks on root_rank, and zero elsewhere, as in Horovod.
    """
    def there(tensor):
        return broadcast_(tensor.detach().clone(), root_rank, name)

    def back(gradient):
        total = _reduced(gradient, op=Sum, name=name, before=1.0, after=1.0)
        return total if rank() == root_rank else torch.zeros_like(total)

    needed = _a_tensor(tensor) and tensor.requires_grad
    return Exchanged.apply(tensor, there, back) if needed else there(tensor)


def _a_tensor(found):
    """True for a tensor; SpecError or MismatchError, on all ranks, for anything else."""
    if not isinstance(found, torch.Tensor):
        together(_now().comm, "broadcast", tensors.facts_of(found)["problem"])
    return True


def broadcast_(tensor: torch.Tensor, root_rank: int, name: str | None = None) -> torch.Tensor:
    """Overwrite a tensor with root_rank's; returns it."""
    if _a_tensor(tensor):
        broadcast_parameters([(name or "tensor", tensor)], root_rank)
    return tensor


# ---- objects ----


def broadcast_object(obj: Any = None, root_rank: int = 0, name: str | None = None) -> Any:
    """root_rank's object, which can be pickled, on every rank."""
    job, problem = _now(), None
    if root_rank not in range(job.comm.size):
        problem = (f"root_rank={root_rank} found, expected a rank from 0 to {job.comm.size - 1}")
    here = job.comm.rank == root_rank
    blob = tensors.pickled(job.comm, "broadcast_object", obj, here, problem, root=root_rank,
                           name=name)
    blob = mpi.bcast_bytes(job.comm, blob, "broadcasting an object", root_rank)
    return obj if here else pickle.loads(blob)


def allgather_object(obj: Any, name: str | None = None) -> list[Any]:
    """The objects of all ranks, which can be pickled, in rank order."""
    comm = _now().comm
    blob = tensors.pickled(comm, "allgather_object", obj, name=name)
    return [pickle.loads(one) for one in mpi.allgather(comm, blob, "gathering objects")]


# ---- handles ----


@dataclass(frozen=True)
class Handle:
    """What the asynchronous calls return: the exchange was made in the call, this is its result."""

    result: torch.Tensor


def allreduce_async(tensor: torch.Tensor, average: bool | None = None, name: str | None = None,
                    op: Op | None = None, prescale_factor: float = 1.0,
                    postscale_factor: float = 1.0) -> Handle:
    """`allreduce`, whose result `synchronize` gives. All ranks make such calls in one order."""
    return Handle(allreduce(tensor, average, name, Compression.none, op, prescale_factor,
                            postscale_factor))


def allreduce_async_(tensor: torch.Tensor, average: bool | None = None, name: str | None = None,
                     op: Op | None = None, prescale_factor: float = 1.0,
                     postscale_factor: float = 1.0) -> Handle:
    """`allreduce_`, whose result `synchronize` gives."""
    return Handle(allreduce_(tensor, average, name, op, prescale_factor, postscale_factor))


def allgather_async(tensor: torch.Tensor, name: str | None = None) -> Handle:
    """`allgather`, whose result `synchronize` gives."""
    return Handle(allgather(tensor, name))


def broadcast_async(tensor: torch.Tensor, root_rank: int, name: str | None = None) -> Handle:
    """`broadcast`, whose result `synchronize` gives."""
    return Handle(broadcast(tensor, root_rank, name))


def broadcast_async_(tensor: torch.Tensor, root_rank: int, name: str | None = None) -> Handle:
    """`broadcast_`, whose result `synchronize` gives."""
    return Handle(broadcast_(tensor, root_rank, name))


def poll(handle: Handle) -> bool:
    """Is it complete? It is when the call has returned."""
    return isinstance(handle, Handle)


def synchronize(handle: Handle) -> torch.Tensor:
    """The result of an asynchronous call."""
    return handle.result
