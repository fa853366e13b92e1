"""What type checkers read: the public names of __init__.py, which loads each on first use."""

from mpicomp import advice as advice
from mpicomp import checkpoint as checkpoint
from mpicomp import compat as compat
from mpicomp import compressor as compressor
from mpicomp import ddp as ddp
from mpicomp import errors as errors
from mpicomp import exchange as exchange
from mpicomp import kernels as kernels
from mpicomp import nn as nn
from mpicomp import optim as optim
from mpicomp import philox as philox
from mpicomp import slurm as slurm
from mpicomp.averager import Averager as Averager
from mpicomp.broadcast import broadcast_optimizer_state as broadcast_optimizer_state
from mpicomp.broadcast import broadcast_parameters as broadcast_parameters
from mpicomp.catalogue import Method as Method
from mpicomp.catalogue import method as method
from mpicomp.catalogue import methods as methods
from mpicomp.compressors.base import Compressor as Compressor
from mpicomp.compressors.registry import from_spec as from_spec
from mpicomp.compressors.registry import register as register
from mpicomp.errors import CheckpointError as CheckpointError
from mpicomp.errors import DeadRankError as DeadRankError
from mpicomp.errors import DeviceError as DeviceError
from mpicomp.errors import LaunchError as LaunchError
from mpicomp.errors import MismatchError as MismatchError
from mpicomp.errors import MpicompError as MpicompError
from mpicomp.errors import NonFiniteError as NonFiniteError
from mpicomp.errors import PacketError as PacketError
from mpicomp.errors import RatioError as RatioError
from mpicomp.errors import SpecError as SpecError
from mpicomp.errors import StallError as StallError
from mpicomp.layout import Layout as Layout
from mpicomp.local import LocalUpdates as LocalUpdates
from mpicomp.local import SparseLoCo as SparseLoCo
from mpicomp.mpi import watchdog as watchdog
from mpicomp.mpi.start import local_rank as local_rank
from mpicomp.philox import Key as Key
from mpicomp.recovery import Recovery as Recovery
from mpicomp.reducer import DistributedOptimizer as DistributedOptimizer
from mpicomp.reducer import Reducer as Reducer
from mpicomp.reducer.clip import clip_grad_norm_ as clip_grad_norm_
from mpicomp.reducer.sparse import sparse_parameters as sparse_parameters

__version__: str
