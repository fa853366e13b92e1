"""Runs the suite alone or under mpirun: which tests run where, and what they get.

    python -m pytest                           one process: all tests but those that need more ranks
    python -m pytest -n 2                      the same on two cores (pytest-xdist)
    launch/run -n 3 -m pytest                  three ranks: the tests marked mpi, with min_size <= 3
    ... --slow                                 with the tests that are marked slow
    ... --spread                               each case of a test on one of 2, 3 and 4 ranks, and
                                               one in four alone
    ... --results FILE                         each outcome is written there when it is known

    @pytest.mark.mpi                           runs alone and on any number of ranks
    @pytest.mark.mpi(min_size=2)               runs on two ranks or more
    @pytest.mark.mpi(sizes=(1, 3))             runs alone and on three ranks
    (no mark)                                  runs alone only: a serial test
    @pytest.mark.slow                          runs with --slow only
    @pytest.mark.limit(1200)                   seconds until it is taken for hanging, instead of 600

Every rank runs every test. One that failed on one rank has failed on all, and rank 0, the only one
that prints, shows every rank's traceback. No rank ever waits for ever: see ranks.py.
"""

import contextlib
import json
import os
import shutil
import socket
import tempfile
import zlib
from functools import partial
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
# What is slow may be a machine with much else to do.
unhurried = dict(deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.register_profile(
    "ranks", derandomize=True, database=None, **unhurried,
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate])
hypothesis.settings.register_profile("alone", **unhurried)
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


# ---- what is kept


class Results:
    """Writes each outcome as it comes: launch/test makes its report of them, whatever ends us."""

    def __init__(self, path):
        self.path = path

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or not report.passed:
            reason = report.longrepr[2] if report.skipped and isinstance(report.longrepr, tuple) \
                else report.longreprtext
            self.write(report, "" if report.passed else reason, report.duration)

    def pytest_collectreport(self, report):
        if report.failed:
            self.write(report, report.longreprtext)

    def write(self, report, text, seconds=0.0):
        cpu = dict(getattr(report, "user_properties", ())).get("cpu")
        line = dict(test=report.nodeid, outcome=report.outcome, seconds=seconds, cpu=cpu, text=text)
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")


# ---- hooks


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item, nextitem):
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    before = cpu_seconds()
    with contextlib.nullcontext() if item.config.option.usepdb else ranks.limited(item):
        reports = runtestprotocol(item, nextitem=nextitem, log=False)
    for report in reports:
        report.user_properties.append(("cpu", round(cpu_seconds() - before, 2)))
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


def cpu_seconds():
    """Of this process and of those that it has started and waited for."""
    return sum(os.times()[:4])


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run what is marked slow, too")
    parser.addoption("--spread", action="store_true",
                     help="run each case of a test on one of 2, 3 and 4 ranks only, and one in "
                     "four alone")
    parser.addoption("--results", metavar="FILE", help="write each outcome there as it is known")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    if SIZE > 1 and not config.option.basetemp:  # ranks would clean up what others look at
        config.option.basetemp = tempfile.mkdtemp(prefix=f"pytest-rank-{RANK}-")
        config.add_cleanup(partial(shutil.rmtree, config.option.basetemp, ignore_errors=True))
    ranks.stderr = os.dup(2)  # pytest captures 2 itself while tests run
    ranks.watch_for_sigterm()
    for marker in ("limit(seconds): when this test is taken for hanging", "slow: with --slow only"):
        config.addinivalue_line("markers", marker)
    worker = hasattr(config, "workerinput")  # of pytest-xdist: its controller hears all it finds
    if RANK == 0 and not worker and config.getoption("results"):
        config.pluginmanager.register(Results(config.getoption("results")))
    if RANK > 0:
        config.option.xmlpath = None
        config.pluginmanager.set_blocked("terminalreporter")


def pytest_sessionstart(session):
    session.config.option.with_mpi = True  # pytest-mpi would skip what is marked mpi


def pytest_report_header():
    library = MPI.Get_library_version().split(",")[0].splitlines()[0]
    packages = ", ".join(f"{name} {version(name)}" for name in ("mpi4py", "torch", "numpy"))
    return f"mpi: {SIZE} rank{'s'[:SIZE > 1]} on {socket.gethostname()}, {library}, {packages}"


def pytest_ignore_collect(collection_path):
    """Ranks do not import the files of which they would run nothing."""
    serial = (SIZE > 1 and collection_path.match("test_*.py")
              and "mark.mpi" not in collection_path.read_text())
    return serial or None


def pytest_collectreport(report):
    if report.failed:
        broken.append(report.longreprtext)


def pytest_collection_modifyitems(config, items):
    def may_run(item, size):
        if item.get_closest_marker("slow") and not config.getoption("slow"):
            return False
        marks = [mark.kwargs for mark in item.iter_markers("mpi")] or [{"sizes": (1,)}]
        return all(size >= mark.get("min_size", 1) and size in mark.get("sizes", (size,))
                   for mark in marks)

    here = [item for item in items if may_run(item, SIZE)]
    if config.getoption("spread"):
        others = elsewhere(items, may_run)
        here = [item for item in here if item not in others]
    kept = set(here)
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = here


SPREAD = (2, 3, 2, 3, 2, 4, 2, 3)  # the number of ranks that each case in turn is run on


def elsewhere(items, may_run, here=SIZE):
    """What is run on another number of ranks. Of a test's cases half are run on 2 ranks, where they
    take least, three eighths on 3, the others on 4, and a quarter on one rank, too; a test with one
    case is run on 1, on 2, and on 3 or 4.

    Cases are dealt out in the order of a digest, so that none of a test's parameters goes along
    with the number of ranks, and every case stays where it is when another test changes.
    """
    def digest(text):
        return zlib.crc32(text.encode())

    cases, others = {}, set()
    for item in items:
        cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for test, group in cases.items():
        alone = len(group) == 1
        group.sort(key=lambda item: digest(item.nodeid))
        for number, item in enumerate(group, digest(test)):
            sizes = [size for size in SPREAD if may_run(item, size) and not (alone and size == 2)]
            runs = {sizes[number % len(sizes)]} if sizes else {1}
            if alone or number % 4 == 0:
                runs.add(1)
            if alone:
                runs.add(2)
            if here not in runs:
                others.add(item)
    return others


# Files whose tests share what exists once: one of pytest-xdist's workers runs all of them.
TOGETHER = {"tests/test_cluster.py", "tests/test_data.py", "tests/test_train.py"}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):  # the scopes with most tests first
        _split_scope = staticmethod(scope_of)

    return Scheduling(config, log)


def scope_of(nodeid):
    """What a worker is given at a time: one test, or a file of TOGETHER."""
    file = nodeid.partition("::")[0]
    return file if file in TOGETHER else nodeid


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
