"""The compressors of this package: a file each, which registers its class, and a line here."""

# ruff: noqa: F401 - to be registered, and for those who ask for a class by name

from mpicomp.compressors.adacomp import AdaComp
from mpicomp.compressors.block import Block
from mpicomp.compressors.cast import BFloat16, Float16
from mpicomp.compressors.chunks import Chunks
from mpicomp.compressors.dense import Dense
from mpicomp.compressors.dorefa import DoReFa
from mpicomp.compressors.dropping import Dropping
from mpicomp.compressors.dryden import Dryden
from mpicomp.compressors.onebit import OneBit
from mpicomp.compressors.powersgd import PowerSGD
from mpicomp.compressors.qsgd import QSGD
from mpicomp.compressors.randomk import RandomK
from mpicomp.compressors.residual import Residual
from mpicomp.compressors.rule import Rule
from mpicomp.compressors.sign import Sign
from mpicomp.compressors.strom import Strom
from mpicomp.compressors.terngrad import TernGrad
from mpicomp.compressors.topk import TopK
