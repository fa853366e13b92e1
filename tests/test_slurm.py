"""Job scripts do the right thing whatever ends them, with stand-ins for what Slurm would bring."""

import importlib.machinery
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ranks import JOB

import mpicomp
from mpicomp import cli, slurm

ROOT = Path(__file__).resolve().parent.parent
JOBS = ROOT / "jobs"
SCRIPTS = sorted(JOBS.glob("*.sbatch"))
FIXED = dict(name="job", nodes=2, ranks_per_node=1, cpus=3, time="10:00")

scripts = pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)


def made(**changes):
    """A script for "python train.py" with srun and pmix, and two nodes."""
    options = dict(command=["python", "train.py"], mpi="pmix") | FIXED | changes
    return slurm.script(options.pop("command"), **options)


def check(path):
    subprocess.run(["bash", "-n", path], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "--shell=bash", "--severity=warning", path], check=True)


# ---- what the scripts say


@scripts
def test_the_shell_accepts_it_and_sbatch_sees_every_directive(path):
    check(path)
    text = path.read_text()
    before, commands = re.split(r"^(?=[^#\n])", text, maxsplit=1, flags=re.MULTILINE)
    assert "#SBATCH" not in commands  # sbatch reads none behind the first command
    said = re.findall(r"^#SBATCH (--[\w-]+)", before, re.MULTILINE)
    assert len(set(said)) == len(said)
    assert {"--nodes", "--ntasks-per-node", "--cpus-per-task", "--time", "--output"} <= set(said)
    output = re.search("--output=(.*)", before)[1]
    assert "%j" in output or "%A" in output and "%a" in output  # a log of its own for each job
    if "--requeue" in said:
        assert "--open-mode" in said and "--signal=B:USR1@" in before


@pytest.mark.parametrize("name", ["train", "gpu"])
def test_those_written_by_hand_end_as_those_that_are_made(name):
    text = (JOBS / f"{name}.sbatch").read_text()
    assert text.endswith("\n" + slurm.END)
    assert "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK" in text
    assert made().endswith("\n" + slurm.END)
    for script in text, made(setup=["module load x"]):  # before anything that takes time
        assert f"\nset -uo pipefail\n\n{slurm.TRAPS}" in script


def test_the_launchers_written_by_hand_are_those_that_are_made():
    text = " ".join((JOBS / "train.sbatch").read_text().split())
    for launcher in ("pmix", "pmi2"):
        assert slurm.LAUNCHERS[launcher].replace("=cores", '="$bind"') in text
    words = slurm.LAUNCHERS["mpirun"].removeprefix("mpirun ")
    assert all(word in text for word in re.split(" (?=--)", words))


# ---- what they do, with a launcher of the test's own


@pytest.fixture
def job(tmp_path):
    """job(script, ranks): start a script whose srun and mpirun are the shell commands `ranks`."""
    programs = tmp_path / "programs"
    programs.mkdir()
    started = []

    def job(script, ranks, scontrol='echo "scontrol $*"', **variables):
        for name, text in (("srun", ranks), ("mpirun", ranks),
                           ("scontrol", scontrol)):
            (programs / name).write_text(f"#!/bin/bash\n{text}\n")
            (programs / name).chmod(0o755)
        environment = {key: value for key, value in os.environ.items()
                       if not key.startswith(("SLURM", "MPICOMP_"))}
        environment |= dict(PATH=f"{programs}:{os.environ['PATH']}", SLURM_JOB_ID="7",
                            SLURM_JOB_NODELIST="n[1-2]", SLURM_NTASKS="2", SLURM_CPUS_PER_TASK="3",
                            MPICOMP_PYTHON=str(programs / "python")) | variables
        started.append(subprocess.Popen(["bash", script, "--data", "fsdd"], cwd=tmp_path,
                                        env=environment, text=True, stdout=subprocess.PIPE,
                                        stderr=subprocess.STDOUT))
        return started[-1]

    yield job
    for process in started:
        process.kill()


def finish(process):
    output = process.communicate(timeout=JOB)[0]
    return process.returncode, output


