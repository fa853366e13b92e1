"""Reducer: gradients are exchanged while backward() runs, and p.grad becomes their mean."""

from mpicomp.reducer.reducer import DistributedOptimizer, Reducer

__all__ = ["DistributedOptimizer", "Reducer"]
