"""The compressors of this package: a file each, a line each."""

from mpicomp.compressors.adacomp import AdaComp
from mpicomp.compressors.cast import BFloat16, Float16
from mpicomp.compressors.dense import Dense
from mpicomp.compressors.dorefa import DoReFa
from mpicomp.compressors.dropping import Dropping
from mpicomp.compressors.dryden import Dryden
from mpicomp.compressors.onebit import OneBit
from mpicomp.compressors.registry import register
from mpicomp.compressors.residual import Residual
from mpicomp.compressors.rule import Cases, Rule
from mpicomp.compressors.strom import Strom
from mpicomp.compressors.terngrad import TernGrad

for _class in (AdaComp, BFloat16, Dense, DoReFa, Dropping, Dryden, Float16, OneBit, Residual,
               Rule, Strom, TernGrad):
    register(_class)
