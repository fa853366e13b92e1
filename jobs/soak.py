#!/usr/bin/env python3
"""A long training that is killed and resumed on other numbers of ranks: nothing may leak or drift.

    python jobs/soak.py                                    20,000 steps on 4 ranks, then 3, then 4
    python jobs/soak.py --steps 2000 --ranks 2,3 --method onebit dryden --out FILE

Each method trains by itself. Each part of its steps but the last ends with SIGKILL to all ranks in
the middle of a step; the next goes on from the newest checkpoint, with what is owed divided anew
(mpicomp.checkpoint). Every 100 steps every rank notes its resident memory, open files, threads and
MPI requests that are not done, and all compare their parameters to the bit. Writes the figures as
JSON; status 1 if parameters differed, a request was left over, or memory or files grew after the
first tenth of a part.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from hashlib import blake2b
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EVERY = 100  # steps between two looks
GROWTH = 2048  # KiB of resident memory that may come and go


# ---- a rank ---------------------------------------------------------------------------------


def memory():
    """Resident memory of this process in KiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024


def remember_requests(wire, requests):
    """Keep every request that the exchange posts."""
    for name in ("allgather", "allgatherv", "allreduce", "alltoallv", "send", "receive"):
        def post(*arguments, inner=getattr(wire, name)):
            requests.append(inner(*arguments))
            return requests[-1]
        setattr(wire, name, post)


def train(options):
    """One rank of one part: from the newest checkpoint to step `options.to`."""
    import torch

    import mpicomp
    import mpicomp.mpi
    from mpicomp import checkpoint

    MPI = mpicomp.mpi.load()
    comm = MPI.COMM_WORLD.Dup()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.Tanh(), torch.nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    reducer = mpicomp.Reducer(model.named_parameters(), options.method[0], comm, bucket_bytes=4096,
                              seed=1).attach(optimizer)
    folder, start = Path(options.folder), 0
    if found := checkpoint.newest(folder):
        path, manifest = found
        shared, mine = checkpoint.load(path, comm.rank % manifest["ranks"])
        if manifest["ranks"] != comm.size:
            states = [part["reducer"] for part in checkpoint.each_rank(path)]
            mine["reducer"] = checkpoint.repartition(states, comm.size, keep="mean")[comm.rank]
        model.load_state_dict(shared["model"])
        optimizer.load_state_dict(shared["optimizer"])
        reducer.load_state_dict(mine["reducer"])
        start = shared["step"]
    requests = []
    remember_requests(reducer.averager.link.calls, requests)
    target = torch.randn(32, 10, generator=torch.Generator().manual_seed(7))
    for step in range(start, options.to):
        generator = torch.Generator().manual_seed(step * 64 + comm.rank)
        x = torch.randn(16, 32, generator=generator)
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), (x @ target).argmax(1))
        loss.backward()
        optimizer.step()
        if (step + 1) % EVERY == 0:
            look(comm, options, model, reducer, requests, start, step + 1, loss.item())
        if (step + 1) % options.save == 0:
            checkpoint.save(folder, comm, step + 1, shared=dict(
                step=step + 1, model=model.state_dict(), optimizer=optimizer.state_dict()),
                mine=dict(reducer=reducer.state_dict()), about={})


def look(comm, options, model, reducer, requests, start, step, loss):
    """A row of figures of all ranks, from rank 0."""
    from mpi4py import MPI

    from mpicomp import mpi

    total = blake2b(digest_size=8)
    for p in model.parameters():
        total.update(p.detach().numpy().tobytes())
    left = sum(request != MPI.REQUEST_NULL for request in requests) + len(mpi.abandoned())
    mine = dict(memory=memory(), files=len(os.listdir("/proc/self/fd")), requests=left,
                threads=len(os.listdir("/proc/self/task")), digest=total.hexdigest())
    posted = len(requests)
    requests.clear()
    rows = comm.gather(mine)
    if comm.rank == 0:
        row = {key: [rank[key] for rank in rows] for key in mine} | dict(
            step=step, start=start, ranks=comm.size, posted=posted, loss=loss,
            ratio=reducer.stats.ratio, notes=len(reducer.stats.notes))
        with open(options.rows, "a") as file:
            file.write(json.dumps(row) + "\n")


# ---- the whole ------------------------------------------------------------------------------


