"""Collectives of single tensors, with Horovod's meaning, over one of this package's communicators.

Before anything is sent all ranks compare what they are about to do: 16 bytes a rank.
"""

import enum
import pickle

import torch

from mpicomp import mpi
from mpicomp.averager import Averager
from mpicomp.compressors import Residual, Rule
from mpicomp.transport.agree import agree

SMALL_FLOATS = (torch.float16, torch.bfloat16)  # MPI has no sum of these


class Op(enum.Enum):
    """What is made of the tensors of all ranks."""

    AVERAGE = "average"
    SUM = "sum"
    ADASUM = "adasum"
    MIN = "min"
    MAX = "max"
    PRODUCT = "product"


class Exchanged(torch.autograd.Function):
    """there(tensor), whose gradient is back(gradient): both are collective."""

    @staticmethod
    def forward(ctx, tensor, there, back):
        ctx.back = back
        return there(tensor)

    @staticmethod
    def backward(ctx, gradient):
        return ctx.back(gradient), None, None


def together(comm, call, problem=None, **facts):
    """Have all ranks come to the same call; `problem` is raised on all of them."""
    agree(comm, {"call": call, **facts} | ({"problem": problem} if problem else {}),
          "every rank must make the same calls in the same order")


def facts_of(tensor, rows=True):
    """What must be the same of a tensor on all ranks, in words; without `rows` its first size."""
    if not isinstance(tensor, torch.Tensor):
        return {"problem": f"{type(tensor).__name__} found, expected a torch tensor: type  "
                           "torch.tensor(value)"}
    if tensor.layout is not torch.strided:
        return {"problem": f"a tensor of layout {tensor.layout} found, expected a dense one: type "
                           " tensor.to_dense()"}
    shape = list(tensor.shape) if rows else ["any", *tensor.shape[1:]]
    return {"dtype": tensor.dtype, "shape": str(shape)}


def reduced(comm, tensor, op, name, before, after):
    """A new tensor: `op` over all ranks of before * tensor, times `after`.

    16-bit floats are reduced in float32 and rounded once. Means of integers are made of sums in
    int64, with factors in float64, and cut to an integer once.
    """
    from mpi4py import MPI

    facts = facts_of(tensor)
    if "problem" not in facts and tensor.dtype is torch.bool:
        facts["problem"] = "a bool tensor found, expected numbers: type  tensor.to(torch.uint8)"
    if "problem" not in facts and op is Op.ADASUM:
        facts["problem"] = "op=Adasum found, which mpicomp has not: take hvd.Average or hvd.Sum"
    together(comm, "allreduce", name=name, op=op.value, factors=(before, after), **facts)
    work = tensor.detach().cpu()
    whole = not (work.is_floating_point() or work.is_complex())
    if work.dtype in SMALL_FLOATS:
        work = work.float()
    elif whole and before != 1.0:
        work = work.double()
    elif whole and op is Op.AVERAGE:
        work = work.long()  # the sum of narrow ones may not fit
    work = (work if before == 1.0 else work * before).clone(memory_format=torch.contiguous_format)
    flat = work.view(-1).numpy()
    how = {Op.AVERAGE: MPI.SUM, Op.SUM: MPI.SUM, Op.MIN: MPI.MIN, Op.MAX: MPI.MAX,
           Op.PRODUCT: MPI.PROD}[op]
    for piece in mpi.pieces(flat.size, flat.itemsize):
        mpi.wait(comm, comm.Iallreduce(MPI.IN_PLACE, flat[piece], how), mpi.limit(comm),
                 "allreduce of a tensor")
    if whole and after != 1.0:
        work = work.double()
    if op is Op.AVERAGE:
        work = torch.div(work, comm.size, rounding_mode="trunc" if work.dtype is torch.int64
                         else None)
    work = work if after == 1.0 else work * after
    work = work.long() if whole else work  # of a float beyond a narrow type C says nothing
    return work.to(tensor.dtype).to(tensor.device)


def _unfit(method):
    """Why a method cannot exchange one tensor once, in words, or None."""
    found = method.compressor
    cases = [case for _, case in found.inner] if isinstance(found, Rule) else [found]
    if any(isinstance(case, Residual) for case in cases):
        return "which keeps a residual for the next call"
    if method.name == "auto":
        return "which chooses a method for many steps"
    if method.warmup or method.delay:
        return "whose first steps are unlike the later ones"
    if method.asynchronous or method.owns or not method.carrier.cost(2).calls:
        return "by which no rank gets the mean in the same call"
    return None


def reduced_compressed(comm, tensor, op, name, method, before, after, draws):
    """`op` (mean or sum) over all ranks of before * tensor, times `after`, compressed.

    The factors are applied in float32. `draws` gives the seed of each call, alike on all ranks.
    """
    facts = facts_of(tensor)
    if "problem" not in facts and (unfit := _unfit(method)):
        facts["problem"] = (f"compression {method!r} found, {unfit}: give it to "
                            "DistributedOptimizer, or use mpicomp.Averager; here type  "
                            "Compression.fp16")
    if "problem" not in facts and op not in (Op.AVERAGE, Op.SUM):
        facts["problem"] = (f"op={op.value} with a compression found, expected hvd.Average or "
                            "hvd.Sum")
    together(comm, "allreduce", name=name, op=op.value, compression=repr(method),
             factors=(before, after), **facts)
    flat = tensor.detach().cpu().float().reshape(-1) * before
    averager = Averager({"tensor": flat}, method, comm, average=op is Op.AVERAGE,
                        seed=next(draws))  # after the ranks have met, so that all are at one number
    try:
        averager.average({"tensor": flat})
    finally:
        averager.close()
    return (flat * after).view(tensor.shape).to(tensor.dtype).to(tensor.device)


def gathered(comm, tensor, name):
    """(the tensors of all ranks, one below the other; the number of this rank's first row)."""
    facts = facts_of(tensor, rows=False)
    if "problem" not in facts and not tensor.dim():
        facts["problem"] = ("a tensor of shape [] found, expected one with rows: type  "
                            "tensor.reshape(1)")
    together(comm, "allgather", name=name, **facts)
    mine = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)  # a view's own rows
    parts = mpi.allgather(comm, mine, "allgather of a tensor")
    first = sum(len(part) for part in parts[:comm.rank])
    return torch.cat(parts).to(tensor.device), first


def pickled(comm, call, value, here=True, problem=None, **facts):
    """`value` as bytes, if `here`; what cannot be pickled is the same error on all ranks."""
    blob = b""
    try:
        blob = pickle.dumps(value) if here else blob
    except Exception as error:  # whatever it is, the others wait to hear of it
        problem = problem or f"a {type(value).__name__} that cannot be pickled ({error})"
    together(comm, call, problem, **facts)
    return blob


def operation(average, op):
    """(the Op that Horovod's two arguments name, None), or (None, what is wrong with them)."""
    if average is not None and op is not None:
        return None, "average= and op= found, expected one of them: leave out average"
    if op is None:
        return Op.SUM if average is False else Op.AVERAGE, None
    if not isinstance(op, Op):
        return None, (f"op={op!r} found, expected hvd.Average, hvd.Sum, hvd.Min, hvd.Max or "
                      "hvd.Product")
    return op, None
