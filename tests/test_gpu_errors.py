"""What a user without a fitting GPU, driver or CuPy is told, and that CPU users never meet CuPy."""

import subprocess
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import ranks

import mpicomp
from mpicomp.errors import DeviceError, MismatchError, SpecError
from mpicomp.kernels.gpu import device


class OutOfMemory(Exception):
    pass


def cupy(count=1, **more):
    """A module that looks like CuPy to those who ask for a device."""
    def devices():
        if isinstance(count, Exception):
            raise count
        return count

    module = ModuleType("cupy")
    module.__version__ = "14.2.0"
    module.cuda = SimpleNamespace(
        runtime=SimpleNamespace(getDeviceCount=devices, getDevice=lambda: 0),
        memory=SimpleNamespace(OutOfMemoryError=OutOfMemory))
    vars(module).update(more)
    return module


@pytest.fixture
def found(monkeypatch):
    """Puts a module in CuPy's place; None: there is none. torch was built for CUDA 12."""
    monkeypatch.setattr(device, "_current", None)

    def put(module, cuda="12.8"):
        monkeypatch.setitem(sys.modules, "cupy", module)
        version = SimpleNamespace(version=SimpleNamespace(cuda=cuda))
        monkeypatch.setitem(sys.modules, "torch", version)

    return put


def test_no_cupy(found):
    found(None)
    with pytest.raises(DeviceError, match=r"CuPy is not.*pip install 'cupy-cuda12x>=13'$"):
        device.current()


def test_the_install_line_fits_the_cuda_of_torch(found):
    found(None, cuda="13.0")
    with pytest.raises(DeviceError, match=r"cupy-cuda13x>=13'$"):
        device.current()
    found(None, cuda=None)  # a torch for CPUs
    with pytest.raises(DeviceError, match=r"cupy-cuda13x>=13'  \(or cupy-cuda12x"):
        device.current()


def test_a_cupy_that_cannot_be_imported(found, monkeypatch, tmp_path):
    (tmp_path / "cupy.py").write_text("raise ImportError('libcudart.so.11: no such file')")
    found(None)
    monkeypatch.delitem(sys.modules, "cupy")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(DeviceError, match=r"cannot be imported.*libcudart.so.11.*cuda12"):
        device.current()


def test_no_driver(found):
    found(cupy(RuntimeError("cudaErrorInsufficientDriver: CUDA driver version is insufficient")))
    with pytest.raises(DeviceError, match="no usable driver.*Insufficient.*nvidia-smi.*cuda12"):
        device.current()


def test_no_gpu(found):
    found(cupy(0))
    with pytest.raises(DeviceError, match="no GPU.*CUDA_VISIBLE_DEVICES.*--gpus-per-task"):
        device.current()


def test_no_memory_left(found):
    def full(size, dtype):
        raise OutOfMemory("out of memory allocating 400,000,000 bytes")

    found(cupy(zeros=full, empty=full))
    for take in (device.current().zeros, device.current().empty):
        with pytest.raises(DeviceError, match="400,000,000 bytes.*bucket_bytes.*empty_cache"):
            take(10**8, np.float32)


def test_kernels_that_cannot_be_compiled(found):
    def module(code, options):
        assert "KERNEL strom_select" in code and "--fmad=false" in options
        raise RuntimeError("CuPy failed to load libnvrtc.so.12")

    found(cupy(RawModule=module))
    with pytest.raises(DeviceError, match="cannot be compiled.*libnvrtc.so.12.*14.2.0.*cuda12"):
        device.current().launch("write_count", 1, None, None)


def test_a_launch_is_checked_before_it_is_made(found):
    launched = []

    def get_function(name):
        return lambda *call: launched.append((name, *call))

    found(cupy(RawModule=lambda **_: SimpleNamespace(get_function=get_function)))
    array = SimpleNamespace(__cuda_array_interface__={}, data=SimpleNamespace(ptr=256), size=3)
    launch = device.current().launch
    launch("dense_scale", 300, array, 0.5, array, 3, None)
    (name, grid, block, arguments), = launched
    assert (name, grid, block) == ("dense_scale", (2,), (256,))
    assert [type(a) for a in arguments] == [SimpleNamespace, np.float32, SimpleNamespace, np.int64,
                                            np.uint64]
    launch("dense_scale", 0, array, 0.5, array, 0, None)  # nothing to do: no launch of no blocks
    assert len(launched) == 1
    with pytest.raises(TypeError, match="takes 5 arguments, found 4"):
        launch("dense_scale", 3, array, 0.5, array, 3)
    with pytest.raises(TypeError, match="takes float number"):
        launch("dense_scale", 3, array, array, array, 3, None)
    array.data.ptr = 258
    with pytest.raises(ValueError, match="odd address"):
        launch("dense_scale", 3, array, 0.5, array, 3, None)


