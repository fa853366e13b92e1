"""One rank never comes: it ends, sleeps or raises. Whoever waits for it is told, within a limit."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mpi4py import MPI
from test_launch import finish
from training import give, parameters, same_error

import mpicomp
import mpicomp.ddp
from mpicomp import checkpoint, mpi
from mpicomp.advice import advise
from mpicomp.errors import MismatchError, StallError
from mpicomp.mpi import shelf
from mpicomp.mpi.watchdog import STALLED

STALL = 0.4
two = pytest.mark.mpi(min_size=2)


@pytest.fixture
def comm():
    """One that is not freed: calls of ranks that gave up stay open on it."""
    return MPI.COMM_WORLD.Dup()


def reducer(comm, method="onebit", optimizer=False, **keywords):
    """A Reducer of a small model, after its first step."""
    named = parameters(a=(4, 3), b=5)
    made = mpicomp.Reducer(named, method, comm, **keywords)
    if optimizer:
        made.attach(torch.optim.SGD([p for _, p in named], lr=0.1))
    backward(made)
    made.finish()
    return made


def hurry(made):
    """From now on a Reducer waits for a short time only; before, all ranks were there."""
    if isinstance(made, mpicomp.Reducer):
        made.averager.link.pipeline.timeout = shelf.of(made.comm).timeout = STALL
    elif isinstance(made, MPI.Comm):
        shelf.of(made).timeout = STALL
    elif hasattr(made, "comm"):
        shelf.of(made.comm).timeout = STALL


def backward(made):
    named = made.averager.parameters
    give(named, [np.full(p.shape, 1.0 + made.comm.rank) for _, p in named])


def model():
    return torch.nn.Linear(3, 2)


def adam():
    made = torch.optim.Adam(model().parameters())
    for p in made.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    made.step()
    return made


# name -> (what all ranks do first, what one of them never comes to)
FIRST = {
    "Reducer": lambda comm: reducer(comm),
    "auto": lambda comm: reducer(comm, "auto"),
    "broadcast_parameters": lambda comm: mpicomp.broadcast_parameters(model(), comm),
    "broadcast_optimizer_state": lambda comm: mpicomp.broadcast_optimizer_state(adam(), comm),
    "HookState": lambda comm: mpicomp.ddp.HookState("onebit", comm),
    "init_process_group": lambda comm: mpicomp.ddp.init_process_group(comm, timeout=STALL),
    "Signals": lambda comm: checkpoint.Signals(comm),
    "save": lambda comm: checkpoint.save("nowhere", comm, 1, {}, {}),
}
LATER = {
    "finish": (reducer, lambda r: (backward(r), r.finish())),
    "finish dense": (lambda comm: reducer(comm, "dense"), lambda r: (backward(r), r.finish())),
    "finish sharded": (lambda comm: reducer(comm, "onebit:exchange=sharded"),
                       lambda r: (backward(r), r.finish())),
    "finish hierarchical": (lambda comm: reducer(comm, "onebit:exchange=hierarchical"),
                            lambda r: (backward(r), r.finish())),
    "flush": (reducer, lambda r: r.flush()),
    "flush server": (lambda comm: reducer(comm, "dropping:exchange=server", True),
                     lambda r: r.flush()),
    "deliver peers": (lambda comm: reducer(comm, "strom:tau=0.1,exchange=peers"),
                      lambda r: r.deliver()),
    "deliver server": (lambda comm: reducer(comm, "dropping:exchange=server", True),
                       lambda r: r.deliver()),
    "check_ratio": (lambda comm: reducer(comm, "strom:tau=0.5", require_ratio=1e-6),
                    lambda r: r.check_ratio()),
    "Recovery": (reducer, lambda r: mpicomp.Recovery(r, comm=r.comm)),
    "another Reducer": (lambda comm: (reducer(comm), comm)[1], reducer),
    "auto's measurements": (lambda comm: mpi.communicator(comm), lambda c: advise(c, 100)),
    "a broadcast's tensors": (lambda comm: mpi.communicator(comm),
                              lambda c: mpicomp.broadcast.broadcast_parameters(model(), c)),
    "shards": (lambda comm: reducer(comm, "dropping:exchange=server", True),
               lambda r: r.averager.link.exchange.shares(np.zeros(17, np.float32))),
    "node": (lambda comm: mpi.communicator(comm), mpi.node),
    "split": (lambda comm: mpi.communicator(comm), lambda c: mpi.split(c, "all", 0)),
    "part": (lambda comm: mpi.communicator(comm), lambda c: mpi.part(c, "one")),
    "agreed": (lambda comm: checkpoint.Signals(comm),
               lambda signals: (signals.post(), signals.agreed())),
}


def alone(comm, call):
    """The StallError of all ranks but the last, which is elsewhere until they have raised."""
    text = None
    if comm.rank < comm.size - 1:
        with pytest.raises(StallError) as caught:
            call()
        text = str(caught.value)
    comm.Barrier()
    return text


def is_told(text, comm):
    return text is None or f"{STALL:g} s" in text and (
        "another rank has ended" in text or f"rank {comm.size - 1}" in text)


@two
@pytest.mark.parametrize("known", [False, True], ids=["first", "later"])
@pytest.mark.parametrize("name", FIRST)
def test_a_first_call_that_one_rank_does_not_make(name, known, comm, monkeypatch):
    """`known`: all ranks have made a call before, and one stays away from the second."""
    if known:
        mpicomp.broadcast_parameters(model(), comm)
    monkeypatch.setenv("MPICOMP_STALL_TIMEOUT", str(STALL))
    text = alone(comm, lambda: FIRST[name](comm))
    assert is_told(text, comm), text


@two
@pytest.mark.parametrize("name", LATER)
def test_a_later_call_that_one_rank_does_not_make(name, comm, monkeypatch):
    prepare, call = LATER[name]
    ready = prepare(comm)
    hurry(ready)
    monkeypatch.setenv("MPICOMP_STALL_TIMEOUT", str(STALL))
    text = alone(comm, lambda: call(ready))
    assert is_told(text, comm), text


@two
def test_a_rank_that_comes_too_late_is_told_too(comm, monkeypatch):
    """The others have raised; it must not wait for them for ever."""
    mpicomp.broadcast_parameters(model(), comm)
    monkeypatch.setenv("MPICOMP_STALL_TIMEOUT", str(STALL))
    if comm.rank == comm.size - 1:
        comm.Barrier()
    with pytest.raises(StallError):
        reducer(comm)
    if comm.rank < comm.size - 1:
        comm.Barrier()


@two
def test_a_layer_without_a_shape_on_one_rank(comm):
    """LazyLinear, run once on rank 0 only: it was a hang, or an error on the others only."""
    lazy = torch.nn.LazyLinear(2)
    if comm.rank == 0:
        lazy(torch.ones(1, 3))
    for call in (lambda: mpicomp.broadcast_parameters(lazy, comm),
                 lambda: mpicomp.Reducer(lazy.named_parameters(), "dense", comm)):
        text = same_error(comm, MismatchError, call)
        assert "rank 1: 'weight' has no shape yet" in text and "on every rank" in text


def test_a_layer_without_a_shape_alone():
    for call in (lambda m: mpicomp.broadcast_parameters(m),
                 lambda m: mpicomp.Reducer(m.named_parameters(), "dense")):
        with pytest.raises(mpicomp.SpecError, match="'weight' has no shape yet"):
            call(torch.nn.LazyLinear(2))


# ---- whole programs, one launch each

START = """
import ctypes, os, sys, time
import mpi4py
import torch
LEVEL = None
if LEVEL:
    mpi4py.rc.thread_level = LEVEL
