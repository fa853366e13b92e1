"""Data-parallel training of PyTorch models over MPI with compressed gradients.

Importing this package starts nothing: no MPI_Init, no torch, no CuPy, no output. Each public name
below is loaded from its module the first time somebody asks for it.
"""

__version__ = "0.1.0"

_HOME = {
    "Averager": "averager",
    "CheckpointError": "errors",
    "Compressor": "compressors.base",
    "DeadRankError": "errors",
    "DeviceError": "errors",
    "DistributedOptimizer": "reducer",
    "Key": "philox",
    "LaunchError": "errors",
    "Layout": "layout",
    "LocalUpdates": "local",
    "Method": "catalogue",
    "MismatchError": "errors",
    "MpicompError": "errors",
    "NonFiniteError": "errors",
    "PacketError": "errors",
    "RatioError": "errors",
    "Recovery": "recovery",
    "Reducer": "reducer",
    "SparseLoCo": "local",
    "SpecError": "errors",
    "StallError": "errors",
    "broadcast_optimizer_state": "broadcast",
    "broadcast_parameters": "broadcast",
    "clip_grad_norm_": "reducer.clip",
    "from_spec": "compressors.registry",
    "local_rank": "mpi.start",
    "method": "catalogue",
    "methods": "catalogue",
    "register": "compressors.registry",
    "sparse_parameters": "reducer.sparse",
}
# Public as mpicomp.checkpoint.save, mpicomp.ddp.comm_hook ...
_MODULES = {name: name for name in ("advice", "checkpoint", "compat", "compressor", "ddp", "errors",
                                    "exchange", "kernels", "nn", "optim", "philox", "slurm")}
_MODULES["watchdog"] = "mpi.watchdog"
__all__ = sorted(_HOME)


def __getattr__(name):
    if name not in _HOME and name not in _MODULES:
        raise AttributeError(f"module 'mpicomp' has no attribute {name!r}")
    from importlib import import_module

    if name in _MODULES:
        return import_module(f"mpicomp.{_MODULES[name]}")
    module = import_module(f"mpicomp.{_HOME[name]}")
    value = globals()[name] = getattr(module, name)
    return value


def __dir__():
    return sorted([*globals(), *_HOME, *_MODULES])
