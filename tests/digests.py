"""What a small training ends in, to the bit: one line for each method, from rank 0 of a job.

    launch/run -n 3 --python PYTHON tests/digests.py        under the MPI library of that Python

tests/test_other_mpi.py compares what different MPI libraries make of it.
"""

import sys
from hashlib import blake2b

import numpy as np
import torch
from mpi4py import MPI

import mpicomp

torch.set_num_threads(1)  # ranks share cores

METHODS = ("dense", "dense:exchange=allgather", "dense:exchange=sharded", "fp16", "bf16",
           "terngrad", "terngrad:exchange=allreduce", "onebit", "onebit:exchange=sharded",
           "onebit:exchange=hierarchical", "dorefa:bits=4", "strom:tau=0.5", "strom:tau=0.5,"
           "exchange=sharded", "dryden:proportion=8", "dropping:rate=0.9", "adacomp",
           "onebit:delay=1", "strom:tau=0.5,exchange=peers,staleness=0")
SHAPES = {"conv.weight": (6, 3, 3, 3), "conv.bias": (6,), "weight": (40, 90), "bias": (40,),
          "large": (600, 450)}  # the last one's sum goes around a ring


def train(method, comm, steps=3):
    """16 hexadecimal digits of parameters, residuals and counted bytes after some steps."""
    named = [(name, torch.nn.Parameter(torch.zeros(shape))) for name, shape in SHAPES.items()]
    optimizer = torch.optim.SGD([p for _, p in named], lr=0.125, momentum=0.5)
    mpicomp.DistributedOptimizer(optimizer, named, method, comm, bucket_bytes=60_000, seed=5)
    for step in range(steps):
        random = np.random.default_rng([step, comm.rank])
        optimizer.zero_grad()
        loss = 0
        for _, p in named:
            gradient = random.standard_normal(p.shape, np.float32)
            loss = loss + (p * torch.from_numpy(gradient)).sum()
        loss.backward()
        optimizer.step()
    reducer = optimizer.reducer
    if "delay" in method or "peers" in method:
        reducer.deliver()
    total = blake2b(digest_size=8)
    for _, p in named:
        total.update(p.detach().numpy().tobytes())
    for name, value in sorted(reducer.state_dict().items()):
        total.update(f"{name} {value.tolist() if hasattr(value, 'tolist') else value}".encode())
    total.update(str((reducer.stats.sent, reducer.stats.received)).encode())
    reducer.close()
    everyone = comm.gather(total.digest())
    return blake2b(b"".join(everyone), digest_size=8).hexdigest() if comm.rank == 0 else None


if __name__ == "__main__":
    comm = MPI.COMM_WORLD
    if comm.rank == 0:
        print("library", MPI.Get_library_version().split("\0")[0].splitlines()[0], flush=True)
    for method in sys.argv[1:] or METHODS:
        found = train(method, comm)
        if comm.rank == 0:
            print(f"digest {method} {found}", flush=True)
