"""Who started this process: what launchers leave in the environment, and what is made of it."""

import os
import shlex
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from test_start import LAUNCHERS, python

import mpicomp
from mpicomp.errors import LaunchError
from mpicomp.mpi import start

OPEN_MPI, MPICH = "Open MPI v5.0.11", "MPICH Version: 5.0.2"
TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}


def refusal(library=OPEN_MPI, **told):
    """What is said to a process that is alone, or None."""
    try:
        start.refuse_lonely_ranks(library, told)
    except LaunchError as error:
        return str(error)


# ---- torchrun, accelerate launch and their like: N lonely trainings, exit status 0 -------------


@pytest.mark.parametrize("more, launcher", [
    ({}, "torchrun"), ({"ACCELERATE_MIXED_PRECISION": "no"}, "accelerate launch"),
    ({"SLURM_STEP_NUM_TASKS": "2"}, "torchrun"), ({"SLURM_STEP_NUM_TASKS": "1"}, "torchrun"),
    ({"OMPI_COMM_WORLD_SIZE": "1"}, "torchrun"), ({"PMI_SIZE": "1"}, "torchrun")])
def test_ranks_of_torchrun_are_refused(more, launcher):
    """Whatever it was started in itself: srun torchrun, mpirun -n 1 torchrun."""
    text = refusal(**TORCHRUN, **more)
    command = f"-n 2 {shlex.join(sys.orig_argv)}"
    for word in (f"{launcher} started 2 processes (WORLD_SIZE=2)", "alone", "mpirun", command):
        assert word in text
    assert "env -u" not in text


def test_one_process_of_torchrun_is_not_refused():
    assert refusal(**TORCHRUN | {"WORLD_SIZE": "1"}) is None
    assert refusal(WORLD_SIZE="1", RANK="0") is None


def test_launchers_of_torch_that_are_not_torchrun():
    """deepspeed, Lightning, Kubeflow and others set WORLD_SIZE; so may a shell, by mistake."""
    text = refusal(WORLD_SIZE="8", RANK="0")
    assert "a launcher of torch.distributed started 8 processes" in text
    assert "-n 8 " in text and "env -u WORLD_SIZE" in text
    assert refusal(WORLD_SIZE="8", OMPI_COMM_WORLD_SIZE="1") is None


