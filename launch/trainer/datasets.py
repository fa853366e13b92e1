"""Decodes the data sets, maps them into memory, and divides each batch among the ranks."""
from __future__ import annotations

import contextlib
import fcntl
import functools
import gzip
import hashlib
import io
import json
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trainer.recipes import LETTERS
from trainer.sources import SOURCES, DataError, cache, raw_files

DECODING = 1        # part of the cache's key: raise it when a decoder below changes what it returns
PADDING = 255       # in y: no target, only there to make rows equally long
SPLIT_SEED = 0      # the test sets are fixed for ever; --seed never moves them


# ---------------------------------------------------------------- decode: raw bytes -> arrays

def _words(count: int, *key: int) -> np.ndarray:
    """uint64[count] of random words, a pure function of the key.

    Raw Philox words are promised to stay the same in every NumPy; Generator.permutation is not.
    """
    return np.random.Philox(key=key).random_raw(count)


def _mnist5k(csv: bytes) -> dict[str, np.ndarray]:
    table = np.loadtxt(io.BytesIO(gzip.decompress(csv)), delimiter=",", dtype=np.uint8)
    x, y = table[:, :-1].reshape(-1, 28, 28), table[:, -1]
    shuffled = np.argsort(_words(len(y), SPLIT_SEED, 0), kind="stable")
    by_class = [shuffled[y[shuffled] == digit] for digit in range(10)]      # 500 of each
    train = np.sort(np.concatenate([rows[:400] for rows in by_class]))
    test = np.sort(np.concatenate([rows[400:] for rows in by_class]))
    return {"train_x": x[train], "train_y": y[train], "test_x": x[test], "test_y": y[test]}


def _fashion(*idx: bytes) -> dict[str, np.ndarray]:
    train_x, train_y, test_x, test_y = (gzip.decompress(part) for part in idx)
    return {"train_x": np.frombuffer(train_x, np.uint8, offset=16).reshape(-1, 28, 28),
            "train_y": np.frombuffer(train_y, np.uint8, offset=8),
            "test_x": np.frombuffer(test_x, np.uint8, offset=16).reshape(-1, 28, 28),
            "test_y": np.frombuffer(test_y, np.uint8, offset=8)}


