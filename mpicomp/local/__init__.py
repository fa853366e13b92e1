"""Local updates: ranks train alone for some steps, then average how far they have come."""

from mpicomp.local.local import LocalUpdates, SparseLoCo

__all__ = ["LocalUpdates", "SparseLoCo"]
