"""The small networks of launch/train.py: each takes the rows of its data set and gives logits."""
from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

import mpicomp.nn
from trainer.recipes import LETTERS


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


class G2P(nn.Module):
    """Spelling to phonemes: a GRU reads letters both ways, another attends to them and writes.

    x [n, 32]: 16 letters, then 0 and the phonemes so far -> logits [n, 16, classes] for the next
    phoneme at each place. 183,144 parameters. Attention is Luong's "general": softmax over letters
    of d W e, then tanh of a linear map of [d, context].
    """

    def __init__(self, classes, size=128):
        super().__init__()
        self.letters, self.phonemes = nn.Embedding(27, 64), nn.Embedding(classes, 64)
        self.reader = nn.GRU(64, size // 2, batch_first=True, bidirectional=True)
        self.writer = nn.GRU(64, size, batch_first=True)
        self.attention = nn.Linear(size, size, bias=False)
        self.context, self.logits = nn.Linear(2 * size, size), nn.Linear(size, classes)

    def forward(self, x):
        return self.write(x[:, 16:], *self.read(x[:, :16]))[0]

    def read(self, letters):
        """(state to write from, what was read at each letter, which places are empty)."""
        encoded, ends = self.reader(self.letters(letters.long()))
        return ends.transpose(0, 1).flatten(1)[None], encoded, letters == 0

    def write(self, phonemes, state, encoded, empty):
        """(logits for what follows each phoneme, state after the last)."""
        written, state = self.writer(self.phonemes(phonemes.long()), state)
        scores = self.attention(written) @ encoded.transpose(1, 2)
        attended = scores.masked_fill(empty[:, None], -torch.inf).softmax(2) @ encoded
        return self.logits(torch.tanh(self.context(torch.cat([written, attended], 2)))), state

    @torch.no_grad()
    def edits(self, x, y):
        """(edits, phonemes): how far what it writes, told only its own phonemes, is from y.

        `edits` is the sum of Levenshtein distances, `phonemes` the number of those in y.
        """
        state, *read = self.read(x[:, :16])
        said, spoken = x.new_zeros(len(x), 1), []
        for _ in range(16):
            logits, state = self.write(said, state, *read)
            said = logits.argmax(2)
            spoken.append(said)
        pairs = [(until_end(s), until_end(t)) for s, t in zip(torch.cat(spoken, 1), y)]
        return sum(levenshtein(*pair) for pair in pairs), sum(len(right) for _, right in pairs)


class Block(nn.Module):
    """Attention to the letters so far, then two layers at each place; both add to their input."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.attended = nn.Linear(width, width, bias=False)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        parts = self.query_key_value(self.norm1(x)).unflatten(2, (3, self.heads, -1))
        query, key, value = parts.permute(2, 0, 3, 1, 4)  # each [n, heads, places, width / heads]
        found = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attended(found.transpose(1, 2).flatten(2))
        return x + self.narrow(functional.gelu(self.wide(self.norm2(x))))


class GPT(nn.Module):
    """Characters [n, 128] -> logits [n, 128, classes], each for the character that follows.

    A decoder-only transformer: layers are normalised before, not after, and nothing is dropped out.
    431,872 parameters for 77 classes.
    """

    def __init__(self, classes, width=128, layers=2, heads=4):
        super().__init__()
        self.letters, self.places = nn.Embedding(classes, width), nn.Embedding(LETTERS, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.logits = nn.LayerNorm(width), nn.Linear(width, classes, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, x):
        x = self.letters(x.long()) + self.places.weight[:x.shape[1]]
        return self.logits(self.norm(self.blocks(x)))


def until_end(codes):
    """The codes before the first 0, as a list."""
    codes = codes.tolist()
    return codes[:codes.index(0)] if 0 in codes else codes


def levenshtein(a, b):
    """The least number of insertions, deletions and substitutions that make b of a."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        above, row[0] = row[0], i
        for j, right in enumerate(b, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (left != right))
    return row[-1]


MODELS = {"cnn": CNN, "dorefa": dorefa, "dnn": dnn, "lstm": LSTM, "g2p": G2P, "gpt": GPT}
