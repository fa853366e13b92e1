"""A program that ends while threads of ours are at work: nobody calls MPI after it has ended."""

import sys

from test_launch import RUN, finish

from mpicomp.mpi import start

SCRIPT = """
import time, torch, mpicomp
from mpi4py import MPI

def train(method, steps, progress="auto"):
    torch.manual_seed(0)
    model = torch.nn.Linear(300, 300)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    mpicomp.DistributedOptimizer(optimizer, model.named_parameters(), method, progress=progress,
                                 bucket_bytes=20_000, stall_timeout=600)
    for step in range(steps):
        optimizer.zero_grad()
        model(torch.ones(2, 300)).square().sum().backward()
        if step + 1 < steps or "delay" in method:
            optimizer.step()
    return optimizer

alive = [train("dropping:exchange=server", 3), train("strom:tau=0.01,exchange=peers", 3),
         train("onebit:delay=1", 3, "thread"), train("dense", 2, "thread")]
MPI.COMM_WORLD.Barrier()
MPI.Finalize()                  # and no deliver(): what is under way is lost, and that is all
time.sleep(0.3)
print("lived on")
"""


def test_finalize_while_threads_are_at_work(tmp_path):
    """A server's thread, a worker that waits for answers, and the progress thread with buckets."""
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    code, output = finish(*RUN, "-n", 2, "--timeout", 500, path)
    assert (code, output) == (0, "lived on\nlived on\n")


def test_what_is_called_at_the_end_is_called_once_and_the_last_first(monkeypatch):
    monkeypatch.setattr(start, "_endings", [lambda: None])
    called = []

    def forgotten():
        called.append("forgotten")

    start.at_end(lambda: called.append("first"))
    start.at_end(forgotten)
    start.at_end(lambda: called.append("last"))
    start.not_at_end(forgotten)
    start.not_at_end(sys.exit)  # which nobody asked for
    start._end()
    start._end()
    assert called == ["last", "first"]