RESULT = "mkdir -p runs/slurm-7; touch runs/slurm-7/result.json; "
# Ranks that wait for a signal: trap it, say so, and end with the given status.
WAITS = ('trap "echo heard; exit {status}" {signal}; touch waiting; '
         "for i in {{1..200}}; do sleep 0.1; done")


@pytest.mark.parametrize("launch", ["pmix", "pmi2", "mpirun"])
def test_train_is_done_when_there_is_a_result(job, launch):
    code, output = finish(job(JOBS / "train.sbatch", RESULT + 'echo "[$*]"; echo $OMP_NUM_THREADS '
                              "$SRUN_CPUS_PER_TASK", MPICOMP_LAUNCH=launch))
    assert (code, output.splitlines()[-1]) == (0, "done")
    assert "--data fsdd --out runs/slurm-7 --resume]" in output and "\n3 3\n" in output
    assert ("-n 2 --map-by slot:PE=3 --bind-to core" if launch == "mpirun"
            else f"--mpi={launch}") in output


def test_status_0_without_a_result_is_a_failure(job):
    code, output = finish(job(JOBS / "train.sbatch", "exit 0"))
    assert code == 1 and "there is no runs/slurm-7/result.json" in output
    assert "scontrol requeue 7" in output.splitlines()[-1] and "\nscontrol" not in output


def test_the_result_of_another_start_does_not_count(job, tmp_path):
    subprocess.run(["bash", "-c", RESULT], cwd=tmp_path, check=True)
    code, output = finish(job(JOBS / "train.sbatch", "exit 9"))
    assert code == 9 and "failed: status 9" in output


def test_ranks_that_saved_are_requeued(job):
    code, output = finish(job(JOBS / "train.sbatch", "exit 75"))
    assert (code, output.splitlines()[-1]) == (0, "scontrol requeue 7")


@pytest.mark.parametrize("status", [75, 138])
def test_usr1_reaches_the_ranks_and_where_they_saved_or_did_not_listen_the_job_is_requeued(
        job, tmp_path, status):
    process = job(JOBS / "train.sbatch", WAITS.format(signal="USR1", status=status))
    until(tmp_path / "waiting")
    process.send_signal(signal.SIGUSR1)
    code, output = finish(process)
    assert code == 0
    said = output.splitlines()
    assert "USR1: passed on to the ranks" in said and "heard" in said
    assert said[-2:] == [f"status {status}; requeued, to go on from the newest checkpoint",
                         "scontrol requeue 7"]


@pytest.mark.parametrize("status, variables", [
    (1, {}), (0, {}), (110, {}), (138, dict(SLURM_RESTART_COUNT="10"))])
def test_usr1_and_another_status_is_a_failure_and_not_requeued_for_ever(
        job, tmp_path, status, variables):
    """A full disk, or ranks that never come as far as to listen."""
    process = job(JOBS / "train.sbatch", WAITS.format(signal="USR1", status=status), **variables)
    until(tmp_path / "waiting")
    process.send_signal(signal.SIGUSR1)
    code, output = finish(process)
    assert code == (status or 1) and f"failed: status {status}, and there is no" in output
    assert "\nscontrol requeue" not in output


@pytest.mark.parametrize("name, code, said", [
    ("SIGUSR1", 0, "status 138; requeued, to go on"),
    ("SIGTERM", 143, "ended by Slurm, status 143")])
def test_a_signal_before_there_are_ranks_is_not_lost(job, tmp_path, name, code, said):
    path = tmp_path / "made.sbatch"
    path.write_text(made(setup=["touch waiting; sleep 0.5"]))
    process = job(path, "echo begun")
    until(tmp_path / "waiting")
    process.send_signal(getattr(signal, name))
    found, output = finish(process)
    assert (found, said in output, "begun" in output) == (code, True, False), output