def part(options, method, folder, ranks, to, kill):
    """Run one part; where it is to be `kill`ed, that is done once step `to` has passed."""
    rows = Path(folder, f"rows-{to}.jsonl")
    command = [sys.executable, str(ROOT / "launch" / "run"), "--python", sys.executable, "-n",
               str(ranks), str(Path(__file__).resolve()), "--method", method, "--folder",
               str(Path(folder, "checkpoints")), "--rows", str(rows), "--save", str(options.save),
               "--to", str(to + 10**6 if kill else to)]
    began = time.time()
    job = subprocess.Popen(command, start_new_session=True)
    while job.poll() is None:
        time.sleep(0.2)
        if kill and seen(rows) and seen(rows)[-1]["step"] >= to:
            for child in offspring(job.pid):
                os.kill(child, signal.SIGKILL)
            job.kill()
    found = [row for row in seen(rows) if row["step"] <= to]
    if not kill and job.returncode or not found or found[-1]["step"] < to:
        raise SystemExit(f"soak: the part up to step {to} on {ranks} ranks ended with status "
                         f"{job.returncode} at step {found[-1]['step'] if found else 0}")
    return found, round(time.time() - began, 1)


def seen(rows):
    """The complete rows in the file so far."""
    text = rows.read_text() if rows.exists() else ""
    return [json.loads(line) for line in text.split("\n")[:-1]]


def offspring(pid):
    """The ids of all processes that descend from this one."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1]) == pid:
                found += [*offspring(int(folder.name)), int(folder.name)]
        except (OSError, ValueError):
            pass
    return found


def judged(rows, seconds):
    """The figures of a part, with "right": whether all of them are as they must be."""
    warm = rows[len(rows) // 10:]
    ranks = range(rows[0]["ranks"])
    grown = [max(r["memory"][k] for r in warm[-3:]) - warm[0]["memory"][k] for k in ranks]
    result = dict(
        ranks=rows[0]["ranks"], resumed_from=rows[0]["start"], last_step=rows[-1]["step"],
        looks=len(rows), seconds=seconds, memory_kib_first=warm[0]["memory"],
        memory_kib_last=rows[-1]["memory"], memory_kib_most=[max(r["memory"][k] for r in rows)
                                                             for k in ranks],
        memory_kib_grown=grown, files_first=warm[0]["files"], files_last=rows[-1]["files"],
        threads_last=rows[-1]["threads"], requests_posted=sum(r["posted"] for r in rows),
        requests_left=sum(sum(r["requests"]) for r in rows), loss=rows[-1]["loss"],
        identical=all(len(set(r["digest"])) == 1 for r in rows), ratio=rows[-1]["ratio"])
    right = (result["identical"] and not result["requests_left"] and max(grown) <= GROWTH
             and all(a >= b for a, b in zip(result["files_first"], result["files_last"])))
    return result | dict(right=right)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--ranks", default="4,3,4", help="of the parts, one after the other")
    parser.add_argument("--method", nargs="+", default=["strom:tau=0.05"])
    parser.add_argument("--save", type=int, default=250, help="steps between checkpoints")
    parser.add_argument("--out", type=Path, help="the figures, as JSON")
    for name in ("--folder", "--rows", "--to"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.to:
        options.to = int(options.to)
        return train(options)
    runs = [soak(options, method) for method in options.method]
    right = all(run["right"] for run in runs)
    figures = dict(command="python jobs/soak.py " + " ".join(sys.argv[1:]), right=right, runs=runs)
    if options.out:
        options.out.write_text(json.dumps(figures, indent=1) + "\n")
    return 0 if right else 1


def soak(options, method):
    """The figures of all parts of one method's training."""
    ranks, parts = [int(n) for n in options.ranks.split(",")], []
    with tempfile.TemporaryDirectory() as folder:
        for i, n in enumerate(ranks):
            to = options.steps * (i + 1) // len(ranks) // EVERY * EVERY
            parts.append(judged(*part(options, method, folder, n, to, kill=i + 1 < len(ranks))))
            print(f"{method:28} steps {parts[-1]['resumed_from']:,} to {to:,} on {n} ranks: "
                  f"{'right' if parts[-1]['right'] else 'WRONG'}, memory grew by "
                  f"{max(parts[-1]['memory_kib_grown'])} KiB, {parts[-1]['seconds']} s", flush=True)
    return dict(method=method, steps=parts[-1]["last_step"],
                right=all(p["right"] for p in parts), parts=parts)


if __name__ == "__main__":
    sys.exit(main())
