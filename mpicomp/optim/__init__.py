"""Optimizers that have something else than gradients exchanged, which compression suits better."""

from mpicomp.optim.onebit_adam import OneBitAdam

__all__ = ["OneBitAdam"]
