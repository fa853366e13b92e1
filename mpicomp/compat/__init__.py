"""What programs written for other systems call: Horovod's names, DeepSpeed's files."""

from mpicomp.compat import deepspeed, horovod

__all__ = ["deepspeed", "horovod"]
