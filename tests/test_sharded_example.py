"""1-bit SGD between two ranks, both quantisations and both residuals, with numbers made by hand."""

import numpy as np
import pytest
from training import give, parameters

import mpicomp

GA = [[1, -2], [-3, 4], [2, -1], [0, 1]]
GB = [[2, 1], [1, -3], [-1, -1], [-4, 2]]
OWED = [  # after the first quantisation, of A and B
    [[0, -.5], [0, 1.5], [1, .5], [-1, -1.5]],
    [[.5, -.5], [-.5, -1], [1.5, 1], [-1.5, .5]],
]
# A owns column 0, whose sum [2.5 -1.5 -1.5 -1.5] has the means -1.5 and 2.5: nothing is owed.
# B owns column 1: [0 .5 -3.5 4] has the means -3.5 and 1.5, of 0, .5 and 4.
APPLIED = [[2.5, 1.5], [-1.5, 1.5], [-1.5, -3.5], [-1.5, 1.5]]
OWED2 = [[[0, 0]] * 4, [[0, -1.5], [0, -1], [0, 0], [0, 2.5]]]


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("wire", ["means", "cntk"])
def test_two_ranks_two_columns(wire, comm):
    pair = comm.Split(comm.rank // 2)
    if pair.size < 2:
        return
    named = parameters(w=(4, 2))
    reducer = mpicomp.Reducer(named, f"onebit:wire={wire},min_rows=1,exchange=sharded", pair,
                              average=False)
    give(named, [(GA, GB)[pair.rank]])
    reducer.finish()
    state = reducer.state_dict()
    assert named[0][1].grad.tolist() == APPLIED
    assert state["error/w"].tolist() == OWED[pair.rank]
    assert state["error2/w"].tolist() == OWED2[pair.rank]
    both = sum(pair.allgather(state["error/w"] + state["error2/w"])).numpy()
    assert (APPLIED + both == np.add(GA, GB)).all()
    # a packet of one column to the other owner, and one's own column's packet to all
    assert reducer.stats.calls == {"Ialltoallv": 32 + 12, "Iallgatherv": 32 + 12}


@pytest.mark.mpi(min_size=2)
def test_the_owner_may_add_its_own_gradient_as_it_is(comm):
    """own=raw: A's column 0 is 1 -3 2 0 + the B's quantised 1.5 1.5 -2.5 -2.5."""
    pair = comm.Split(comm.rank // 2)
    if pair.size < 2:
        return
    named = parameters(w=(4, 2))
    reducer = mpicomp.Reducer(named, "onebit:min_rows=1,exchange=sharded,own=raw", pair,
                              average=False)
    give(named, [(GA, GB)[pair.rank]])
    reducer.finish()
    # 2.5 -1.5 -.5 -2.5: means -1.5 and 2.5. Column 1 at B: -1.5 2.5 -1.5 2.5 of A + 1 -3 -1 2 of B
    # = -.5 -.5 -2.5 4.5: means -7/6 and 4.5.
    expected = [[2.5, -7 / 6], [-1.5, -7 / 6], [-1.5, -7 / 6], [-1.5, 4.5]]
    np.testing.assert_allclose(named[0][1].grad.numpy(), expected, atol=1e-6)
    state = reducer.state_dict()
    own = pair.rank
    assert not state["error/w"][:, own].any(), "what was added as it is leaves nothing owed"
    assert state["error/w"][:, 1 - own].tolist() == [row[1 - own] for row in OWED[own]]


@pytest.mark.mpi
@pytest.mark.parametrize("average", [True, False])
def test_adagrad_between_the_quantisations(average, comm):
    """History 0: g / (|g| + 1e-8) of the sum, a step and not a mean, whatever `average` says."""
    named = parameters(w=(4, 2))
    reducer = mpicomp.Reducer(named, "dense:exchange=sharded,adagrad=yes", comm, average=average)
    give(named, [GA])
    reducer.finish()
    np.testing.assert_allclose(named[0][1].grad.numpy(), np.sign(GA), atol=1e-6)
    named[0][1].grad = None
    give(named, [GA])
    reducer.finish()
    np.testing.assert_allclose(named[0][1].grad.numpy(), np.sign(GA) / np.sqrt(2), atol=1e-6)
