"""A compressor defined here in some 30 lines: found by name, held to the laws, trained with."""

from dataclasses import dataclass

import laws
import numpy as np
import pytest
import torch
from training import replicas_are_identical, train

import mpicomp
from mpicomp.compressor import Compressor, State, check_options, option, registry


@mpicomp.register
@dataclass(frozen=True, repr=False)
class Toy(Compressor):
    """Whole numbers from -`levels` to `levels` on a scale that all ranks share."""

    name = "toy"
    feedback = True
    summable = "int16"

    levels: int = option(3, "the largest code", least=1, most=100)

    def __post_init__(self):
        check_options(self)

    def capacity(self, layout):
        """float32 step, then an int16 code an element."""
        return 4 + 2 * layout.size

    def shared_bytes(self, layout):
        return 4

    def init(self, layout, like):
        return State(step=np.zeros(1, np.float32))

    def measure(self, x, layout, state):
        state.step[0] = np.abs(x).max(initial=0) / np.float32(self.levels)
        return state.step

    def encode(self, x, packet, layout, key, state):
        step = state.step[0] or np.float32(1)
        packet[:4] = state.step.view(np.uint8)
        packet[4:4 + 2 * x.size].view(np.int16)[:] = np.rint(x / step)
        return 4 + 2 * x.size

    def decode_add(self, packet, out, layout, key, weight=1.0):
        self.expect(packet, self.capacity(layout))
        step = np.float64(packet[:4].view(np.float32)[0])
        if not 0 <= step * 2**15 < 3e38:
            raise mpicomp.PacketError("toy: no such step")
        out += packet[4:].view(np.int16) * np.float32(step * weight)


def test_toy_is_found():
    assert registry()["toy"] is Toy
    assert "Whole numbers" in mpicomp.methods()["toy"]
    m = mpicomp.method("toy:levels=7")
    assert m.compressor.inner == Toy(levels=7) and m.feedback and m.exchange == "allgather"
    with pytest.raises(mpicomp.SpecError, match="levels=0 found, levels must be at least 1"):
        mpicomp.method("toy:levels=0")
    with pytest.raises(mpicomp.SpecError, match="'nope'.*levels=3"):
        mpicomp.method("toy:nope=0")


@pytest.mark.parametrize("levels", [1, 3, 100])
def test_toy_obeys_the_laws(levels):
    laws.check(Toy(levels=levels))


@pytest.mark.mpi
@pytest.mark.parametrize("spec", ["toy", "toy:levels=1,exchange=allreduce", "toy:feedback=no",
                                  "toy:levels=20,exchange=sharded"])
def test_toy_trains(spec, comm):
    model, losses = train(spec, comm, steps=40)
    replicas_are_identical(comm, model)
    assert sum(losses[-4:]) < 0.3 * sum(losses[:4])
    assert all(torch.isfinite(p).all() for p in model.parameters())
