"""The test of the tests: compressors that break a law each, and the law that notices."""

from dataclasses import dataclass

import laws
import numpy as np
import pytest

from mpicomp.compressors.base import Compressor
from mpicomp.philox import uniform


@dataclass(frozen=True, repr=False)
class RandomK(Compressor):
    """Unbiased random-k: a quarter of the elements, four times as loud. Lossy, and no residual."""

    name = "randomk"
    unbiased = True

    def capacity(self, layout):
        return 4 * layout.size

    def encode(self, x, packet, layout, key, state):
        chosen = uniform(key, 0, x.size) < 0.25
        packet[:4 * x.size] = np.where(chosen, 4 * x, np.float32(0)).view(np.uint8)
        return 4 * x.size

    def decode_add(self, packet, out, layout, key, weight=1.0):
        self.expect(packet, 4 * layout.size)
        out += np.float32(weight) * packet.view(np.float32)


class RandomKWithFeedback(RandomK):
    """What must not be declared."""

    feedback = True


class Mute(RandomK):
    """Never says anything."""

    feedback, unbiased = True, False

    def encode(self, x, packet, layout, key, state):
        packet[:4 * x.size] = 0
        return 4 * x.size


class Biased(RandomK):
    """Random-k with its voice lowered by a tenth."""

    def decode_add(self, packet, out, layout, key, weight=1.0):
        super().decode_add(packet, out, layout, key, 0.9 * weight)


def test_random_k_is_unbiased_and_explodes_under_feedback():
    laws.unbiased(RandomK())
    laws.feedback_is_refused(RandomK())
    with pytest.raises(AssertionError, match="residual"):
        laws.residual_is_bounded(RandomKWithFeedback())


def test_the_laws_notice_silence_and_bias():
    with pytest.raises(AssertionError, match="residual"):
        laws.residual_is_bounded(Mute())
    with pytest.raises(AssertionError):
        laws.unbiased(Biased())


class Rude(RandomK):
    """Breaks one rule at a time."""

    def __init__(self, vice):
        object.__setattr__(self, "vice", vice)

    def encode(self, x, packet, layout, key, state):
        used = super().encode(x, packet, layout, key, state)
        if self.vice == "writes behind":
            packet[self.capacity(layout):][:1] = 1
        elif self.vice == "changes x":
            x += 1
        elif self.vice == "remembers":
            state.calls = getattr(state, "calls", 0) + 1
            packet[:min(used, 1)] = state.calls
        elif self.vice == "depends on rubbish":
            packet[:min(used, 1)] |= packet[used]
        elif self.vice == "random":
            packet[:used] = np.random.randint(0, 2, used)
        return used

    def decode_add(self, packet, out, layout, key, weight=1.0):
        if self.vice == "overwrites":
            out[...] = np.float32(weight) * packet.view(np.float32)
        elif self.vice == "ignores weight":
            super().decode_add(packet, out, layout, key)
        elif self.vice == "takes anything":
            whole = packet[:packet.size // 4 * 4].view(np.float32)[:out.size]
            out[:whole.size] += np.float32(weight) * whole
        else:
            super().decode_add(packet, out, layout, key, weight)


@pytest.mark.parametrize("vice", ["writes behind", "changes x", "remembers", "random",
                                  "depends on rubbish"])
def test_the_laws_notice_a_bad_encode(vice):
    with pytest.raises(AssertionError):
        laws.everywhere(laws.encode_is_pure, Rude(vice))


@pytest.mark.parametrize("vice", ["overwrites", "ignores weight"])
def test_the_laws_notice_a_bad_decode(vice):
    with pytest.raises(AssertionError):
        laws.everywhere(laws.decode_accumulates, Rude(vice))


def test_the_laws_notice_a_decoder_that_takes_anything():
    with pytest.raises(AssertionError):
        laws.damage_is_noticed(Rude("takes anything"))