import mpicomp, mpicomp.mpi
stall = os.environ.pop("MPICOMP_STALL_TIMEOUT")  # not yet: to start may take longer
MPI = mpicomp.mpi.load()
rank, last = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size - 1
torch.manual_seed(0)
model = torch.nn.Linear(4, 3)

def lost_in_thought():
    time.sleep(100)

def steps(count):
    optimizer = mpicomp.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1),
                                             model.named_parameters(), "onebit")
    for step in range(count):
        optimizer.zero_grad()
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
    return optimizer.reducer
"""


@pytest.fixture
def program(tmp_path):
    """Runs such a program on ranks of a plain mpirun: exit status and output."""
    def run(ranks, text, stall=60, level=None):
        path = tmp_path / "program.py"
        path.write_text(START.replace("LEVEL = None", f"LEVEL = {level!r}") + text)
        mpirun = Path(sys.executable).with_name("mpirun")
        if not mpirun.exists():
            pytest.skip(f"no mpirun beside {sys.executable}")
        return finish(mpirun, "--allow-run-as-root", "--oversubscribe", "--mca",
                      "mpi_yield_when_idle", 1, "-n", ranks, sys.executable, path,
                      MPICOMP_STALL_TIMEOUT=str(stall), OMP_NUM_THREADS="1")

    return run


def test_an_exception_between_the_first_call_and_the_reducer_ends_all(program):
    status, output = program(2, """
