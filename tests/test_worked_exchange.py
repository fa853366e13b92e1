"""The papers' worked examples through the real exchanges of two ranks, A and B."""

import numpy as np
import pytest
from training import give, parameters

import mpicomp
from mpicomp import kernels, philox

pytestmark = pytest.mark.mpi(min_size=2)


@pytest.fixture
def pair(comm):
    """Ranks two by two; one that is left over has no partner."""
    return comm.Split(comm.rank // 2)


@pytest.fixture
def draws(monkeypatch):
    """Lets a test say what ranks A and B draw."""
    monkeypatch.setattr(kernels, "of", lambda array: kernels.reference)

    def choose(*by_rank):
        monkeypatch.setattr(philox, "uniform", lambda key, start, count: np.array(
            by_rank[key.rank], np.float32)[start:start + count])

    return choose


def exchange(spec, pair, *steps, average=False):
    """(p.grad after each step, the Reducer) of one parameter `w` with A's and B's gradients."""
    named = parameters(w=np.shape(steps[0][0]))
    reducer = mpicomp.Reducer(named, spec, pair, average=average)
    found = []
    for gradients in steps:
        give(named, [gradients[pair.rank]])
        reducer.finish()
        found.append(named[0][1].grad.numpy().copy())
        named[0][1].grad = None
    return found, reducer


def owed(reducer, kind="error"):
    return reducer.state_dict()[f"{kind}/w"].numpy()


# ---- TernGrad ---------------------------------------------------------------------------------

TERN = ([.5, -.25, .125, 0, -1, .75], [.25, -.5, .875, .125, .25, -.75])
TERN_DRAWS = ([.30, .40, .10, .50, .99, .80], [.60, .10, .90, .05, .20, .70])


@pytest.mark.parametrize("options, calls", [
    ("packing=2bit", {"Iallreduce": 4, "Iallgather": 32 + 4 + 2}),
    ("packing=planar", {"Iallreduce": 4, "Iallgather": 32 + 4 + 2}),
    ("packing=5trit", {"Iallreduce": 4, "Iallgather": 32 + 4 + 2}),
    ("exchange=allreduce", {"Iallreduce": 4 + 6, "Iallgather": 32}),
    ("exchange=allreduce,packing=int16", {"Iallreduce": 4 + 12, "Iallgather": 32})])
def test_terngrad(options, calls, pair, draws):
    """B's own scaler is 0.875, the shared one 1: the sum of codes is 1 -1 1 1 0 -1."""
    if pair.size < 2:
        return
    draws(*TERN_DRAWS)
    (mean,), reducer = exchange(f"terngrad:{options}", pair, TERN, average=True)
    assert mean.tolist() == [.5, -.5, .5, .5, 0, -.5]
    assert reducer.stats.calls == calls


# ---- 1-bit SGD --------------------------------------------------------------------------------

GA, GB = [[1, -2], [-3, 4], [2, -1], [0, 1]], [[2, 1], [1, -3], [-1, -1], [-4, 2]]
ONEBIT = "onebit:exchange=sharded,min_rows=1"


def test_onebit_with_adagrad_between_the_quantisations(pair):
    """History 0: the sum becomes its signs. Column 0: 1 -1 -1 -1, said as it is. Column 1: the sum
    0 .5 -3.5 4 becomes 0 1 -1 1, said as 2/3 2/3 -1 2/3."""
    if pair.size < 2:
        return
    (step,), reducer = exchange(f"{ONEBIT},adagrad=yes", pair, (GA, GB))
    third = 1 / 3
    expected = [[1, 2 * third], [-1, 2 * third], [-1, -1], [-1, 2 * third]]
    np.testing.assert_allclose(step, expected, atol=1e-6)
    second = [[0, 0]] * 4 if pair.rank == 0 else [[0, -2 * third], [0, third], [0, 0], [0, third]]
    np.testing.assert_allclose(owed(reducer, "error2"), second, atol=1e-6)
    history = np.zeros((4, 2))
    history[:, pair.rank] = [[2.5**2, 1.5**2, 1.5**2, 1.5**2], [0, .25, 3.5**2, 16]][pair.rank]
    np.testing.assert_allclose(owed(reducer, "adagrad"), history, atol=1e-6)


def test_onebit_says_the_residuals_of_both_stages_next(pair):
    """No gradient in the second step: A's first residual has the means -1, 1/3 and -1, 1."""
    if pair.size < 2:
        return
    nothing = np.zeros((4, 2))
    (first, second), reducer = exchange(ONEBIT, pair, (GA, GB), (nothing, nothing))
    if pair.rank == 0:
        third = 1 / 3
        np.testing.assert_allclose(
            owed(reducer), [[-third, .5], [-third, .5], [2 * third, -.5], [0, -.5]], atol=1e-6)
    rest = sum(pair.allgather(owed(reducer) + owed(reducer, "error2")))
    np.testing.assert_allclose(first + second + rest, np.add(GA, GB), atol=1e-5)


# ---- DoReFa -----------------------------------------------------------------------------------

DOREFA = ([.3, -.6, 0, .15], [-.2, .4, .1, -.3])
DOREFA_DRAWS = ([.7, .4, .6, .1], [.2, .8, .7, .3])  # sigma + 1/2


@pytest.mark.parametrize("options", ["packing=bits", "packing=int8", "exchange=allreduce",
                                     "exchange=allreduce,packing=int32"])
def test_dorefa(options, pair, draws):
    """Codes 2 0 2 1 and 1 3 2 1 with the shared scale 0.6."""
    if pair.size < 2:
        return
    draws(*DOREFA_DRAWS)
    (mean,), _ = exchange(f"dorefa:bits=2,{options}", pair, DOREFA, average=True)
    np.testing.assert_allclose(mean, [0, 0, .2, -.2], atol=1e-7)


# ---- Strom ------------------------------------------------------------------------------------


@pytest.mark.parametrize("coding, used", [("words", (8, 12)), ("2bit", (4, 4))])
def test_strom(coding, used, pair):
    """A sends words 3 and 4, B 1, 3 and 6."""
    if pair.size < 2:
        return
    gradients = [.4, 2.6, -1.2, 0, -.9, 1], [1.5, 1.5, 0, -2, 0, 0]
    (total,), reducer = exchange(f"strom:tau=1,coding={coding}", pair, gradients)
    assert total.tolist() == [1, 2, -1, -1, 0, 0]
    rest = ([.4, 1.6, -.2, 0, -.9, 1], [.5, .5, 0, -1, 0, 0])[pair.rank]
    np.testing.assert_allclose(owed(reducer), rest, atol=1e-6)
    assert reducer.stats.sent == 32 + used[pair.rank]


# ---- Dryden -----------------------------------------------------------------------------------

DRYDEN_A = [[4, 1], [-2, -3], [1, 2], [-1, -1]]
DRYDEN_B = [[1, 2], [2, -1], [-3, 5], [-5, 1]]


def test_dryden_two_stages(pair):
    """The owner's own gradient is not quantised; every message has two entries of a column."""
    if pair.size < 2:
        return
    (said,), reducer = exchange(
        "dryden:proportion=2,min_rows=1,exchange=sharded,own=raw", pair,
        (DRYDEN_A, DRYDEN_B))
    assert said.tolist() == [[4, 0], [0, -4], [0, 7], [-6, 0]]
    first = ([[0, 1], [0, 0], [0, 0], [0, -1]], [[1, 0], [0, 0], [-3, 0], [0, 0]])[pair.rank]
    second = ([[0, 0], [0, 0], [1, 0], [0, 0]], [[0, 2], [0, 0], [0, 0], [0, 1]])[pair.rank]
    assert owed(reducer).tolist() == first
    assert owed(reducer, "error2").tolist() == second
    rest = sum(pair.allgather(owed(reducer) + owed(reducer, "error2")))
    assert (said + rest == np.add(DRYDEN_A, DRYDEN_B)).all()
    used = 4 + 8 + 8  # count, two means, two words
    assert reducer.stats.sent == 32 + used + 32 + used


# ---- gradient dropping ------------------------------------------------------------------------


def test_dropping(pair):
    if pair.size < 2:
        return
    gradients = [.1, -.8, .3, .05, -.2, .6, -.05, .4], [0, -.5, 0, .7, .1, 0, .2, -.1]
    (total,), reducer = exchange("dropping:rate=0.75", pair, gradients)
    np.testing.assert_allclose(total, [0, -1.3, 0, .7, 0, .6, 0, 0], atol=1e-7)
    rest = ([.1, 0, .3, .05, -.2, 0, -.05, .4], [0, 0, 0, 0, .1, 0, .2, -.1])[pair.rank]
    np.testing.assert_allclose(owed(reducer), rest, atol=1e-7)
    assert reducer.stats.sent == 32 + 2 * 8


# ---- AdaComp ----------------------------------------------------------------------------------


def test_adacomp(pair):
    """Both ranks owe the example's residue (as if loaded from a checkpoint) and give its dW."""
    if pair.size < 2:
        return
    named = parameters(w=10)
    reducer = mpicomp.Reducer(named, "adacomp:bin=4", pair, average=False)
    state = reducer.state_dict()
    state["error/w"][:] = state["error/w"].new_tensor([.6, -.1, 0, .2, -.3, 0, .5, -.2, 0, 0])
    reducer.load_state_dict(state)
    give(named, [[.1, -.4, .05, .3, .1, -.2, -.1, -.35, 0, 0]])
    reducer.finish()
    scale = np.array([1, -1, 0, 1, 0, 0, 0, -1, 0, 0]) * (.7 + .55 + 0) / 3
    np.testing.assert_allclose(named[0][1].grad, 2 * scale, atol=1e-6)
    np.testing.assert_allclose(
        owed(reducer), [.283333, -.083333, .05, .083333, -.2, -.2, .4, -.133333, 0, 0], atol=1e-6)
    assert reducer.stats.calls == {"Iallgather": 32, "Iallgatherv": 4 + 4 + 4}  # four entries
