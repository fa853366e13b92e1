"""The Reducer on a GPU's parameters gives the floats of the CPU, to the bit; without a GPU.

Parameters are torch's on the CPU that are declared to be a GPU's; CuPy is shim/fake_cupy, whose
arrays mix with NumPy's no more than CuPy's, whose copies come as late as they may, and whose
kernels are gpu.cu in the shim. What is not seen here: a real driver, and what streams do at speed.
"""

import sys

import numpy as np
import pytest
import torch
from shim.arrays import LIVE, DeviceArray
from shim.device import COMPILER
from shim.fake_cupy import TORCH_STREAM, FakeCupy
from training import digest, examples, give, network, parameters, replicas_are_identical, train

import mpicomp
from mpicomp import NonFiniteError
from mpicomp.averager import memory
from mpicomp.kernels.gpu import device
from mpicomp.transport import packet, staging
from mpicomp.transport.calls import Calls

pytestmark = [pytest.mark.mpi, pytest.mark.skipif(
    COMPILER is None, reason="no C++ compiler (c++, g++ or clang++): the CUDA source cannot be "
                             "run on the CPU")]
STEPS = 3
METHODS = ["dense", "bf16", "onebit", "strom:tau=0.003", "terngrad", "dropping:rate=0.9", "adacomp",
           "dryden:proportion=8", "dorefa", "chunks:k=8,block=64,decay=0.9", "randomk:density=0.3",
           "powersgd:rank=1,rate=1"]
EXCHANGES = ["dense:exchange=allgather", "terngrad:packing=int8,exchange=allreduce",
             "onebit:exchange=sharded", "terngrad:exchange=sharded",
             "dryden:proportion=8,exchange=sharded", "onebit:exchange=sharded,adagrad=yes",
             "rule(ndim<2:dense; residual(strom:tau=0.003))", "strom:density=0.05",
             "onebit:delay=1", "onebit:warmup=2", "onebit:exchange=silent"]


@pytest.fixture
def gpu(monkeypatch):
    """A function that from now on declares all parameters a GPU's; returns the fake CuPy."""
    cupy = FakeCupy()

    def begin(way="mirror"):
        monkeypatch.setitem(sys.modules, "cupy", cupy)
        monkeypatch.setattr(device, "_current", None)
        monkeypatch.setattr(memory, "is_on_gpu", lambda parameter: True)
        monkeypatch.setattr(memory.Gpu, "_current_stream", lambda self: TORCH_STREAM)
        monkeypatch.setenv("MPICOMP_STAGING", way)
        return cupy

    yield begin
    device.use(None)
    staging.use_direct(False)
    LIVE.clear()


def sgd(parameters, reducers):
    """An optimizer that puts the Reducer that attaches itself into the list."""
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    register = optimizer.register_step_pre_hook

    def noted(hook):
        reducers.append(hook.__self__.reducer)
        return register(hook)

    optimizer.register_step_pre_hook = noted
    return optimizer


def same_as_on_the_cpu(spec, comm, gpu, way="mirror", **keywords):
    """Train on the CPU and on what is declared a GPU; returns (CuPy, the second's Reducer)."""
    results, reducers = [], []
    for begin in (None, gpu):
        cupy = begin and begin(way)
        model, losses = train(spec, comm, steps=STEPS, **keywords,
                              optimizer=lambda p: sgd(p, reducers))
        reducers[-1].deliver()
        state = reducers[-1].state_dict()
        owed = {key: value.numpy().tobytes() for key, value in state.items()
                if isinstance(value, torch.Tensor)}
        stats = reducers[-1].stats
        results.append((losses, digest(model.parameters()), owed, stats.sent, stats.received))
        if "silent" not in spec:
            replicas_are_identical(comm, model)
    assert results[0] == results[1]
    assert isinstance(reducers[1].averager.buckets[0].grad, DeviceArray)
    assert cupy.launches and not any("GPU" in note for note in reducers[1].stats.notes)
    return cupy, reducers[1]


@pytest.mark.parametrize("spec", METHODS + EXCHANGES)
def test_the_same_bits_as_on_the_cpu(spec, comm, gpu):
    same_as_on_the_cpu(spec, comm, gpu)


@pytest.mark.parametrize("spec", ["dense", "strom:tau=0.003", "onebit:exchange=sharded",
                                  "dryden:proportion=8,exchange=sharded"])
