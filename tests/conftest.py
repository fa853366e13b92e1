"""Runs the suite alone or under mpirun: which tests run where, and what they get.

    python -m pytest                           one process: all tests but those that need more ranks
    launch/run -n 3 -m pytest                  three ranks: the tests marked mpi, with min_size <= 3

    @pytest.mark.mpi                           runs alone and on any number of ranks
    @pytest.mark.mpi(min_size=2)               runs on two ranks or more
    (no mark)                                  runs alone only: a serial test
    @pytest.mark.limit(120)                    seconds it may take on each rank, instead of 60

Every rank runs every test. One that failed on one rank has failed on all, and rank 0, the only one
that prints, shows every rank's traceback. No rank ever waits for ever: see ranks.py.
"""

import contextlib
import os
import socket
import tempfile
from importlib.metadata import version

import hypothesis
import pytest
import ranks
from _pytest.runner import runtestprotocol
from mpi4py import MPI
from ranks import PASSED, RANK, SIZE, SUITE, WORLD

lent = []  # communicators that the running test got from a fixture
broken = []  # tracebacks of what could not be collected on this rank

# Ranks must draw the same examples, and shrinking on one rank only would strand the others.
hypothesis.settings.register_profile(
    "ranks", derandomize=True, database=None, deadline=None,
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate])
hypothesis.settings.register_profile("alone", deadline=None)
hypothesis.settings.load_profile("alone" if SIZE == 1 else "ranks")


# ---- what the tests get


@pytest.fixture
def comm():
    """A duplicate of COMM_WORLD for this test alone; freed when the test has passed everywhere."""
    lent.append(WORLD.Dup())
    return lent[-1]


@pytest.fixture(params=["self", "world", "dup"])
def any_comm(request):
    """COMM_SELF, COMM_WORLD and a duplicate of COMM_WORLD, in turn."""
    if request.param == "dup":
        return request.getfixturevalue("comm")
    return MPI.COMM_SELF if request.param == "self" else WORLD


# ---- hooks


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item, nextitem):
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    with contextlib.nullcontext() if item.config.option.usepdb else ranks.limited(item):
        reports = runtestprotocol(item, nextitem=nextitem, log=False)
    if SIZE > 1:
        ranks.agree(reports)
    for duplicate in lent:
        if duplicate != MPI.COMM_NULL and not any(report.failed for report in reports):
            duplicate.Free()
    lent.clear()
    for report in reports:
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def pytest_configure(config):
    ranks.stderr = os.dup(2)  # pytest captures 2 itself while tests run
    ranks.watch_for_sigterm()
    config.addinivalue_line("markers", "limit(seconds): what this test may take on each rank")
    if RANK > 0:
        config.option.xmlpath = None
        config.pluginmanager.set_blocked("terminalreporter")


def pytest_sessionstart(session):
    session.config.option.with_mpi = True  # pytest-mpi would skip what is marked mpi


def pytest_report_header():
    library = MPI.Get_library_version().split(",")[0].splitlines()[0]
    packages = ", ".join(f"{name} {version(name)}" for name in ("mpi4py", "torch", "numpy"))
    return f"mpi: {SIZE} rank{'s'[:SIZE > 1]} on {socket.gethostname()}, {library}, {packages}"


def pytest_collectreport(report):
    if report.failed:
        broken.append(report.longreprtext)


def pytest_collection_modifyitems(config, items):
    def runs_here(item):
        least = [mark.kwargs.get("min_size", 1) for mark in item.iter_markers("mpi")]
        return SIZE >= max(least) if least else SIZE == 1

    config.hook.pytest_deselected(items=[item for item in items if not runs_here(item)])
    items[:] = [item for item in items if runs_here(item)]


def pytest_collection_finish(session):
    """Ranks that would run different tests must not start."""
    if SIZE == 1:
        return
    ranks.meet(PASSED)
    tests = [item.nodeid for item in session.items]
    errors, lists = zip(*SUITE.allgather(("\n".join(broken), tests)), strict=True)
    if len(set(errors)) > 1 or any(tests != lists[0] for tests in lists):
        everywhere = set(tests).intersection(*lists)
        reason = "the ranks did not collect the same tests in the same order\n" + ranks.merge(
            [f"{len(tests)} tests, not everywhere: {sorted(set(tests) - everywhere)[:3]}\n{error}"
             for error, tests in zip(errors, lists, strict=True)])
        pytest.exit(reason, returncode=pytest.ExitCode.INTERRUPTED)


def pytest_keyboard_interrupt(excinfo):
    ranks.last_words.append(excinfo.exconly())
