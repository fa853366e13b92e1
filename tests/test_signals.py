"""A signal to one rank, heard by all in the same step."""

import multiprocessing
import os
import signal
import time

import pytest
from mpi4py import MPI

from mpicomp import checkpoint


@pytest.mark.mpi
def test_a_signal_to_one_rank_is_heard_by_all_in_the_same_step(comm):
    before = signal.getsignal(signal.SIGUSR1)
    signals = checkpoint.Signals(comm, [signal.SIGUSR1])
    heard = []
    for step in range(5):
        signals.post()
        if step == 2 and comm.rank == comm.size - 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        heard.append(signals.agreed())
    assert heard == [0, 0, 0, signal.SIGUSR1, signal.SIGUSR1]
    signals.close()
    assert signal.getsignal(signal.SIGUSR1) == before


def sleep():
    time.sleep(1000)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2])  # SIGTERM is ranks.py's
def test_a_forked_child_is_ended_by_the_signal_as_before(number):
    before = signal.signal(number, signal.SIG_DFL)
    signals = checkpoint.Signals(MPI.COMM_SELF, [number])
    child = multiprocessing.get_context("fork").Process(target=sleep)
    child.start()
    try:
        time.sleep(0.2)
        os.kill(child.pid, number)
        child.join()
        assert child.exitcode == -number
        signals.post()
        assert signals.agreed() == 0    # it was not meant for this process
    finally:
        child.kill()
        signals.close()
        signal.signal(number, before)


def test_agreed_needs_post():
    signals = checkpoint.Signals(MPI.COMM_SELF, [])
    with pytest.raises(RuntimeError, match=r"call signals.post\(\) before it"):
        signals.agreed()


def test_a_handler_that_is_not_pythons_is_no_hindrance(monkeypatch):
    before = signal.getsignal(signal.SIGUSR1)
    with monkeypatch.context() as patch:
        patch.setattr(signal, "signal", lambda number, handler: None)   # as where C set one
        signals = checkpoint.Signals(MPI.COMM_SELF, [signal.SIGUSR1])
    try:
        signals.close()
        assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_repeated_signal_says_nothing_new_at_first_and_later_ends_the_process(monkeypatch):
    """Slurm sends two SIGTERM to ranks whose job it ends, one through srun."""
    clock, ended = [100.0], []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: ended.append(clock[0]))
    try:
        monkeypatch.setattr("mpicomp.checkpoint.signals.time.monotonic", lambda: clock[0])
        checkpoint.Signals(MPI.COMM_SELF, [signal.SIGUSR1])
        for seconds in (0, 1, 4.9, 5.1):
            clock[0] = 100.0 + seconds
            signal.raise_signal(signal.SIGUSR1)
        assert ended == [105.1]
    finally:
        signal.signal(signal.SIGUSR1, before)
