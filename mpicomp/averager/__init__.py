"""Averager: arrays in, their mean over the ranks out, compressed, with error feedback."""

from mpicomp.averager.averager import Averager

__all__ = ["Averager"]