def test_mpi_that_takes_device_pointers(spec, comm, gpu, monkeypatch):
    """The same bits; payloads never cross over, and no reduction is made on device memory."""
    seen, honest = [], staging.call

    def call(function, sent, *buffers):
        parts = [part[0] if isinstance(part, list) else part for part in buffers]
        seen.append((function.__name__, [isinstance(p, staging.MirroredBuffer) and p.memory.direct
                                         for p in parts[:2]]))
        return honest(function, sent, *buffers)

    monkeypatch.setattr(staging, "call", call)
    staging.use_direct(True)
    cupy, reducer = same_as_on_the_cpu(spec, comm, gpu, "direct")
    on_device = {name for name, direct in seen if any(direct)}
    assert not {name for name in on_device if "educe" in name}
    if spec != "dense":  # whose sum MPI takes in host memory
        assert on_device
        headers = packet.SIZE * len(reducer.averager.buckets) * STEPS * (comm.size + 1)
        assert cupy.out == 0 and cupy.into <= headers


@pytest.mark.parametrize("way", ["mirror", "direct"])
def test_reductions_are_made_in_host_memory(way, comm, gpu, monkeypatch):
    staging.use_direct(way == "direct")
    honest = Calls.allreduce

    def allreduce(self, stage, send, receive, op):
        assert not getattr(send, "memory", None) or isinstance(send.for_mpi, np.ndarray)
        assert not getattr(receive, "memory", None) or isinstance(receive.for_mpi, np.ndarray)
        return honest(self, stage, send, receive, op)

    monkeypatch.setattr(Calls, "allreduce", allreduce)
    same_as_on_the_cpu("terngrad", comm, gpu, way)
    same_as_on_the_cpu("terngrad:packing=int8,exchange=allreduce", comm, gpu, way)


@pytest.mark.parametrize("spec", ["onebit", "strom:tau=0.003"])
def test_only_used_bytes_cross_over(spec, comm, gpu):
    """Each payload leaves once, without its header, and each that arrives enters once."""
    cupy, reducer = same_as_on_the_cpu(spec, comm, gpu)
    reasons = reducer.stats.reasons
    headers = packet.SIZE * STEPS * len(reducer.averager.buckets)
    payloads = sum(reasons.values()) - headers
    if comm.size > 1:  # where more than one rank sends, and it counts what leaves a rank
        assert payloads <= cupy.out <= payloads + headers
    everyone = sum(comm.allgather(cupy.out))
    assert cupy.into == everyone


def test_a_thread_moves_exchanges_on(comm, gpu):
    same_as_on_the_cpu("strom:tau=0.003", comm, gpu, progress="thread")
    same_as_on_the_cpu("onebit:exchange=sharded", comm, gpu, progress="thread")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("spec", ["onebit", "dense", "strom:tau=0.003"])
def test_sixteen_bits_are_read_as_they_are(spec, dtype, comm, gpu):
    """float32 buckets are filled by one copy from 16 bits; what is owed is kept in float32."""
    def step(named, reducer):
        for number in range(3):
            draw = np.random.default_rng([number, comm.rank])
            give(named, [0.01 * draw.standard_normal(n) for n in (600, 40)])
            reducer.finish()
            yield [p.grad.float().numpy().tobytes() for _, p in named]
            for _, p in named:
                p.grad = None
        state = reducer.state_dict()
        owed = [v for k, v in state.items() if k.startswith("error/")]
        assert all(v.dtype == torch.float32 for v in owed)
        yield [v.numpy().tobytes() for v in owed]

    results = []
    for begin in (None, gpu):
        if begin:
            begin()
        named = [(name, torch.nn.Parameter(p.detach().to(dtype)))
                 for name, p in parameters(w=(150, 4), b=40)]
        results.append(list(step(named, mpicomp.Reducer(named, spec, comm))))
        assert all(p.grad is None and p.dtype == dtype for _, p in named)
    assert results[0] == results[1]
    rounded = torch.tensor([1.0 + 2.0**-12]).to(dtype).float()
    assert rounded.item() == 1.0  # so three such steps show whether sums are float32
    total = mpicomp.Reducer([("x", torch.nn.Parameter(torch.zeros(1, dtype=dtype)))],
                            "strom:tau=100", comm)
    for _ in range(3):
        total.averager.named[0][1].grad = None
        give(total.averager.named, [[1.0 + (dtype == torch.float16) * 2.0**-9]])
        total.finish()
        total.averager.begin()
    owed = total.state_dict()["error/x"].item()
    assert owed == 3 * (1.0 + (dtype == torch.float16) * 2.0**-9)


