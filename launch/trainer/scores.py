"""Evaluation of a model: each rank scores its share of the rows, and all get the result."""
from __future__ import annotations

import torch
from torch.nn import functional

from trainer import datasets


def rows_of(split, rows, device="cpu"):
    """These rows of a split as tensors (inputs, targets), copied out of the memory map."""
    return (torch.from_numpy(split.x[rows]).to(device),
            torch.from_numpy(split.y[rows]).long().to(device))


def device_of(model):
    """The torch.device of a model's parameters."""
    return next(model.parameters()).device


def count(y):
    """The number of targets in y, padding not counted."""
    return int((y != datasets.PADDING).sum())


@torch.no_grad()
def evaluate(model, split, rows, comm):
    """(mean loss, accuracy) over these rows of a split. Collective."""
    mine = rows[datasets.share(len(rows), comm.rank, comm.size)]
    loss, correct, targets = 0.0, 0, 0
    for at in range(0, len(mine), 250):
        x, y = rows_of(split, mine[at:at + 250], device_of(model))
        logits, y = model(x).flatten(0, -2), y.flatten()
        loss += functional.cross_entropy(logits, y, reduction="none",
                                         ignore_index=datasets.PADDING).double().sum().item()
        correct += (logits.argmax(1) == y).sum().item()
        targets += count(y)
    parts = comm.allgather((loss, correct, targets))
    loss, correct, targets = (sum(column) for column in zip(*parts, strict=True))
    return loss / targets, correct / targets


def phoneme_error_rate(model, split, rows, comm):
    """{"phoneme_error_rate": edits per phoneme} if the model writes words, else {}. Collective."""
    if not hasattr(model, "edits"):
        return {}
    x, y = rows_of(split, rows[datasets.share(len(rows), comm.rank, comm.size)],
                   device_of(model))
    edits, length = (sum(column) for column in zip(*comm.allgather(model.edits(x, y))))
    return dict(phoneme_error_rate=edits / length)
