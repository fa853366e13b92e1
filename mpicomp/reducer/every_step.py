"""Checks before each step of any optimizer, by one hook of torch's for all of them."""

import weakref
from functools import cache

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

checkers = weakref.WeakSet()


def before_every_step(checker):
    """Call checker.before_step_of(optimizer) before each step of any optimizer, while it lives."""
    _register()
    checkers.add(checker)


@cache
def _register():
    register_optimizer_step_pre_hook(_before_step)


@torch.compiler.disable
def _before_step(optimizer, args, kwargs):
    for checker in list(checkers):
        checker.before_step_of(optimizer)
