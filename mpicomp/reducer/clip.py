"""Clipping of the mean gradient, in one line that is right with every exchange."""

import torch

from mpicomp.errors import SpecError
from mpicomp.reducer.optimizer_hooks import reducers_of


def clip_grad_norm_(optimizer: torch.optim.Optimizer, max_norm: float, norm_type: float = 2.0,
                    error_if_nonfinite: bool = False, foreach: bool | None = None
                    ) -> torch.Tensor:
    """torch.nn.utils.clip_grad_norm_ on the mean gradient of an optimizer's parameters.

    Between loss.backward() and optimizer.step(), on every rank. It finishes the exchange first, so
    all ranks clip the same mean by the same norm, which is returned: a tensor of shape []. Under a
    GradScaler call scaler.unscale_(optimizer) before it. Raises SpecError where no Reducer is
    attached to the optimizer, and with exchange=server, which leaves no gradient to clip.
    """
    reducers = reducers_of(optimizer)
    if not reducers:
        raise SpecError(f"clip_grad_norm_: no Reducer is attached to this "
                        f"{type(optimizer).__name__}: pass the optimizer that was given to "
                        "mpicomp.DistributedOptimizer, or to reducer.attach")
    for reducer in reducers:
        reducer.finish_for("clip_grad_norm_")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return torch.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type, error_if_nonfinite,
                                          foreach)