def test_processes_that_were_spawned_are_refused(monkeypatch):
    """torch.multiprocessing.spawn tells them nothing, but their process group does."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    with pytest.raises(LaunchError, match=r"group of 4 processes.*alone.*no spawn.* -n 4 "):
        mpicomp.Reducer(torch.nn.Linear(2, 2).named_parameters(), "dense")
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    assert start.load()


def test_the_command_that_the_error_names_is_what_was_typed_and_works(tmp_path):
    path = tmp_path / "my script.py"
    path.write_text("import sys\nfrom mpicomp import mpi\n"
                    "print(mpi.load().COMM_WORLD.size, *sys.argv[1:])\n")
    clean = {k: v for k, v in os.environ.items() if not k.startswith((*LAUNCHERS, "WORLD_SIZE"))}
    words = [sys.executable, "-u", str(path), "--lr", "a b"]
    done = subprocess.run(words, env=clean | TORCHRUN, text=True, capture_output=True, timeout=500)
    assert done.returncode == 1
    said = done.stderr.splitlines()[-1].partition("type  ")[2]
    assert said.endswith(f" -n 2 {shlex.join(words)}")
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
            "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"}
    again = subprocess.run(said, shell=True, env=clean | root, text=True, capture_output=True,
                           timeout=500)
    assert again.stdout == 2 * "2 --lr a b\n", again.stderr


def test_a_command_that_cannot_be_typed_again_is_not_shown(monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["python", "-c", "first\nsecond"])
    assert refusal(**TORCHRUN).endswith(" -n 2 python script.py")


# ---- variables that a shell has left over ------------------------------------------------------


@pytest.mark.parametrize("library, told", [
    (OPEN_MPI, {"OMPI_COMM_WORLD_SIZE": "1", "SLURM_STEP_NUM_TASKS": "4"}),
    (OPEN_MPI, {"OMPI_COMM_WORLD_SIZE": "1", "PMI_SIZE": "4", "SLURM_STEP_NUM_TASKS": "4"}),
    (MPICH, {"PMI_SIZE": "1", "SLURM_STEP_NUM_TASKS": "4", "FLUX_JOB_SIZE": "4"}),
    (MPICH, {"PMI_SIZE": "1", "WORLD_SIZE": "4"})])
def test_what_mpi_says_outranks_what_slurm_has_left(library, told):
    """mpirun -n 1 in a shell of  srun -n 4 --pty bash  is a good start."""
    assert refusal(library, **told) is None


@pytest.mark.parametrize("library, told, variable", [
    (OPEN_MPI, {"SLURM_STEP_NUM_TASKS": "4"}, "SLURM_STEP_NUM_TASKS"),
    (OPEN_MPI, {"PMI_SIZE": "4"}, "PMI_SIZE"),
    (MPICH, {"OMPI_COMM_WORLD_SIZE": "4", "PMI_SIZE": "1"}, "OMPI_COMM_WORLD_SIZE"),
    (MPICH, {"PMI_SIZE": "4", "SLURM_STEP_NUM_TASKS": "4"}, "PMI_SIZE"),
    (OPEN_MPI, {"FLUX_JOB_SIZE": "4", "SLURM_STEP_NUM_TASKS": "1"}, "FLUX_JOB_SIZE")])
def test_lonely_ranks_are_refused_and_the_way_out_is_named(library, told, variable):
    text = refusal(library, **told)
    assert f"({variable}=4), but this process is alone" in text and library in text
    assert text.endswith(f"env -u {variable} {shlex.join(sys.orig_argv)}")


def test_the_way_out_works():
    code = "from mpicomp import mpi; mpi.load(); print('alone')"
    status, out, err = python(code, SLURM_STEP_NUM_TASKS="4")
    assert status == 1 and out == ""
    said = err.splitlines()[-1].partition("type  env ")[2]
    clean = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHERS)}
    again = subprocess.run(f"env {said}", shell=True, env=clean | {"SLURM_STEP_NUM_TASKS": "4"},
                           text=True, capture_output=True, timeout=500)
    assert again.stdout == "alone\n", again.stderr


# ---- mpi4py and MPI ----------------------------------------------------------------------------


def test_an_old_mpi4py_is_refused_by_its_version(monkeypatch):
    old = SimpleNamespace(__version__="3.1.4", __file__="/usr/lib/mpi4py/__init__.py")
    monkeypatch.setitem(sys.modules, "mpi4py", old)
    with pytest.raises(LaunchError, match="needs mpi4py 4 or newer, found 3.1.4") as caught:
        start.load()
    assert "pip install --upgrade mpi4py" in str(caught.value)


@pytest.mark.parametrize("code, words", [
    ("mpi4py.rc.initialize = False", ["not initialised", "MPI.Init_thread()"]),
    ("from mpi4py import MPI; MPI.Finalize()", ["MPI has ended", "call mpicomp before"])])
def test_mpi_that_is_not_running_is_an_error_and_not_the_end(code, words):
    """MPI itself would end the process, without a traceback."""
    status, out, err = python(
        f"import mpi4py; {code}\n"
        "import mpicomp, torch\n"
        "model = torch.nn.Linear(2, 2)\n"
        "for call in (mpicomp.broadcast_parameters,\n"
        "             lambda m: mpicomp.Reducer(m.named_parameters(), 'dense'),\n"
        "             lambda m: mpicomp.checkpoint.Signals(None, ()),\n"
        "             lambda m: mpicomp.checkpoint.save('nowhere', None, 1, {}, {}),\n"
        "             lambda m: mpicomp.ddp.init_process_group()):\n"
        "    try: call(model)\n"
        "    except mpicomp.LaunchError as error: print(error)\n")
    assert status == 0 and err == "" and len(out.splitlines()) == 5, (out, err)
    assert all(word in line for word in words for line in out.splitlines())


def test_mpi_that_the_user_initialises_is_taken():
    status, out, err = python("import mpi4py; mpi4py.rc.initialize = False\n"
                              "from mpi4py import MPI; MPI.Init_thread()\n"
                              "from mpicomp import mpi; print(mpi.communicator().size)\n"
                              "MPI.Finalize()")
    assert (status, out, err) == (0, "1\n", "")
