"""Makes and reads runs of launch/train.py, and describes the machine they were made on."""

import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RUNS = ROOT / "runs" / "reproduce"


def folder_of(words, ranks):
    """The folder of a run; its name is a digest of the arguments and the number of ranks."""
    told = json.dumps([words, ranks])
    return RUNS / hashlib.sha256(told.encode()).hexdigest()[:16]


def perform(runs):
    """Make the missing ones of these runs (arguments, ranks): one MPI job for each number of ranks.

    Ends the program where a run fails, with the last lines of the job's log.
    """
    for ranks in sorted({ranks for _, ranks in runs}):
        todo = [words for words, r in runs if r == ranks
                and not (folder_of(words, r) / "result.json").exists()]
        if not todo:
            continue
        began = time.monotonic()
        print(f"  {len(todo)} runs on {ranks} ranks ...", end=" ", flush=True)
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            json.dump([[*words, "--out", str(folder_of(words, ranks)), "--resume"]
                       for words in todo], file)
            file.flush()
            log = RUNS / f"job-{ranks}.log"
            log.parent.mkdir(parents=True, exist_ok=True)
            with open(log, "w") as out:
                job = subprocess.run(
                    [sys.executable, "launch/run", "-n", str(ranks), "launch/sweep.py", file.name],
                    cwd=ROOT, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT)
        print(f"{time.monotonic() - began:.0f} s")
        if job.returncode:
            sys.exit(f"launch/reproduce: a run failed; the end of {log}:\n"
                     + "".join(log.read_text().splitlines(keepends=True)[-15:]))


def read(words, ranks):
    """The dictionary of a run's result.json, with the rows of its metrics.jsonl as "rows"."""
    folder = folder_of(words, ranks)
    rows = [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]
    return {**json.loads((folder / "result.json").read_text()), "rows": rows}


def environment(command):
    """A dictionary: the command that repeats a result, its date, commit, machine and versions."""
    commit = git("rev-parse", "--short", "HEAD") or "unknown"
    if git("status", "--porcelain", "launch", "mpicomp"):
        commit += " with changes"
    return dict(
        command=command, date=time.strftime("%Y-%m-%d"), commit=commit,
        machine=f"{os.cpu_count()} cores, {processor()}, no GPU",
        versions={name: metadata.version(name) for name in ("torch", "numpy", "mpi4py")}
        | {"python": platform.python_version()})


def git(*words):
    """What git prints about this checkout; an empty string where there is no repository."""
    return subprocess.run(["git", *words], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL).stdout.strip()


def processor():
    """The name of the CPU on Linux, elsewhere that of its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")),
                platform.machine())
