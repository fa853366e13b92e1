"""torch.amp.GradScaler with an exchange: gradients travel unscaled, and all ranks skip alike.

A loss scale moves while a residual waits, so what is owed must be in true units: gradients are
divided by the scale on their way into the bucket and the mean is multiplied by it on its way out.
The scaler then does what it does in one process. Scales are powers of two, so this rounds nothing.
"""

from functools import wraps

import torch

from mpicomp.errors import MismatchError, SpecError
from mpicomp.reducer import copies


def refuse_raise(nonfinite):
    """A scaler provokes gradients that are not finite: they must not end the training."""
    if nonfinite != "skip":
        raise SpecError(f"with a GradScaler a step that overflows is skipped; found nonfinite="
                        f"{nonfinite!r}, type  nonfinite='skip'")


def follow_scale(slots, scaler):
    """Keep the slots' `scale` equal to the scaler's, from now on."""
    def take():
        for slot in slots:
            slot.scale = float(scaler.get_scale())

    _after(scaler, "update", take)
    _after(scaler, "load_state_dict", take)
    take()


def finish_before_unscale(reducer, scaler):
    """Let scaler.unscale_ and scaler.step find the mean gradient, or NaN on all ranks.

    Only for optimizers of this Reducer's parameters: others may share the scaler, as in a GAN.
    """
    known = {id(p) for _, p in reducer.averager.parameters}
    looked_at = set()  # optimizers since the last update
    inner, inner_step = scaler.unscale_, scaler.step

    def ours(optimizer):
        """Its parameters that are this Reducer's."""
        return [p for group in optimizer.param_groups for p in group["params"] if id(p) in known]

    def look(optimizer, check):
        """Finish; then check(optimizer) finds NaN where ranks skip, and something where nobody had
        a gradient, or none has landed (delay=1): torch refuses to look at nothing."""
        reducer.finish()
        if not scaler.is_enabled():
            return check(optimizer)
        if reducer.averager.current.outcome == "flushed":
            raise MismatchError(f"rank {reducer.comm.rank}: after flush() p.grad has no scale: "
                                "call optimizer.step(), not scaler.step(optimizer)")
        looked_at.add(id(optimizer))
        parameters = ours(optimizer)
        absent = [p for p in parameters if p.grad is None]
        if reducer.averager.current.outcome == "skipped":
            for p in absent:
                p.grad = torch.full_like(p, float("nan"))
        elif len(absent) == len(parameters):
            absent[0].grad = torch.zeros_like(absent[0])
            try:
                return check(optimizer)
            finally:
                absent[0].grad = None
        return check(optimizer)

    @torch.compiler.disable
    @wraps(inner)
    def unscale_(optimizer):
        return look(optimizer, inner) if ours(optimizer) else inner(optimizer)

    @torch.compiler.disable
    @wraps(inner_step)
    def step(optimizer, *args, **kwargs):
        # with fused=True torch looks at gradients itself, before the step and so before finish
        if (getattr(optimizer, "_step_supports_amp_scaling", False) and scaler.is_enabled()
                and ours(optimizer)):
            parameters = ours(optimizer)
            if id(optimizer) not in looked_at:
                half = any(p.dtype == torch.float16 for p in parameters)  # unscale_ refuses these
                look(optimizer, scaler._check_inf_per_device if half else scaler.unscale_)
            if reducer.averager.current.outcome == "skipped":
                return None  # in its first step fused SGD would keep a momentum nobody has written
            if all(p.grad is None for p in parameters):
                return optimizer.step(*args, **kwargs)
        return inner_step(optimizer, *args, **kwargs)

    def updated():
        looked_at.clear()
        reducer.averager.begin()  # where the scaler skipped, no optimizer has stepped

    scaler.unscale_, scaler.step = unscale_, step
    _after(scaler, "update", updated)
    ours_in_it = ("unscale_", "step", "update", "load_state_dict")
    copies.change_copies(scaler, lambda state: {  # a copy would call this scaler's
        key: value for key, value in state.items() if key not in ours_in_it})


def _after(scaler, name, then):
    inner = getattr(scaler, name)

    @wraps(inner)
    def method(*args, **kwargs):
        result = inner(*args, **kwargs)
        then()
        return result

    setattr(scaler, name, method)