def test_a_job_that_was_preempted_with_grace_is_requeued(job):
    """Its ranks were told to end, the shell was not, and mpirun says 0 or 1."""
    told = 'echo " StartTime=2026-01-01T00:00:00 EndTime=x\n PreemptEligibleTime=2 PreemptTime=%s"'
    for when, expected in (("None", 1), ("2026-01-01T00:00:09", 0)):
        code, output = finish(job(JOBS / "train.sbatch", "exit 0", scontrol=told % when))
        assert code == expected and ("requeued" in output) == (not expected)


def test_what_term_ends_is_left_to_slurm(job, tmp_path):
    process = job(JOBS / "train.sbatch", "touch waiting; sleep 1; exit 75")
    until(tmp_path / "waiting")
    process.send_signal(signal.SIGTERM)  # which Slurm sends to the ranks as well
    code, output = finish(process)
    assert code == 75 and "ended by Slurm, status 75" in output and "scontrol" not in output


def until(path):
    while not path.exists():  # until the limit of this test
        time.sleep(0.02)
    time.sleep(0.1)


def test_an_unknown_launcher_is_refused(job):
    code, output = finish(job(JOBS / "train.sbatch", "", MPICOMP_LAUNCH="ssh"))
    assert code == 2 and output == "MPICOMP_LAUNCH=ssh: expected pmix, pmi2 or mpirun\n"


def test_a_sweep_passes_each_number_its_method(job, tmp_path):
    (tmp_path / "jobs").symlink_to(JOBS)
    run = 'shift $(($# - 7)); echo "[$*]"; mkdir -p "${@: -2:1}"; touch "${@: -2:1}/result.json"'
    for number, method in ((1, "onebit"), (2, "")):
        code, output = finish(job(JOBS / "sweep.sbatch", run, MPICOMP_METHODS="dense onebit",
                                  SLURM_ARRAY_JOB_ID="5", SLURM_ARRAY_TASK_ID=str(number)))
        if method:
            assert code == 0 and "--method onebit --data fsdd --out runs/sweep-5/1" in output
        else:
            assert code == 2 and "sbatch --array=0-1" in output


# ---- mpicomp launch


def test_a_made_script_runs_the_command_word_for_word(job, tmp_path):
    words = ["python", "my train.py", "--name=it's", "$HOME", "*"]
    path = tmp_path / "made.sbatch"
    path.write_text(made(command=words, setup=["hello=there", "export hello"]))
    check(path)
    code, output = finish(job(path, 'shift 4; printf "<%s>" "$@" "$hello"; echo'))
    assert code == 0 and "".join(f"<{word}>" for word in words) + "<there>\n" in output


def test_a_made_script_believes_the_file_or_where_there_is_none_the_status(job, tmp_path):
    path = tmp_path / "made.sbatch"
    for finished, ranks, expected in (("", "exit 0", 0), ("", "exit 3", 3), ("an end", "exit 0", 1),
                                      ("an end", "touch 'an end'", 0)):
        path.write_text(made(finished=finished, mpi="mpirun"))
        assert finish(job(path, ranks))[0] == expected, (finished, ranks)


def test_resources_are_what_was_asked_for():
    text = made(gpus_per_node=4, ranks_per_node=4, extra=["--partition=gpu"], warning=60)
    for word in ("--nodes=2", "--ntasks-per-node=4", "--cpus-per-task=3", "--gpus-per-task=1",
                 "--time=10:00", "--signal=B:USR1@60", "--partition=gpu"):
        assert f"\n#SBATCH {word}\n" in text
    assert "gpu" not in made()


@pytest.mark.parametrize("library, plugin", [
    ("Open MPI v5.0.11, package: x", "pmix"), ("MPICH Version:      5.0.2", "pmi2"),
    ("Intel(R) MPI Library 2021.11", "pmi2"), ("Something else", None)])
def test_the_plugin_follows_from_the_mpi_library(library, plugin):
    if plugin:
        assert slurm.launcher_for(library) == plugin
    else:
        with pytest.raises(mpicomp.LaunchError, match=r"'Something else'; choose with --mpi pmix"):
            slurm.launcher_for(library)


