"""The networks that `mpicomp bench step` trains, with random inputs, since only time counts."""

import torch
from torch import nn


def cnn(batch=8):
    """25.6 M parameters, most of them in two fully connected layers. (model, inputs, targets)."""
    def block(a, b):
        return [nn.Conv2d(a, b, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]

    model = nn.Sequential(*block(3, 64), *block(64, 128), *block(128, 256), nn.Flatten(),
                          nn.Linear(256 * 16, 4096), nn.ReLU(), nn.Linear(4096, 2048), nn.ReLU(),
                          nn.Linear(2048, 100))
    return model, torch.randn(batch, 3, 32, 32), torch.randint(100, (batch,))


def transformer(batch=4, length=64, width=384, layers=6):
    """10.9 M parameters in six pre-norm layers. (model, inputs, targets)."""
    layer = nn.TransformerEncoderLayer(width, 6, 4 * width, dropout=0.0, batch_first=True,
                                       norm_first=True)
    model = nn.Sequential(nn.Embedding(256, width),
                          nn.TransformerEncoder(layer, layers, enable_nested_tensor=False),
                          nn.Linear(width, 256), nn.Flatten(0, 1))
    return model, torch.randint(256, (batch, length)), torch.randint(256, (batch * length,))


def mlp(batch=32):
    """0.8 M parameters: small messages, where latency decides. (model, inputs, targets)."""
    model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 1024), nn.ReLU(),
                          nn.Linear(1024, 100))
    return model, torch.randn(batch, 256), torch.randint(100, (batch,))


MODELS = {"cnn": cnn, "transformer": transformer, "mlp": mlp}
