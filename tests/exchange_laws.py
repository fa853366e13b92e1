"""The laws that every synchronous exchange obeys: each takes its name and raises AssertionError.

`check(exchange, comm)` runs them all, on every rank; an exchange that is defined elsewhere can be
held to them, too. `exchange` may have options: "sharded,own=raw".
"""

import numpy as np
from training import give, parameters, replicas_are_identical, same_error, whole_numbers
from training import train as train_network

import mpicomp

SHAPES = {"w": (40, 5), "b": (40,), "k": (5, 2, 3)}
CARRIED = ("onebit", "strom:tau=0.05", "dropping:rate=0.95", "dorefa:feedback=yes")
SHARED = ("terngrad", *CARRIED)  # with random numbers, and scales that all ranks share


def joined(spec, options):
    """The specification with more options."""
    return spec + ("," if ":" in spec.rpartition(")")[2] else ":") + options


def exchanged(reducer, named, rank, steps, scale=0.05):
    """(given here, applied, the largest number on the way) by parameter, over so many steps."""
    rng = np.random.default_rng(rank)
    given, applied = ([np.zeros(p.shape) for _, p in named] for _ in range(2))
    largest = 0.0
    for _ in range(steps):
        gradients = [(scale * rng.normal(size=p.shape)).astype(np.float32) for _, p in named]
        give(named, gradients)
        reducer.finish()
        for k, (_, p) in enumerate(named):
            given[k] += gradients[k]
            applied[k] += p.grad.numpy()
            largest = max(largest, np.abs(gradients[k]).max(), p.grad.abs().max().item())
            p.grad = None
    return given, applied, largest


def said_and_owed_is_given(spec, comm, steps=100):
    """What was applied + all residuals of all ranks is the sum of all gradients, to the rounding
    of float32 sums. Returns the state of this rank."""
    named = parameters(**SHAPES)
    reducer = mpicomp.Reducer(named, spec, comm, average=False, bucket_bytes=500)
    given, applied, largest = exchanged(reducer, named, comm.rank, steps)
    state = reducer.state_dict()
    owed = [sum(v.double().numpy() for kind, v in state.items() if kind.endswith(f"/{name}"))
            + np.zeros(p.shape) for name, p in named]
    total_owed, total_given = ([sum(parts) for parts in zip(*comm.allgather(part))]
                               for part in (owed, given))
    largest = max(largest, *(np.abs(part).max() for part in total_owed))
    # a step rounds twice at each sender, and at each of P additions, in two stages at most
    bound = steps * 4 * (comm.size + 1) * 2.0**-24 * 4 * largest
    for k in range(len(named)):
        np.testing.assert_allclose(applied[k] + total_owed[k], total_given[k], rtol=0, atol=bound)
        assert np.abs(applied[k]).max() > 0
    assert any(np.abs(part).max() > bound for part in total_owed), "nothing was owed: no test"
    return state


def conserves(exchange, comm):
    """Nothing is lost, with packets of fixed and of varying length."""
    for spec in CARRIED:
        said_and_owed_is_given(joined(spec, f"exchange={exchange}"), comm, 30)


def sums_are_exact(exchange, comm):
    """Whole numbers, which float32 holds: every rank gets their sum to the bit."""
    named = parameters(a=(3, 5), b=(), c=(17,), d=(2, 3, 2))
    reducer = mpicomp.Reducer(named, f"dense:exchange={exchange}", comm, average=False,
                              bucket_bytes=64)
    for step in range(3):
        give(named, [whole_numbers(comm.rank, step + k, p.numel())
                     for k, (_, p) in enumerate(named)])
        reducer.finish()
        for k, (_, p) in enumerate(named):
            expected = sum(whole_numbers(r, step + k, p.numel()) for r in range(comm.size))
            assert p.grad.reshape(-1).tolist() == expected.tolist()
            p.grad = None


def replicas_stay_identical(exchange, comm):
    """And a small network learns."""
    for spec in SHARED:
        model, losses = train_network(joined(spec, f"exchange={exchange}"), comm, steps=20)
        replicas_are_identical(comm, model)
        assert np.isfinite(losses).all()


def a_step_is_skipped_by_all(exchange, comm):
    """A NaN on one rank: no gradient anywhere, residuals as before, and the next step is right."""
    for spec in SHARED:
        named = parameters(**SHAPES)
        reducer = mpicomp.Reducer(named, joined(spec, f"exchange={exchange}"), comm,
                                  nonfinite="skip", bucket_bytes=500)
        exchanged(reducer, named, comm.rank, 2)
        before = reducer.state_dict()
        bad = [np.full(p.shape, np.nan if comm.rank == comm.size - 1 else 1) for _, p in named]
        give(named, bad)
        reducer.finish()
        assert all(p.grad is None for _, p in named)
        after = reducer.state_dict()
        assert all((before[key] == after[key]).all() for key in before if "/" in key)
        exchanged(reducer, named, comm.rank, 2)


def another_step_is_the_same_error_on_all(exchange, comm):
    """One rank is a step ahead: MismatchError, which names it, on every rank."""
    if comm.size == 1:
        return
    for spec in CARRIED:
        named = parameters(**SHAPES)
        reducer = mpicomp.Reducer(named, joined(spec, f"exchange={exchange}"), comm)
        exchanged(reducer, named, comm.rank, 2)
        reducer.averager.step += comm.rank == 1
        text = same_error(comm, mpicomp.MismatchError,
                          lambda: exchanged(reducer, named, comm.rank, 1))
        assert "rank 1 is at step 3, rank 0 at 2" in text


LAWS = (sums_are_exact, conserves, replicas_stay_identical, a_step_is_skipped_by_all,
        another_step_is_the_same_error_on_all)


def check(exchange, comm):
    """All laws."""
    for law in LAWS:
        law(exchange, comm)