def test_saved_and_loaded(comm, gpu):
    """What was saved on the CPU a GPU goes on with, as the CPU does; then nothing is owed."""
    results = []
    for first, second in ((None, None), (None, gpu), (gpu, gpu)):
        if first:
            first()
        reducers = []
        model, _ = train("onebit:exchange=sharded", comm, steps=3,
                         optimizer=lambda p: sgd(p, reducers))
        state = reducers[0].state_dict()
        reducers[0].close()
        if second and not first:
            second()
        again = mpicomp.Reducer(model.named_parameters(), "onebit:exchange=sharded", comm,
                                bucket_bytes=2000, seed=3)
        again.load_state_dict(state)
        x, y = examples(comm, 5)
        model.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        again.finish()
        mean = digest(p.grad for p in model.parameters())
        again.flush()
        results.append((mean, digest(p.grad for p in model.parameters())))
        owed = again.state_dict()
        assert not any(v.any() for k, v in owed.items() if k.startswith("error"))
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("spec", ["onebit", "onebit:exchange=sharded", "dense"])
def test_a_gradient_that_is_not_finite(spec, comm, gpu):
    gpu()
    named = parameters(a=300, b=200)
    reducer = mpicomp.Reducer(named, spec, comm, bucket_bytes=900)
    before = reducer.state_dict()
    bad = np.ones(300)
    bad[7] = np.nan if comm.rank == 0 else 1
    give(named, [bad, np.ones(200)])
    with pytest.raises(NonFiniteError, match=r"rank 0: a"):
        reducer.finish()
    after = reducer.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before if k.startswith("error"))


@pytest.mark.parametrize("spec", ["onebit:exchange=hierarchical", "strom:tau=0.1,exchange=peers"])
def test_exchanges_that_work_in_host_memory_say_so(spec, comm, gpu):
    cupy = gpu()
    reducer = mpicomp.Reducer(network().named_parameters(), spec, comm)
    assert any("compressed in host memory: exchange=" in note for note in reducer.stats.notes)
    assert not cupy.launches and isinstance(reducer.averager.buckets[0].grad, np.ndarray)
    reducer.deliver()


def test_a_wait_that_is_left_out_is_found(comm, gpu, monkeypatch):
    """The test of the tests: MPI calls made before the packet has left the device."""
    monkeypatch.setattr(staging.DeferredCall, "ready", property(lambda self: True))
    with pytest.raises(AssertionError):
        same_as_on_the_cpu("bf16:exchange=allgather", comm, gpu)


def test_a_copy_that_is_not_waited_for_is_found(comm, gpu, monkeypatch):
    """The same for a packet that is decoded before it has entered the device."""
    monkeypatch.setattr(device.Cupy, "join", lambda self: None)
    with pytest.raises((AssertionError, mpicomp.MpicompError)):
        same_as_on_the_cpu("bf16:exchange=allgather", comm, gpu)


class Placed(DeviceArray):
    """An array of CuPy's as the Averager sees it: of the module cupy, on device 0."""

    device = 0


Placed.__module__ = "cupy"


@pytest.mark.parametrize("spec", ["dense", "onebit", "strom:tau=0.5", "terngrad",
                                  "onebit:exchange=sharded"])
def test_an_averager_of_cupy_arrays(spec, comm, gpu, monkeypatch):
    """The bits of NumPy arrays, in place, without torch's memory."""
    def values(step):
        return np.random.default_rng([step, comm.rank]).standard_normal(600).astype(np.float32)

    on_host, on_device = [], []
    averager = mpicomp.Averager({"w": np.zeros(600, np.float32)}, spec, comm)
    for step in range(STEPS):
        x = values(step)
        averager.average({"w": x})
        on_host.append(x.tobytes())
    cupy = gpu()
    monkeypatch.setattr(memory.CupyGpu, "_current_stream", lambda self: TORCH_STREAM)
    array = Placed(cupy.zeros(600, np.float32)._inner)
    averager = mpicomp.Averager({"w": array}, spec, comm)
    for step in range(STEPS):
        with averager.memory.here():
            array[...] = device.current().array(values(step))
        averager.average({"w": array})
        with averager.memory.here():
            on_device.append(device.current().host(array).tobytes())
    assert isinstance(averager.buckets[0].grad, DeviceArray) and cupy.launches
    assert on_device == on_host
