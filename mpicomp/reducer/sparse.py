"""Sparse gradients, as of torch.nn.Embedding(sparse=True), that travel as rows and stay sparse.

Parameters named in Reducer(sparse=...) are in no bucket. Their gradients are coalesced on every
rank; then, in each step and for each of them, the ranks compare what their rows take with what the
dense gradient takes, and do what is less: gather all rows, or add up the dense gradient. Either
way float32, uncompressed and exact: no method has anything to say of a table of which a step
touches a thousandth, and nothing is owed. p.grad is the sparse mean afterwards; it is dense where
the gradient of any rank was. (A sparse gradient that is not named here travels in a bucket, and
p.grad is dense then: what Horovod calls sparse_as_dense.)
"""

import numpy as np
import torch

from mpicomp import mpi
from mpicomp.errors import SpecError
from mpicomp.names import known_as
from mpicomp.reducer.pending import Pending, plain
from mpicomp.reducer.slot import became, kind
from mpicomp.transport import packet
from mpicomp.transport.packet import Header

BUCKET = 0xFFFFFFFF  # in headers
DENSE = 1 << 62  # added to a number of rows: this rank's gradient was not sparse


def sparse_parameters(module: torch.nn.Module) -> list[str]:
    """The names of the weights of all embeddings in `module` that were made with sparse=True."""
    kinds = torch.nn.Embedding, torch.nn.EmbeddingBag
    return [f"{name}.weight" if name else "weight" for name, part in module.named_modules()
            if isinstance(part, kinds) and part.sparse and part.weight.requires_grad]


def divide(named, names, method):
    """(pairs that go into buckets, pairs that travel as rows, what is wrong or None)."""
    known = [name for name, _ in named]
    names = known_as(list(names), known)
    odd = [name for name in names if name not in known]
    scalar = [name for name, p in named if name in names and not p.dim()]
    problem = None
    if odd:
        problem = SpecError(f"sparse={odd[0]!r} found, expected names of parameters: there are "
                            + ", ".join(known))
    elif scalar:
        problem = SpecError(f"sparse={scalar[0]!r} found, a parameter of shape [], expected one "
                            "that has rows: leave it out, it then travels as the others do")
    elif names and method and (method.delay or "sparse" in method.carrier.lacks):
        problem = SpecError(f"sparse= needs a synchronous exchange without delay, found {method!r}")
    return ([pair for pair in named if pair[0] not in names],
            [pair for pair in named if pair[0] in names], problem)


class Table:
    """One parameter of `Sparse`, as changes.py looks at it: see `GradientSlot` in slot.py."""

    def __init__(self, name, parameter):
        self.name, self.parameter, self._kind = name, parameter, kind(parameter)
        self._handed = self._own = None
        self._version = 0

    @property
    def changed(self) -> str | None:
        """What the parameter has become since the Reducer was made, in words, or None."""
        return became(self.parameter, self._kind)

    def fill(self, finish):
        """A gradient has come. Where it is dense it waits for the mean; torch has no sparse ones
        that could."""
        self._own = self._handed = own = plain(self.parameter.grad)
        self._version = None if own is None else own._version
        if _is_dense(own):
            self._handed = self.parameter.grad = Pending.of(own, finish)

    def settle(self, finish) -> bool:
        """Is there a gradient, after all hooks?"""
        if not self.untouched:
            self.fill(finish)
        return self._handed is not None

    def give_back(self, mean):
        """Make p.grad the mean, also for who holds the tensor that waited for it."""
        if type(self._handed) is Pending and mean is not None:
            mean = self._own.copy_(mean)
        self.parameter.grad, self._handed, self._own = mean, None, None

    def clear(self):
        """There is no gradient."""
        self.parameter.grad = self._handed = self._own = None

    @property
    def untouched(self) -> bool:
        """Is p.grad as backward() has left it?"""
        now = self.parameter.grad
        return now is self._handed and (now is None or self._own._version == self._version)

    shows = untouched


