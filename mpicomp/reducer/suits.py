"""Which optimizers suffer from which methods: a note when a Reducer is attached to one of them."""

import torch

SQUARING = (torch.optim.Adam, torch.optim.AdamW, torch.optim.Adamax, torch.optim.NAdam,
            torch.optim.RAdam, torch.optim.RMSprop)


def note(optimizer, method) -> str | None:
    """What to know of this optimizer with this method, or None where the two go together."""
    if isinstance(optimizer, SQUARING) and method.coarse:
        kind = type(optimizer).__name__
        return (f"{method.name} with {kind}: {kind} divides by the squares of what arrives, which "
                "error feedback does not repair, and often ends with a larger loss than with dense."
                " mpicomp.optim.OneBitAdam has the momentum sent instead (docs/optimizers.md)")