def test_cpu_users_never_meet_cupy():
    code = ("import sys, numpy; from mpicomp import kernels; from mpicomp.kernels import gpu;"
            "k = kernels.of(numpy.zeros(3, 'float32')); assert k is not gpu; k.zeros(3);"
            "assert not {'cupy', 'torch'} & set(sys.modules)")
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=ranks.JOB)


# ---- at the start of a training ---------------------------------------------------------------


@pytest.fixture
def model(monkeypatch):
    """Parameters that are declared to be a GPU's."""
    import torch

    from mpicomp.averager import memory

    monkeypatch.setattr(device, "_current", None)
    monkeypatch.setattr(memory, "is_on_gpu", lambda parameter: True)
    monkeypatch.setattr(memory.Gpu, "_current_stream", lambda self: 0)
    monkeypatch.delenv("MPICOMP_STAGING", raising=False)
    return torch.nn.Linear(3, 2)


@pytest.mark.mpi
def test_a_reducer_without_cupy(model, comm, monkeypatch):
    """The same error on every rank, of its own kind, before anything is exchanged."""
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(DeviceError, match=r"CuPy is not installed.*pip install 'cupy-cuda"):
        mpicomp.Reducer(model.named_parameters(), "onebit", comm)
    monkeypatch.setenv("MPICOMP_STAGING", "host")
    reducer = mpicomp.Reducer(model.named_parameters(), "onebit", comm)
    assert any("MPICOMP_STAGING=host" in note for note in reducer.stats.notes)


@pytest.mark.mpi(min_size=2)
def test_one_rank_without_cupy(model, comm, monkeypatch):
    """The others do not wait for it: they learn which rank, and what it should type."""
    if comm.rank == 1:
        monkeypatch.setitem(sys.modules, "cupy", None)
    else:
        monkeypatch.setenv("MPICOMP_STAGING", "host")
    with pytest.raises(MismatchError, match=r"rank 1: .*CuPy is not installed.*pip install"):
        mpicomp.Reducer(model.named_parameters(), "onebit", comm)


def test_a_word_that_staging_does_not_know(model, monkeypatch):
    monkeypatch.setenv("MPICOMP_STAGING", "pinned")
    with pytest.raises(SpecError, match="MPICOMP_STAGING=pinned found, expected.*mirror"):
        mpicomp.Reducer(model.named_parameters(), "onebit")


def test_a_gpu_without_room_for_buckets(model, found, monkeypatch):
    import torch

    from mpicomp.averager import memory

    monkeypatch.setitem(sys.modules, "cupy", cupy())
    monkeypatch.setitem(sys.modules, "torch", torch)

    def full(*arguments, **keywords):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4 GiB")

    monkeypatch.setattr(torch, "zeros", full)
    with pytest.raises(DeviceError, match=r"bucket of 4,000 bytes \(CUDA out.*fewer ranks"):
        memory.Gpu(torch.device("cpu")).bucket(1000)


def test_a_host_without_page_locked_memory(found):
    def full(size):
        raise RuntimeError("cudaErrorMemoryAllocation: out of memory")

    found(cupy())
    sys.modules["cupy"].cuda.alloc_pinned_memory = full
    with pytest.raises(DeviceError, match="5,000 bytes of page-locked.*ulimit -l"):
        device.current().pinned(5000)


def test_cpu_training_never_meets_cupy():
    """Also where the package is there: a training, its state and the list of methods."""
    code = ("import sys, torch, mpicomp; m = torch.nn.Linear(3, 2);"
            "o = mpicomp.DistributedOptimizer(torch.optim.SGD(m.parameters(), 0.1),"
            "                                 m.named_parameters(), 'onebit:exchange=sharded');"
            "m(torch.ones(4, 3)).sum().backward(); o.step(); o.reducer.state_dict();"
            "mpicomp.methods(); assert 'cupy' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], check=True, timeout=ranks.JOB)