class Sparse:
    """Gradients of (name, parameter) pairs that are in no bucket, exchanged when a step ends."""

    def __init__(self, gradients, named):
        self.gradients, self.named = gradients, named
        self.elements = sum(p.numel() for _, p in named)
        self._means = []
        self.tables = [Table(name, p) for name, p in named]

    def exchange(self, exchange, plan, weight) -> bool:
        """Gather and average what all ranks have; True if some gradient is not finite.

        Nothing changes before `give_back`. Raises MismatchError or StallError as buckets do.
        """
        if not self.named:
            return False
        own = [plain(p.grad) for _, p in self.named]
        grads = [_rows(p, grad) for (_, p), grad in zip(self.named, own)]
        bad = [name for (name, _), g in zip(self.named, grads) if not g.values().isfinite().all()]
        if bad:
            self.gradients.current.bad[BUCKET] = bad[0]
        rows = [g.indices().shape[1] + (DENSE if _is_dense(grad) else 0)
                for grad, g in zip(own, grads)]
        heads, counts = self._heads(exchange, plan, rows)
        if any(head.flags & packet.NONFINITE for head in heads):
            return True
        dense, counts = (counts & DENSE).any(0), counts & ~DENSE
        self._means = [self._mean(p, g, counts[:, i], weight)
                       for i, ((_, p), g) in enumerate(zip(self.named, grads))]
        for i, (_, p) in enumerate(self.named):
            if dense[i]:
                mean = self._means[i]
                self._means[i] = torch.zeros_like(p) if mean is None else mean.to_dense()
        return False

    def give_back(self):
        """Make p.grad the mean; None where no rank had a row."""
        for table, mean in zip(self.tables, self._means):
            table.give_back(mean)
        self._means = []

    def clear(self):
        """The step is skipped."""
        self._means = []
        for table in self.tables:
            table.clear()

    def _heads(self, exchange, plan, rows):
        """Every rank's header, and int64[ranks, parameters] with how many rows it has."""
        size = packet.SIZE + 8 * len(rows)
        mine, all_ = np.zeros(size, np.uint8), np.zeros(size * self.gradients.comm.size, np.uint8)
        flags = packet.NONFINITE if self.gradients.current.bad else 0
        Header(self.gradients.step, BUCKET, plan, 8 * len(rows), flags).write(mine)
        mine[packet.SIZE:].view(np.int64)[:] = rows
        self._wait("Iallgather", mine.nbytes, all_.nbytes - mine.nbytes,
                   self.gradients.comm.Iallgather(mine, all_))
        heads = exchange.read_headers(all_, range(0, all_.size, size))
        counts = [all_[at + packet.SIZE:at + size].view(np.int64)
                  for at in range(0, all_.size, size)]
        return heads, np.array(counts)

    def _mean(self, p, grad, counts, weight):
        """The sparse mean of a parameter's gradient over ranks, which have so many rows each."""
        width = p.numel() // max(1, p.shape[0])
        row, total = 4 + 4 * width, int(counts.sum())
        if not total:
            return None
        # an allreduce moves each element twice, and counts elements where a gather counts bytes
        if total * row < 8 * p.numel() and total * row <= mpi.largest():
            return self._gather(p, grad, counts, width, row, weight)
        dense = grad.to_dense().float().cpu().contiguous().numpy()
        whole = np.zeros_like(dense)
        self._wait("Iallreduce", dense.nbytes, dense.nbytes,
                   self.gradients.comm.Iallreduce(dense, whole))
        mean = torch.from_numpy(whole * np.float32(weight))
        return mean.to(p.device, p.dtype).to_sparse(1)

    def _gather(self, p, grad, counts, width, row, weight):
        """All rows of all ranks, those of one index added up in rank order."""
        mine = np.concatenate([
            grad.indices()[0].to(torch.int32).cpu().numpy().view(np.uint8),
            grad.values().float().cpu().contiguous().numpy().reshape(-1).view(np.uint8)])
        all_ = np.zeros(row * int(counts.sum()), np.uint8)
        lengths = [row * int(n) for n in counts]
        self._wait("Iallgatherv", mine.nbytes, all_.nbytes - mine.nbytes,
                   self.gradients.comm.Iallgatherv(mine, [all_, lengths]))
        indices, values, at = [], [], 0
        for n, length in zip(map(int, counts), lengths):
            part = all_[at:at + length]
            indices.append(part[:4 * n].view(np.int32).astype(np.int64))
            values.append(part[4 * n:].view(np.float32).reshape(n, width))
            at += length
        rows = torch.from_numpy(np.concatenate(values) * np.float32(weight))
        mean = torch.sparse_coo_tensor(
            torch.from_numpy(np.concatenate(indices))[None],
            rows.view(-1, *p.shape[1:]), p.shape, check_invariants=True).coalesce()
        return mean.to(p.device, p.dtype)

    def _wait(self, call, sent, received, request):
        g = self.gradients
        g.stats.reason = "sparse"
        g.stats.count(call, sent, received)
        mpi.wait(g.comm, request, g.link.timeout,
                 f"exchanging sparse gradients in step {g.step}")


def _is_dense(gradient) -> bool:
    return gradient is not None and not gradient.is_sparse


def _rows(parameter, grad):
    """The coalesced sparse gradient of a parameter, without rows where there is none."""
    if grad is None:
        where = parameter.device  # whatever torch.set_default_device says
        return torch.sparse_coo_tensor(torch.zeros(1, 0, dtype=torch.int64, device=where),
                                       torch.zeros(0, *parameter.shape[1:], device=where),
                                       parameter.shape, device=where,
                                       check_invariants=True).coalesce()
    return (grad if grad.is_sparse else grad.to_sparse(1)).coalesce()
