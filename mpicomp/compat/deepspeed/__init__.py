"""DeepSpeed's files in mpicomp's terms: a configuration as Python, a checkpoint for AdamW.

Written beside DeepSpeed's sources of August 2026 (commit edaa7221), the last with 1-bit Adam. Where
its code differs from the papers, the notes say so.
"""

from mpicomp.compat.deepspeed.checkpoint import adamw_state
from mpicomp.compat.deepspeed.config import translate
from mpicomp.compat.deepspeed.files import checkpoint_file, config_file

__all__ = ["adamw_state", "checkpoint_file", "config_file", "translate"]
