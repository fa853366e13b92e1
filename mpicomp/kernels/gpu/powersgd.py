"""Matrices of low rank: by the host."""

from mpicomp.kernels import reference
from mpicomp.kernels.gpu.arguments import on_host

powersgd_decode_add = on_host(reference.powersgd_decode_add)
powersgd_encode = on_host(reference.powersgd_encode)
powersgd_learn = on_host(reference.powersgd_learn)
powersgd_project = on_host(reference.powersgd_project)
