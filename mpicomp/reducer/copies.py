"""Copies of optimizers and Reducers, by copy, pickle or torch.save: they exchange nothing, and the
first step of such an optimizer says so.

A copy of a model is a model as any other: averages of weights and teachers need no Reducer.
"""

import weakref
from collections import OrderedDict

from mpicomp.errors import SpecError


class Detached:
    """Stands in a copy where the Reducer was; whatever is asked of it raises SpecError."""

    def __getattr__(self, name):
        if name.startswith("__"):  # copy and pickle look for what is not there
            raise AttributeError(name)
        raise SpecError(f"{name} is asked of a copy of a Reducer, which knows no ranks: {_REMEDY}")


class Uncopied:
    """What copy and pickle replace by a `Detached`: it holds communicators."""

    def __reduce__(self):
        return Detached, ()


_REMEDY = ("to train a copy on all ranks, type  mpicomp.DistributedOptimizer(optimizer, "
           "model.named_parameters(), method=...)  for it and its model")


def refuse_step(optimizer, args, kwargs):
    """The step pre-hook of a copied optimizer: raises SpecError until somebody has decided."""
    if isinstance(vars(optimizer).get("reducer"), Detached):
        raise SpecError(
            f"this {type(optimizer).__name__} is a copy of an optimizer with a Reducer, and has "
            f"none: its steps would differ from rank to rank. {_REMEDY}; for steps of this rank "
            "alone, type  optimizer.reducer = None")


def mark(optimizer):
    """From now on this optimizer has a Reducer: copies of it refuse to step, itself no longer."""
    own = vars(optimizer)
    if isinstance(own.get("reducer"), Detached):
        del optimizer.reducer
    if refuse_step in (hooks := own.get("_optimizer_step_pre_hooks", {})).values():
        del hooks[next(key for key, hook in hooks.items() if hook is refuse_step)]

    def detached(state):
        hooks = {name: OrderedDict((key, hook) for key, hook in state.get(name, {}).items()
                                   if not isinstance(getattr(hook, "__self__", None), Uncopied))
                 for name in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")}
        hooks["_optimizer_step_pre_hooks"][-1] = refuse_step
        return {**state, **hooks, "reducer": Detached()}

    change_copies(optimizer, detached)


def change_copies(thing, change):
    """Copies of this object get change(state), in place of the state that they would get."""
    whose, own = weakref.ref(thing), getattr(type(thing), "__getstate__", vars)

    def state():
        found = own(whose())
        if not isinstance(found, dict):
            return found
        return change({key: value for key, value in found.items() if key != "__getstate__"})

    vars(thing)["__getstate__"] = state


def release(thing):
    """Copies are as the class makes them again."""
    vars(thing).pop("__getstate__", None)
