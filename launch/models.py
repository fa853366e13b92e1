"""The small networks of launch/train.py: each takes the rows of its data set and gives logits."""
from __future__ import annotations

from torch import nn
from torch.nn import functional

import mpicomp.nn


class CNN(nn.Module):
    """Bytes [n, 28, 28] -> logits [n, classes]; 215,370 parameters, 93 % of them in one matrix."""

    def __init__(self, classes):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 5, padding=2)
        self.conv2 = nn.Conv2d(16, 32, 5, padding=2)
        self.hidden = nn.Linear(32 * 7 * 7, 128)
        self.logits = nn.Linear(128, classes)

    def forward(self, x):
        x = (x[:, None].float() - 70) / 80      # roughly centred, for digits and clothes alike
        x = functional.max_pool2d(functional.relu(self.conv1(x)), 2)
        x = functional.max_pool2d(functional.relu(self.conv2(x)), 2)
        return self.logits(functional.relu(self.hidden(x.flatten(1))))


class LSTM(nn.Module):
    """Characters [n, 128] -> logits [n, 128, classes], each for the character that follows."""

    def __init__(self, classes):
        super().__init__()
        self.embedding = nn.Embedding(classes, 64)
        self.lstm = nn.LSTM(64, 256, batch_first=True)
        self.logits = nn.Linear(256, classes)

    def forward(self, x):
        return self.logits(self.lstm(self.embedding(x.long()))[0])


def dnn(classes):
    """The papers' acoustic model, in small: 11 frames [n, 143] -> states [n, classes]."""
    layers = []
    for width in 143, 256, 256:
        layers += [nn.Linear(width, 256), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(256, classes))


class Centred(nn.Module):
    """Bytes [n, 28, 28] -> [n, 1, 28, 28], roughly about zero, for digits and clothes alike."""

    def forward(self, x):
        return (x[:, None].float() - 70) / 80


def dorefa(classes, bits, noise):
    """The CNN as a DoReFa network with (W, A, G) bits, and normalised, since activations end at 1.

    Bytes [n, 28, 28] -> logits [n, classes]; 215,722 parameters. `noise` is the torch.Generator
    of the G bits. GroupNorm where the paper has BatchNorm: replicas have no statistics to differ.
    """
    return mpicomp.nn.convert(nn.Sequential(
        Centred(),
        nn.Conv2d(1, 16, 5, padding=2), nn.GroupNorm(4, 16), nn.MaxPool2d(2), nn.ReLU(),
        nn.Conv2d(16, 32, 5, padding=2), nn.GroupNorm(4, 32), nn.MaxPool2d(2), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * 7 * 7, 128), nn.GroupNorm(1, 128), nn.ReLU(),
        nn.Linear(128, classes)), *bits, generator=noise)


MODELS = {"cnn": CNN, "dorefa": dorefa, "dnn": dnn, "lstm": LSTM}
