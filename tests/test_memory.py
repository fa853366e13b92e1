"""After the third step nothing of the gradient's size is allocated, and nothing grows."""

import gc
import resource
import tracemalloc

import pytest
import torch
from training import parameters

import mpicomp
from mpicomp import kernels

pytestmark = pytest.mark.mpi(sizes=(2,))  # what is allocated has no other kinds on other ranks
SPECS = ["dense", "onebit", "strom:tau=1", "dryden", "onebit:exchange=sharded,adagrad=yes"]
MORE = ["dense:exchange=allgather", "terngrad", "dorefa", "adacomp", "block", "chunks", "fp16",
        "strom:tau=1,exchange=hierarchical", "bf16:exchange=allreduce",
        "terngrad:exchange=allreduce", "dropping",
        "onebit:exchange=sharded", "dryden:exchange=sharded,own=raw",
        "strom:tau=1,exchange=sharded", "onebit:exchange=hierarchical", "onebit:exchange=silent",
        "rule(*b:dense; k:strom:tau=1; onebit)", "onebit:warmup=2"]
SPECS += [pytest.param(spec, marks=pytest.mark.slow) for spec in MORE]
N = 256 * 1024 + 256 + 32 * 64 * 9
GRADIENT = 4 * N
PIECE = GRADIENT // 3  # all that is allocated at a time in a step must be less
GROWTH = GRADIENT // 32  # Python's free lists and counters fill up in the first hundred steps


def peak_rss():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.mark.skipif("cpu" not in kernels.backends(), reason="NumPy's kernels make temporaries")
@pytest.mark.parametrize("spec", SPECS)
def test_thirty_steps_allocate_nothing(spec, comm):
    """NumPy tells tracemalloc of its arrays; what compiled kernels take shows in ru_maxrss.

    Options without a compiled kernel (coding=rice, packing=5trit, survivors=onebit) are left out.
    """
    named = parameters(w=(256, 1024), wb=256, k=(32, 64, 3, 3))
    reducer = mpicomp.Reducer(named, spec, comm, bucket_bytes=GRADIENT // 2)
    torch.manual_seed(comm.rank)
    gradients = [torch.randn(p.shape) for _, p in named]

    def step():
        for _, p in named:
            p.grad = None
        sum((p * g).sum() for (_, p), g in zip(named, gradients)).backward()
        reducer.finish()

    # where the data tell lengths, buffers grow until residuals of both stages have settled
    for _ in range(3 if reducer.method.compressor.fixed else 150):
        step()
    gc.collect()
    tracemalloc.start()
    try:
        step()  # what tracemalloc did not see being made is not counted when it is freed
        gc.collect()
        before, rss = tracemalloc.get_traced_memory()[0], peak_rss()
        tracemalloc.reset_peak()
        for _ in range(26):
            step()
        gc.collect()
        after, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert reducer.step >= 30
    assert peak - before < PIECE, f"{peak - before} bytes at once, of a gradient of {GRADIENT}"
    assert after - before < GROWTH, f"{after - before} bytes more after 26 steps"
    # torch's and MPI's own memory moves by a few megabytes; a leak would be a gradient a step
    assert peak_rss() - rss < 26 * GRADIENT // 4


def test_a_leak_would_be_seen():
    """The test of the test: two kilobytes a step, and an array of a half, are found."""
    tracemalloc.start()
    kept = [bytearray(2048) for _ in range(26)]
    grown, _ = tracemalloc.get_traced_memory()
    tracemalloc.reset_peak()
    array = torch.zeros(1).numpy().repeat(N // 2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert kept and grown > GROWTH and peak - grown >= array.nbytes > PIECE
