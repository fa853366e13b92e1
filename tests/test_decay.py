"""`decay=` of error feedback: what is owed fades, and what was forgotten is known."""

import numpy as np
import pytest
from exchange_laws import SHAPES
from laws import KEY, encode, pack, said_and_owed_is_given, same
from material import vectors
from training import give, parameters

import mpicomp
from mpicomp import SpecError, method
from mpicomp.compressors import Dropping, OneBit, Residual
from mpicomp.compressors.registry import from_spec


@pytest.mark.parametrize("decay", [0.95, 0.5, 0.0])
@pytest.mark.parametrize("spec", ["onebit", "strom:density=0.1", "dropping:rate=0.9", "adacomp",
                                  "dorefa:bits=3"])
def test_said_and_owed_and_forgotten_is_given(spec, decay):
    """Also where ranks agree on something first (`measure`), and where encoding is fused."""
    said_and_owed_is_given(from_spec(spec), decay=decay)


def test_it_is_the_decayed_residual_that_is_encoded():
    """With decay 1/2 a residual that is twice as long gives the same packet, to the bit."""
    layout, rng = vectors(257), np.random.default_rng(3)
    x, owed = (rng.standard_normal(257, np.float32) for _ in range(2))
    for spec in ("onebit", "strom:density=0.1", "dorefa"):
        plain, fading = (Residual(from_spec(spec), decay) for decay in (1.0, 0.5))
        states = [codec.init(layout, x) for codec in (plain, fading)]
        states[0].owed[...], states[1].owed[...] = owed, 2 * owed
        packets = [pack(codec, x, layout, state=state)
                   for codec, state in zip((plain, fading), states)]
        assert same(*packets) and same(states[0].ahead, states[1].ahead)


def test_a_step_that_is_given_up_forgets_nothing():
    """Encoding may be repeated; only `commit` makes the residual fade."""
    layout, codec = vectors(100), Residual(OneBit(), 0.5)
    x = np.random.default_rng(1).standard_normal(100, np.float32)
    state = codec.init(layout, x)
    pack(codec, x, layout, state=state)
    codec.commit(state)
    owed = state.owed.copy()
    first, second = (encode(codec, x, layout, KEY, state) for _ in range(2))
    assert same(first, second) and same(state.owed, owed)
    codec.commit(state)
    assert not same(state.owed, owed)


def test_it_is_an_option_of_every_method_with_a_residual():
    fading = method("onebit:decay=0.95,exchange=sharded")
    assert fading.compressor == Residual(OneBit(), 0.95) and "decay=0.95" in repr(fading)
    assert method(repr(fading)) == fading
    assert "decay" not in repr(method("onebit")) and method("onebit:decay=1") == method("onebit")
    assert method("bf16:feedback=yes,decay=0.5").compressor.decay == 0.5
    assert from_spec("residual(onebit):decay=0.5") == Residual(OneBit(), 0.5)
    rule = method("rule(*.bias:dropping:decay=0.9; residual(onebit):decay=0.5):exchange=sharded")
    assert [case for _, case in rule.compressor.inner] == [Residual(Dropping(), 0.9),
                                                           Residual(OneBit(), 0.5)]
    assert method(repr(rule)) == rule


@pytest.mark.parametrize("spec, words", [
    ("terngrad:decay=0.9", "terngrad: decay=0.9 found.*feedback=yes"),
    ("onebit:decay=0.9,feedback=no", "onebit: decay=0.9 found.*feedback=yes"),
    ("rule(*.bias:dense; onebit):decay=0.9", r"decay belongs to the cases.*onebit:decay=0.9"),
    ("onebit:decay=1.5", "decay=1.5 found, decay must be at most 1"),
    ("onebit:decay=-1", "decay=-1.0 found, decay must be at least 0")])
def test_what_cannot_be_is_refused(spec, words):
    with pytest.raises(SpecError, match=words):
        method(spec)


@pytest.mark.mpi
@pytest.mark.parametrize("spec", ["onebit:decay=0.75", "onebit:decay=0.75,exchange=sharded",
                                  "rule(b:dense; dropping:rate=0.9,decay=0.75)"])
def test_on_ranks_what_was_forgotten_is_a_quarter_of_what_was_owed(spec, comm):
    """Over all ranks, and in both stages: applied + owed + forgotten = given. A skipped step
    leaves all of it as it was."""
    named, rng = parameters(**SHAPES), np.random.default_rng(comm.rank)
    reducer = mpicomp.Reducer(named, spec, comm, average=False, nonfinite="skip")
    balance = {name: np.zeros(p.shape) for name, p in named}  # given - applied - forgotten

    def owed(name):
        """Of this rank, in all stages."""
        kinds = [f"{kind}/{name}" for kind in ("error", "error2")]
        state = reducer.state_dict()
        return sum((state[key].double().numpy() for key in kinds if key in state),
                   np.zeros(SHAPES[name]))

    for step in range(8):
        bad = step == 4
        gradients = [rng.standard_normal(p.shape, np.float32) for _, p in named]
        before = {name: owed(name) for name, _ in named}
        give(named, [g * np.nan for g in gradients] if bad else gradients)
        reducer.finish()
        for (name, p), g in zip(named, gradients):
            if bad:
                assert p.grad is None and (owed(name) == before[name]).all()
                continue
            applied = p.grad.double().numpy() / comm.size  # each rank's share of it
            balance[name] += g - applied - before[name] / 4
            p.grad = None
    for name, _ in named:
        left = comm.allreduce(balance[name] - owed(name))
        np.testing.assert_allclose(left, 0, atol=1e-4)
        assert np.abs(comm.allreduce(owed(name))).max() > 0.1 or name == "b" and "b:dense" in spec