def _fsdd(npz: bytes) -> dict[str, np.ndarray]:
    """Frames for an acoustic model: 11 frames of 13 MFCC in, one of 30 states (digit x third) out.

    The split is by utterance, so that no test frame has its neighbours in the training set.
    """
    with np.load(io.BytesIO(npz), allow_pickle=False) as raw:
        frames, digits, lengths = raw["X"].astype(np.float32), raw["y"], raw["lengths"]
    begin, inputs, states = 0, [], []
    for length, digit in zip(lengths, digits):
        at = np.arange(length)
        window = np.clip(at[:, None] + np.arange(-5, 6), 0, length - 1)     # the edges repeat
        inputs.append(frames[begin + window].reshape(length, 143))
        states.append((digit * 3 + at * 3 // length).astype(np.uint8))
        begin += length
    shuffled = np.argsort(_words(len(lengths), SPLIT_SEED, 1), kind="stable")
    out = {}
    for part, utterances in ("train", shuffled[600:]), ("test", shuffled[:600]):
        out[part + "_x"] = np.concatenate([inputs[u] for u in np.sort(utterances)])
        out[part + "_y"] = np.concatenate([states[u] for u in np.sort(utterances)])
    mean, deviation = (f(out["train_x"], axis=0, dtype=np.float64) for f in (np.mean, np.std))
    for part in "train_x", "test_x":
        out[part] = ((out[part] - mean) / deviation).astype(np.float32)
    return out


def _shakespeare(plays: bytes) -> dict[str, np.ndarray]:
    """Dialogue: a line with the name, then the lines spoken. y is x one character later."""
    speeches = re.findall(r"^\*\*(.+?)\*\*\s*\n((?:.+\n)+)", plays.decode(), flags=re.M)
    text = "\n".join(name + "\n" + re.sub(r"[ \t]+$", "", lines, flags=re.M)
                     for name, lines in speeches)
    symbols, codes = np.unique(np.frombuffer(text.encode("utf-32-le"), np.uint32),
                               return_inverse=True)
    codes, edge, out = codes.astype(np.uint8), len(codes) * 95 // 100, {"symbols": symbols}
    for part, stretch in ("train", codes[:edge]), ("test", codes[edge:]):
        count = (len(stretch) - 1) // LETTERS
        out[part + "_x"] = stretch[:count * LETTERS].reshape(count, LETTERS)
        out[part + "_y"] = stretch[1:count * LETTERS + 1].reshape(count, LETTERS)
    return out


def _cmudict(dictionary: bytes) -> dict[str, np.ndarray]:
    """Spelling to phonemes, for a network that is told the phonemes so far and says the next one.

    x is 16 letters (1 ... 26, then 0), then 0 and the phonemes but the last, 16 in all; y is the
    phonemes (1 ... 39), 0 for the end, then PADDING. Words of letters only, at most 16 of them and
    15 phonemes, in their first pronunciation and without stress; 5,000 words are the test set.
    """
    entries = [(line.split()[0], re.sub(r"\d|#.*", "", line).split()[1:])
               for line in dictionary.decode().splitlines() if re.match("[a-z]{1,16} ", line)]
    entries = [(word, phonemes) for word, phonemes in entries if len(phonemes) <= 15]
    names = sorted({name for _, phonemes in entries for name in phonemes})
    x, y = np.zeros((len(entries), 32), np.uint8), np.full((len(entries), 16), PADDING, np.uint8)
    for i, (word, phonemes) in enumerate(entries):
        codes = [1 + names.index(name) for name in phonemes]
        x[i, :len(word)] = np.frombuffer(word.encode(), np.uint8) - 96
        x[i, 17:17 + len(codes)] = codes
        y[i, :len(codes) + 1] = [*codes, 0]
    shuffled = np.argsort(_words(len(y), SPLIT_SEED, 2), kind="stable")
    train, test = np.sort(shuffled[5000:]), np.sort(shuffled[:5000])
    return {"train_x": x[train], "train_y": y[train], "test_x": x[test], "test_y": y[test],
            "phonemes": np.array(names)}


DECODERS = {"mnist5k": _mnist5k, "fsdd": _fsdd, "fashion": _fashion, "shakespeare": _shakespeare,
            "cmudict": _cmudict}


# ---------------------------------------------------------------- load: arrays, mapped

@dataclass(frozen=True)
class Split:
    """x: [examples, ...] and y: [examples] or [examples, positions], read-only memory maps."""
    x: np.ndarray
    y: np.ndarray

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True)
class Data:
    """One set, ready to index: `data.train.x[rows]` reads those rows from disk and no others."""
    name: str
    train: Split
    test: Split
    classes: int
    source: str             # a sha256 that stands for the raw files


def load(name: str) -> Data:
    """Check the raw files of `name`, decode them unless that has been done here, map the arrays.

    Raises DataError: unknown name, missing package, wrong hash, cache that cannot be written.
    """
    raw = raw_files(name)
    source = hashlib.sha256("".join(SOURCES[name].files.values()).encode()).hexdigest()
    folder = cache() / f"{name}-{source[:12]}-v{DECODING}"
    try:
        if not folder.exists():
            _decode(name, raw, folder)
        train, test = (Split(*(np.load(folder / f"{part}_{kind}.npy", mmap_mode="r")
                               for kind in "xy")) for part in ("train", "test"))
        classes = json.loads((folder / "about.json").read_text())["classes"]
    except (OSError, ValueError) as problem:
        raise DataError(f"{name}: cannot use the decoded arrays in {folder} ({problem}); delete "
                        "that folder, or set MPICOMP_DATA to one that you can write") from None
    return Data(name, train, test, classes, source)


def _decode(name: str, raw: list[bytes], folder: Path) -> None:
    """Write the arrays aside and rename the folder, so that it is never seen half full."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    # All ranks of a node come here at once. The lock saves the work of all but the first; the
    # rename keeps it right even where a network file system makes nothing of the lock.
    with open(folder.with_suffix(".lock"), "w") as lock:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.exists():
            return
        aside = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
        try:
            arrays = DECODERS[name](*raw)
            for key, array in arrays.items():
                np.save(aside / f"{key}.npy", array)
            targets = arrays["train_y"][arrays["train_y"] != PADDING]
            classes = len(arrays.get("symbols", ())) or int(targets.max()) + 1
            (aside / "about.json").write_text(json.dumps({"classes": classes}))
            aside.chmod(0o755)
            try:
                aside.rename(folder)
            except OSError:
                if not folder.exists():     # else another process was first, with the same arrays
                    raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)


# ---------------------------------------------------------------- who trains on what

@functools.lru_cache(maxsize=2)
def order(examples: int, seed: int, epoch: int) -> np.ndarray:
    """int64[examples]: the order of one epoch, a function of (seed, epoch) and nothing else."""
    return np.argsort(_words(examples, seed, epoch), kind="stable")


def share(count: int, rank: int, ranks: int) -> slice:
    """The contiguous part of `count` things that is this rank's; parts differ by one at most."""
    return slice(count * rank // ranks, count * (rank + 1) // ranks)


def my_rows(examples: int, batch: int, seed: int, step: int, rank: int, ranks: int) -> np.ndarray:
    """int64[my part of the batch]: this rank's rows of global batch number `step`, from 0.

    The global batch is the same whatever the number of ranks. What does not fill a batch at the
    end of an epoch is left out; the next epoch's order is another one.
    """
    epoch, t = divmod(step, examples // batch)
    return order(examples, seed, epoch)[t * batch:(t + 1) * batch][share(batch, rank, ranks)]