mpicomp.broadcast_parameters(model)
if rank == last:
    raise ValueError("no such luck")
steps(1)
""")
    assert status == 1 and "[rank 1 of 2] ValueError: no such luck" in output, output
    assert "StallError" not in output


def test_a_rank_that_sleeps_before_the_reducer_says_where_it_is(program):
    status, output = program(2, """
mpicomp.broadcast_parameters(model)
os.environ["MPICOMP_STALL_TIMEOUT"] = stall
if rank == last:
    lost_in_thought()
steps(1)
""", stall=1)
    assert status == STALLED, output
    assert "StallError: rank 0 waited 1 s while starting a Reducer" in output
    assert "[rank 1 of 2] another rank waits for too long; this one is in no step of a" in output
    assert "in lost_in_thought" in output


def test_a_rank_that_ends_before_the_reducer_is_named(program):
    status, output = program(2, """
mpicomp.broadcast_parameters(model)
if rank == last:
    sys.exit()
mpicomp.mpi.watchdog.GRACE = 1.0
steps(1)
""")
    assert status == 1, output
    assert "MismatchError: rank 1 has ended, while rank 0 waits, starting a Reducer" in output


def test_a_rank_that_ends_early_is_named_where_mpi_has_no_threads(program):
    """It was noticed after stall_timeout only."""
    status, output = program(2, "steps(2 if rank == last else 3)", level="single")
    assert status == 1, output
    assert "MismatchError: rank 1 has ended after 2 steps, while others are in step 2" in output


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="timers of Linux")
def test_a_child_that_ends_is_no_rank_and_who_holds_pythons_lock_says_where_it_is(program):
    """A child that is forked leaves by way of Python's end, or with an exception; then a rank is
    in code that never gives Python's lock away, so that no thread of its can print anything."""
    status, output = program(2, """
from mpicomp.mpi import last_word
last_word.LEAST = 1.0
optimizer = steps(1).averager.optimizers[0]
optimizer.reducer.averager.link.pipeline.timeout = float(stall)
last_word.allow(float(stall))
for how in ("exit", "raise"):
    child = os.fork()
    if child == 0:
        try:
            if how == "raise":
                raise ValueError("of a child")
            mpicomp.mpi.watchdog._end()  # as atexit does
        except ValueError:
            sys.excepthook(*sys.exc_info())
        os._exit(0)  # and not by way of mpi4py's own end, which is MPI_Finalize
    os.waitpid(child, 0)
time.sleep(0.5)
left = optimizer.reducer.averager.link.watchdog.left
assert not left, left
print(f"rank {rank} goes on", flush=True)
def holds_the_lock():
    mutex = ctypes.create_string_buffer(64)
    for _ in range(2):  # the second waits for the first; no signal ends that
        ctypes.PyDLL(None).pthread_mutex_lock(mutex)
if rank == last:
    holds_the_lock()
model(torch.ones(2, 4)).sum().backward()
optimizer.step()
""", stall=2)
    assert "ValueError: of a child" in output
    assert "rank 0 goes on" in output and "rank 1 goes on" in output, output
    assert status == STALLED, output
    assert "rank 1 did not answer within 3 s" in output and "Python's lock" in output
    assert "in holds_the_lock" in output, output
