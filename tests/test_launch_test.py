"""launch/test counts what happened, keeps it whatever ends a run, and knows what a change needs."""

import importlib
import importlib.machinery
import importlib.util
import json
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import conftest
import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def launch_test(tmp_path, monkeypatch):
    """launch/test as a module, whose report goes to tmp_path."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.syspath_prepend(ROOT / "launch")
    loader = importlib.machinery.SourceFileLoader("launch_test", str(ROOT / "launch" / "test"))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    loader.exec_module(module)
    monkeypatch.setattr(module, "REPORT", tmp_path)
    return module


def line(test, outcome, text=""):
    return json.dumps(dict(test=test, outcome=outcome, seconds=0.5, text=text)) + "\n"


def test_outcomes_are_counted(launch_test, tmp_path):
    """What fails and then cannot be torn down has failed once."""
    (tmp_path / "ranks-2.jsonl").write_text(
        line("tests/test_a.py::test_one[x::y]", "passed") + line("tests/test_a.py::b", "skipped")
        + line("tests/test_a.py::c", "failed", "E  no\x1b") + line("tests/test_b.py", "failed")
        + line("tests/test_a.py::c", "failed", "teardown"))
    suite = launch_test.read(2, 1)
    assert launch_test.count(suite) == (1, 2, 1)
    first, _, failed, last = suite.findall("testcase")
    assert (first.get("classname"), first.get("name")) == ("tests.test_a", "test_one[x::y]")
    assert (last.get("classname"), last.get("name")) == ("tests.test_b", "tests/test_b.py")
    assert [f.text for f in failed.findall("failure")] == ["E  no", "teardown"]


@pytest.mark.parametrize("written, passed", [(None, 0), (line("a.py::b", "passed") + '{"te', 1)])
def test_a_run_that_ended_early_is_a_failure_and_keeps_its_results(launch_test, tmp_path, written,
                                                                   passed):
    if written:
        (tmp_path / "ranks-4.jsonl").write_text(written)
    suite = launch_test.read(4, 139)
    assert launch_test.count(suite) == (passed, 1, 0)
    assert f"exit code 139: after {passed} tests" in suite.find("testcase/error").get("message")


def test_what_a_run_has_found_when_its_time_is_over_is_reported(launch_test, tmp_path,
                                                                monkeypatch):
    """Its second test never ends: the outcome of the first is kept, and where the second was."""
    (tmp_path / "test_cut.py").write_text("import time\ndef test_first(): pass\n"
                                          "def test_second(): time.sleep(1000)\n")
    for name in ("conftest.py", "ranks.py"):
        (tmp_path / name).write_text((ROOT / "tests" / name).read_text())
    results, timers = tmp_path / "ranks-1.jsonl", []

    class Timer:  # time is over when the first outcome is there, however long that takes
        def __init__(self, *arguments):
            timers.append(arguments)

        start = cancel = lambda self: None

    def end():
        while not (results.exists() and len(timers) == 2):
            time.sleep(0.05)
        time.sleep(0.5)
        _, function, arguments = timers[0]
        function(*arguments)

    monkeypatch.setattr(launch_test.threading, "Timer", Timer)
    waiting = threading.Thread(target=end, daemon=True)
    waiting.start()
    ended = launch_test.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--rootdir", str(tmp_path),
         f"--results={results}", str(tmp_path)], tmp_path / "ranks-1.log", limit=7,
        show=False)
    waiting.join()
    assert [seconds for seconds, *_ in timers] == [12, 37]
    suite = launch_test.read(1, ended.code)
    assert ended.code == 128 + signal.SIGTERM and launch_test.count(suite) == (1, 1, 0)
    assert 0 < ended.cpu < 60 and ended.seconds > 0.5
    assert suite.find("testcase").get("name") == "test_first"
    assert "test_second was ended here:" in (tmp_path / "ranks-1.log").read_text()


def test_one_rank_runs_on_all_cores_unless_somebody_looks_on(launch_test, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1}, raising=False)
    assert launch_test.command(1, ["-x"], 10)[-3:] == ["-x", "-n", "4"]
    for words in ["--pdb"], ["-n", "4"]:
        assert launch_test.command(1, words, 10)[-len(words):] == words
    assert launch_test.command(2, [], 10).count("-n") == 1  # launch/run's own
    assert "--timeout=10" in launch_test.command(2, [], 10)


def test_files_whose_tests_share_something_stay_together():
    assert all((ROOT / file).exists() for file in conftest.TOGETHER)
    scope = conftest.scope_of
    assert scope("tests/test_cluster.py::test_a[1::2]") == scope("tests/test_cluster.py::test_b")
    assert scope("tests/test_ring.py::test_a[1::2]") != scope("tests/test_ring.py::test_a[2]")


def test_cases_are_spread_over_the_numbers_of_ranks():
    """Each case of many runs on one of the sizes that it may run on, half of them on 2, a quarter
    alone, too; a test with one case on 1, 2, and 3 or 4; a serial test where it can."""
    class Item:
        def __init__(self, nodeid):
            self.nodeid = nodeid

    def may_run(item, size):
        return size in dict(odd=(1, 3, 4), serial=(1,)).get(item.nodeid.partition("[")[0],
                                                            (1, 2, 3, 4))

    counts = dict(many=16, odd=8, serial=5)
    everything = [Item(f"{name}[{case}]") for name in counts for case in range(counts[name])]
    everything += [Item("one"), Item("another")]
    stays = {size: {item.nodeid for item in everything}
             - {item.nodeid for item in conftest.elsewhere(everything, may_run, size)}
             for size in (1, 2, 3, 4)}
    for single in "one", "another":
        found = [size for size in stays if single in stays[size]]
        assert found in ([1, 2, 3], [1, 2, 4])
    for name, shares in dict(many=(4, 8, 6, 2), odd=(2, 0, 6, 2), serial=(5, 0, 0, 0)).items():
        found = [{test for test in stays[size] if test.startswith(name)} for size in (1, 2, 3, 4)]
        assert tuple(map(len, found)) == shares
        assert len(set().union(*found)) == counts[name]


# ---- launch/test --changed


needs_git = pytest.mark.skipif(not shutil.which("git") or not (ROOT / ".git").exists(),
                               reason="no git, or no checkout of it")


@pytest.fixture
def affected(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "launch")
    return importlib.import_module("testing.affected")


FILES = {
    "mpicomp/__init__.py": '_HOME = {\n    "Reducer": "reducer",\n    "method": "catalogue",\n}',
    "mpicomp/reducer/__init__.py": "def f():\n    from mpicomp.exchange import exchange",
    "mpicomp/catalogue.py": "",
    "mpicomp/nn.py": "",
    "mpicomp/exchange/__init__.py": "import_module(f'mpicomp.exchange.{name}')",
    "mpicomp/exchange/peers.py": "from mpicomp import kernels",
    "mpicomp/kernels/__init__.py": "from mpicomp.kernels.cpu import library",
    "mpicomp/kernels/cpu/__init__.py": "",
    "mpicomp/kernels/cpu/library.py": "",
    "mpicomp/kernels/cpu/src/sums.h": "",
    "mpicomp/__main__.py": "from mpicomp import catalogue",
    "launch/run": "ROOT / 'hosts' / 'rank.py'",
    "launch/hosts/rank.py": "",
    "docs/ddp.md": "mpicomp.Reducer",
    "tests/helper.py": "import mpicomp\nmpicomp.Reducer",
    "tests/test_helped.py": '"""mpicomp.nn"""\nfrom helper import x',
    "tests/test_direct.py": "PROGRAM = '''\nimport mpicomp.nn\n'''",
    "tests/test_started.py": "run = LAUNCH / 'run'",
    "tests/test_page.py": "(ROOT / 'docs' / 'ddp.md').read_text()",
    "tests/test_module.py": "run([sys.executable, '-m', 'mpicomp', 'methods'])",
}


@pytest.mark.parametrize("changed, needed_by", [
    ("mpicomp/reducer/__init__.py", ["helped"]), ("mpicomp/exchange/peers.py", ["helped"]),
    ("mpicomp/kernels/cpu/src/sums.h", ["helped"]), ("mpicomp/catalogue.py", ["module"]),
    ("mpicomp/nn.py", ["direct"]), ("launch/run", ["started"]),
    ("launch/hosts/rank.py", ["started"]),
    ("docs/ddp.md", ["page"]), ("tests/helper.py", ["helped"]),
    ("tests/test_direct.py", ["direct"]),
    ("mpicomp/__init__.py", ["direct", "helped", "module"])])
def test_who_needs_a_file(affected, changed, needed_by):
    graph = affected.Graph(FILES, FILES.get)
    assert sorted(name for name in FILES if name.startswith("tests/test_")
                  and changed in graph.reach(name)) == [f"tests/test_{n}.py" for n in needed_by]


@needs_git
def test_a_change_selects_test_files(affected):
    """Of this very tree: a script, a module, one that is deleted, what all tests need, nothing."""
    launch = affected.tests(["launch/test"])
    assert {"tests/test_architecture.py", "tests/test_launch_test.py"} <= set(launch)
    assert len(launch) < 6
    ddp = affected.tests(["mpicomp/ddp/process_group/group.py"])
    assert "tests/test_ddp.py" in ddp and "tests/test_philox.py" not in ddp
    assert affected.tests(["mpicomp/of_old.py"]) == ["tests/test_architecture.py"]
    everything = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("tests/test_*.py"))
    assert affected.tests(["tests/ranks.py"]) == everything
    assert affected.tests([]) == []


@needs_git
def test_git_tells_what_has_changed(affected, tmp_path, monkeypatch):
    """Committed on a branch, not committed, new and deleted; not what main has done since."""
    monkeypatch.setattr(affected, "ROOT", tmp_path)

    def git(*words):
        return affected.git("-c", "user.name=x", "-c", "user.email=x", *words)

    git("init", "-q", "-b", "main")
    for name in "abcd":
        (tmp_path / name).write_text("1")
    git("add", "."), git("commit", "-qm", "1"), git("checkout", "-qb", "topic")
    (tmp_path / "a").write_text("2")
    git("commit", "-qam", "2")
    (tmp_path / "b").write_text("2")
    (tmp_path / "c").unlink()
    (tmp_path / "e").touch()
    assert affected.changed() == {"a", "b", "c", "e"}
