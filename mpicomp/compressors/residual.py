"""Residual: error feedback for any compressor. What was not sent is kept, and sent later."""

from dataclasses import dataclass

import numpy as np

from mpicomp import kernels
from mpicomp.compressors.base import Compressor, State
from mpicomp.compressors.options import check_options, option
from mpicomp.compressors.registry import register
from mpicomp.errors import SpecError


@register
@dataclass(frozen=True, repr=False)
class Residual(Compressor):
    """Encodes owed + gradient with the inner compressor and keeps the difference.

    The residual is held twice: `owed` after the last step that was applied, and `ahead` as it will
    be once the packet just encoded is applied. `commit` swaps them. So `encode` may be repeated,
    and a step that all ranks skip leaves no trace: nothing is lost.

    With decay < 1 old errors are forgotten: decay * owed + gradient is encoded, and what was said,
    what is owed and what was forgotten, (1 - decay) * owed in each step that was applied, together
    are what was given. SparseLoCo (arXiv 2508.15706) does so in place of an outer momentum, with
    0.95 in its code (tplr-ai/templar).

    Source: Seide, Fu, Droppo, Li, Yu, Interspeech 2014, section 3, with the old residual inside
    the difference as in CNTK's code (the paper's second line omits it).
    """

    name = "residual"
    inner: Compressor = option(None, "the compressor to wrap")
    decay: float = option(1.0, "what is owed is multiplied by this in each step; 1 forgets nothing",
                          least=0, most=1)

    def __post_init__(self):
        check_options(self)
        if not self.inner.feedback:
            raise SpecError(f"{self.inner.name} does not declare that its residual stays bounded: "
                            "error feedback may not wrap it; leave out feedback=yes")

    def capacity(self, layout):
        return self.inner.capacity(layout)

    def init(self, layout, like):
        zeros = kernels.of(like).zeros
        state = State(owed=zeros(layout.size), ahead=zeros(layout.size), sum=None,
                      inner=self.inner.init(layout, like))
        if self.inner.measure(state.owed, layout, state.inner) is not None:
            state.sum = zeros(layout.size)
        return state

    def measure(self, x, layout, state):
        if state.sum is None:
            return None
        state.sum[...] = state.owed
        if self.decay != 1:
            state.sum *= np.float32(self.decay)
        state.sum += x
        return self.inner.measure(state.sum, layout, state.inner)

    def encode(self, x, packet, layout, key, state):
        owed = state.owed
        if self.decay != 1:
            owed = state.ahead
            owed[...] = state.owed
            owed *= np.float32(self.decay)
        return self.inner.encode_owed(x, owed, packet, layout, key, state.inner, out=state.ahead)

    def decode_add(self, packet, out, layout, key, weight=1.0):
        self.inner.decode_add(packet, out, layout, key, weight)

    def decode_sum(self, payloads, out, layout, keys, weight=1.0):
        self.inner.decode_sum(payloads, out, layout, keys, weight)

    def persistent(self, state):
        return {"error": state.owed, **self.inner.persistent(state.inner)}

    def learn(self, payload, layout, key, state):
        self.inner.learn(payload, layout, key, state.inner)

    def commit(self, state):
        state.owed, state.ahead = state.ahead, state.owed
        self.inner.commit(state.inner)

    def split(self, packet, layout, borders):
        return self.inner.split(packet, layout, borders)

    core = property(lambda self: self.inner)
    can_split = property(lambda self: self.inner.can_split)
    fixed = property(lambda self: self.inner.fixed)
    summable = property(lambda self: self.inner.summable)
    agreed_by = property(lambda self: self.inner.agreed_by)
    most_ranks = property(lambda self: self.inner.most_ranks)

    def shared_bytes(self, layout):
        return self.inner.shared_bytes(layout)