@pytest.mark.parametrize("words, problem", [
    ([], "nothing to run; put your command after --"),
    (["--", "srun", "x"], "srun comes from the script itself"),
    (["--gpus-per-node", "4", "--ranks-per-node", "2", "--", "x"], "one rank for each GPU"),
    (["--time", "soon", "--", "x"], "--time 'soon': expected minutes"),
    (["--time", "2", "--", "x"], "--time 2 --warning 180: the job would be told to save when"),
    (["--time", "0:02:00", "--warning", "120", "--", "x"], "less than the 120 seconds"),
    (["--name", "my job", "--", "x"], "--name 'my job': expected letters"),
    (["-o", "no/such/folder", "--", "x"], "no/such/folder: No such file or directory")])
def test_launch_refuses_with_what_to_type(words, problem, capsys):
    assert cli.main(["launch", "--slurm", "--mpi", "pmix", *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("mpicomp launch: ") and problem in said


@pytest.mark.parametrize("time, seconds", [
    ("3", 180), ("2:30", 150), ("1:00:05", 3605), ("1-2", 93600), ("1-2:30", 95400),
    ("1-2:30:04", 95404)])
def test_a_time_is_read_as_slurm_reads_it(time, seconds):
    made(time=time, warning=seconds - 1)
    with pytest.raises(mpicomp.LaunchError, match=f"less than the {seconds} seconds"):
        made(time=time, warning=seconds)
    made(time="0")  # no limit


def test_launch_writes_a_script_that_names_its_own_making(tmp_path, capsys):
    path = tmp_path / "a job.sbatch"
    words = ["launch", "--slurm", "--mpi=mpirun", "--name", "x", "-o", str(path), "--", "python",
             "t.py", "--resume"]
    assert cli.main(words) == 0
    said = capsys.readouterr()
    assert said.out == f"written; type: sbatch '{path}'\n" and "--finished FILE" in said.err
    assert "command=(python t.py --resume)\n" in path.read_text()
    assert "# Made by: mpicomp launch --slurm --mpi=mpirun --name x -o" in path.read_text()
    check(path)


# ---- jobs/local-slurm and the check, as far as they go without Slurm


def program(name):
    """A program of jobs/ as a module."""
    loader = importlib.machinery.SourceFileLoader(name.replace("-", "_"), str(JOBS / name))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    path = list(sys.path)
    loader.exec_module(module)
    sys.path[:] = path
    return module


@pytest.fixture
def local(monkeypatch):
    """jobs/local-slurm; local.says(words): how it refuses."""
    module = program("local-slurm")

    def says(*words):
        monkeypatch.setattr(sys, "argv", ["jobs/local-slurm", *words])
        with pytest.raises(SystemExit) as ended:
            module.main()
        return str(ended.value)

    module.says = says
    return module


def test_local_slurm_refuses_politely_without_root(local, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert re.search('need root; type: sudo env "PATH=.PATH" jobs/local-slurm up 4',
                     local.says("up", "4"))


def test_local_slurm_names_what_to_install(local, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(local.shutil, "which", lambda name: name != "slurmd")
    said = local.says("up")
    assert "no slurmd on PATH" in said and "apt-get install" in said and "slurm-wlm" in said


def test_local_slurm_says_when_nothing_is_up(local, monkeypatch, tmp_path):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(local.shutil, "which", lambda name: name)
    monkeypatch.setattr(local.Slurm, "is_up", lambda self: False)
    assert local.says("do", "squeue") == (
        "jobs/local-slurm: no local Slurm is up; type: jobs/local-slurm up 4")


def test_a_number_of_nodes_is_one(local, capsys):
    assert local.says("up", "none") == "2"
    assert "'none' is not a number of nodes" in capsys.readouterr().err


def test_the_table_of_the_check_tells_what_differs():
    row = dict(launch="pmix", case="requeued", disturbed_after=30, starts=2, resumed_at=[31],
               saved_on_signal=1, state="COMPLETED", parameters_sha256="f" * 64, equal=False)
    last = program("slurm_check.py").table([row]).splitlines()[-1]
    assert last == ("| pmix | requeued | 2 | 30 | 31 | yes | COMPLETED | ffffffffffff | **no** |")
