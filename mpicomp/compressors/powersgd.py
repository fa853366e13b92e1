"""PowerSGD: each matrix as two thin factors, of which one is common and MPI adds the other."""

from dataclasses import dataclass
from functools import lru_cache

from mpicomp import kernels, philox
from mpicomp.compressors.base import Compressor, State
from mpicomp.compressors.options import check_options, option
from mpicomp.compressors.registry import register

MOST_RANK = 32  # the kernels' bound on decoded factors relies on it


@register
@dataclass(frozen=True, repr=False)
class PowerSGD(Compressor):
    """The mean of all ranks' matrices, projected on `rank` orthonormal columns that they agree on.

    A tensor is a matrix M of shape[0] rows and all else as columns. With Q of the last step, ranks
    add up M Q; orth of this sum is P, the same everywhere. Each sends Q = M^T P of its own M, MPI
    adds these, and P times their mean is the mean of all M, projected. Their sum, orthonormalised,
    is the next step's Q (warm start). In the first step, and wherever a column of it is zero, Q is
    drawn from -1 to 1, alike on all ranks.

    A matrix of n x m is sent as it is where (n + m) * rank * rate >= n * m, and so is every vector.

    With error feedback a rank owes M - P Q^T with its own Q, which is a part of M and stays
    bounded. (PyTorch's hook takes the mean Q; what a rank owes then wanders off.) Only
    exchange=allreduce carries it, because the next step needs the sum.

    Source: Vogels, Karimireddy, Jaggi, NeurIPS 2019 (arXiv 1905.13727), Algorithm 1; the choice
    of what is sent as it is from PyTorch's powerSGD_hook (min_compression_rate).
    """

    name = "powersgd"
    source = "Vogels et al., NeurIPS 2019"
    feedback = True
    summable = "float32"
    agreed_by = "sum"

    rank: int = option(4, "columns that a matrix is projected on", least=1, most=MOST_RANK)
    rate: float = option(2.0, "a matrix is projected where that makes it smaller by more than this",
                         least=1)

    def __post_init__(self):
        check_options(self)

    def capacity(self, layout):
        """4 * (P floats, then Q floats of each projected matrix or all floats of another tensor).

        P of all projected matrices first, float32[rank][n] each, then of each tensor in order
        float32[rank][m], or its elements. P is agreed on before, and does not travel again.
        """
        return 4 * sum(kernels.reference.powersgd_sizes(parts(self, layout)))

    def shared_bytes(self, layout):
        return 4 * kernels.reference.powersgd_sizes(parts(self, layout))[0]

    def init(self, layout, like):
        """basis: Q of each matrix where that matrix lies in the layout; learnt: of the next step.
        """
        k = kernels.of(like)
        state = State(basis=k.zeros(layout.size), learnt=k.zeros(layout.size), fresh=False,
                      product=k.zeros(self.shared_bytes(layout) // 4))
        nothing = k.zeros(self.capacity(layout), "uint8")
        k.powersgd_learn(nothing, parts(self, layout), philox.common(philox.Key()), state.basis)
        return state

    def measure(self, x, layout, state):
        """float32[rank * n of each projected matrix]: M Q; None where there is no such matrix."""
        if not state.product.size:
            return None
        kernels.of(x).powersgd_project(x, parts(self, layout), state.basis, state.product)
        return state.product

    def encode(self, x, packet, layout, key, state):
        kernels.of(x).powersgd_encode(x, parts(self, layout), state.product, packet)
        return self.capacity(layout)

    def decode_add(self, packet, out, layout, key, weight=1.0):
        self.expect(packet, self.capacity(layout))
        kernels.of(out).powersgd_decode_add(packet, parts(self, layout), weight, out)

    def learn(self, payload, layout, key, state):
        self.expect(payload, self.capacity(layout))
        kernels.of(payload).powersgd_learn(payload, parts(self, layout), philox.common(key),
                                           state.learnt)
        state.fresh = True

    def persistent(self, state):
        """{"basis": Q of the next step}, the same on all ranks."""
        return {"basis": state.basis}

    def commit(self, state):
        if state.fresh:
            state.basis, state.learnt, state.fresh = state.learnt, state.basis, False


@lru_cache(maxsize=1024)
def parts(compressor, layout) -> tuple[tuple[int, int, int, int], ...]:
    """(start, rows, columns, rank) of each tensor; rank 0: it is sent as it is."""
    found = []
    for s in layout.segments:
        rows, columns = s.matrix
        projected = (rows + columns) * compressor.rank * compressor.rate < rows * columns
        found.append((s.start, rows, columns, compressor.rank * projected))
    return tuple(found)
