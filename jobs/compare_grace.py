#!/usr/bin/env python3
"""Encode, and decode and sum four packets: GRACE's nearest compressors against ours, in turn.

    git clone https://github.com/sands-lab/grace
    OMP_NUM_THREADS=1 python jobs/compare_grace.py --grace grace --json FILE

GRACE compresses 24 tensors of 2**20 elements one at a time, with a malloc that keeps freed memory,
which is fastest. Ours compress the same elements as one bucket of 24 layers. Both have the same
gradients and residuals (bench/settled.py), one thread, and a process each; these take turns.
"""

import argparse
import os
import subprocess
import sys
from time import perf_counter

import numpy as np
import torch

from mpicomp import catalogue
from mpicomp.bench.settled import settle
from mpicomp.bench.timing import ratios, summary, surroundings, table, write_json
from mpicomp.layout import Layout
from mpicomp.philox import Key

TENSORS, SIZE, PEERS = 24, 2**20, 4
TUNED = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**32),
         "MALLOC_TOP_PAD_": str(2**28)}
CASES = {  # name: (our method, shape of a layer, GRACE's module, class, arguments, residual?)
    "strom:tau=31.6": ("strom:tau=31.6", (SIZE,), "threshold", "ThresholdCompressor", (31.6,),
                       True),
    "dropping:rate=0.999": ("dropping:rate=0.999", (SIZE,), "dgc", "DgcCompressor", (0.001,),
                            True),
    "onebit, 256 rows": ("onebit", (256, SIZE // 256), "onebit", "OneBitCompressor", (), True),
    "onebit, 1024 rows": ("onebit", (1024, SIZE // 1024), "onebit", "OneBitCompressor", (), True),
    "terngrad": ("terngrad", (SIZE,), "terngrad", "TernGradCompressor", (), False)}


class Ours:
    """One of our methods on one bucket. All layers have the same residual, `owed`."""

    def __init__(self, case):
        spec, shape = CASES[case][:2]
        rng = np.random.default_rng(0)
        self.compressor = c = catalogue.method(spec).compressor
        self.layout = Layout.of((str(i), shape) for i in range(TENSORS))
        self.grad = rng.standard_normal(self.layout.size, np.float32)
        self.state = c.init(self.layout, self.grad)
        self.measures = c.measure(self.grad, self.layout, self.state) is not None
        self.packet = np.zeros(c.capacity(self.layout), np.uint8)
        self.out = np.ones(self.layout.size, np.float32)
        layer = Layout.of([("layer", shape)])
        one = c.init(layer, self.grad[:SIZE])
        settle(c, layer, one, rng)
        self.owed = next(iter(c.persistent(one).values()), None)
        for array in c.persistent(self.state).values():
            array.reshape(TENSORS, SIZE)[...] = self.owed
        self.packets = []
        for rank in range(PEERS):
            used = self._encode(np.roll(self.grad, 101 * rank), Key(1, rank))
            self.packets.append(self.packet[:used].copy())
        self.bytes = self.packets[0].size

    def _encode(self, grad, key):
        if self.measures:
            self.compressor.measure(grad, self.layout, self.state)
        return self.compressor.encode(grad, self.packet, self.layout, key, self.state)

    def encode(self):
        self._encode(self.grad, Key(1))

    def decode(self):
        self.compressor.decode_sum(self.packets, self.out, self.layout, [Key(1)] * PEERS, 0.25)


class Theirs:
    """GRACE's compressor and its residual memory, a tensor at a time."""

    def __init__(self, case):
        from importlib import import_module

        module, name, arguments, feedback = CASES[case][2:]
        ours = Ours(case)
        self.compressor = getattr(import_module(f"grace_dl.dist.compressor.{module}"),
                                  name)(*arguments)
        memory = import_module("grace_dl.dist.memory." + ("residual" if feedback else "none"))
        self.memory = memory.ResidualMemory() if feedback else memory.NoneMemory()
        self.grads = [torch.from_numpy(g) for g in ours.grad.reshape(TENSORS, SIZE)]
        self.kept = {str(i): torch.from_numpy(ours.owed.copy()) for i in range(TENSORS)} \
            if feedback else None
        self._restore()
        self.packets = [[self.compressor.compress(self.memory.compensate(g.roll(101 * r), str(i)),
                                                  str(i)) for i, g in enumerate(self.grads)]
                        for r in range(PEERS)]
        self.bytes = sum(part.numel() * part.element_size() for parts, _ in self.packets[0]
                         for part in parts)

    def _restore(self):
        if self.kept:
            self.memory.residuals = dict(self.kept)

    def encode(self):
        self._restore()
        for i, grad in enumerate(self.grads):
            x = self.memory.compensate(grad, str(i))
            packet, context = self.compressor.compress(x, str(i))
            self.memory.update(x, str(i), self.compressor, packet, context)

    def decode(self):
        for i in range(TENSORS):
            parts = [self.compressor.decompress(*self.packets[r][i]) for r in range(PEERS)]
            self.compressor.aggregate(parts) / PEERS


def serve(kind):
    """For each case named on stdin: its bytes, then seconds of each turn that is asked for."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        contender = None  # frees the one before
        if line.strip() in CASES:
            contender = kind(line.strip())
            print(contender.bytes, flush=True)
            while sys.stdin.readline().strip() == "turn":
                marks = [perf_counter()]
                for work in (contender.encode, contender.decode):
                    work()
                    marks.append(perf_counter())
                print(marks[1] - marks[0], marks[2] - marks[1], flush=True)


def main():
    parser = argparse.ArgumentParser(prog="jobs/compare_grace.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grace", required=True, help="a checkout of GRACE")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--serve", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        sys.path.insert(0, options.grace)
        return serve(Ours if options.serve == "ours" else Theirs)
    workers = {kind: subprocess.Popen(
        [sys.executable, __file__, "--grace", options.grace, "--serve", kind], text=True,
        env=os.environ | more, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for kind, more in (("theirs", TUNED), ("ours", {}))}

    def ask(kind, word, answers=True):
        workers[kind].stdin.write(word + "\n")
        workers[kind].stdin.flush()
        return [float(x) for x in workers[kind].stdout.readline().split()] if answers else None

    found, rows = {}, []
    for case in CASES:
        size = {kind: int(ask(kind, case)[0]) for kind in workers}
        turns = {kind: [] for kind in workers}
        for _ in range(options.rounds + 1):
            for kind in workers:
                turns[kind].append(ask(kind, "turn"))
        for kind in workers:
            ask(kind, "done", answers=False)
        both = {kind: [sum(turn) for turn in turns[kind][1:]] for kind in workers}
        found[case] = {"ratio": ratios(both["theirs"], both["ours"]), "bytes": size,
                       **{kind: {what: summary([turn[k] for turn in turns[kind][1:]])
                                 for k, what in enumerate(("encode", f"decode {PEERS}"))}
                          for kind in workers}}
        ms = {kind: [f"{1e3 * part['median']:.1f}" for part in found[case][kind].values()]
              for kind in workers}
        ratio = found[case]["ratio"]
        rows.append((case, *ms["theirs"], *ms["ours"], f"{ratio['median']:.1f}",
                     f"{ratio['low']:.1f} .. {ratio['high']:.1f}", f"{size['theirs']:,}",
                     f"{size['ours']:,}"))
    print(table(("", "GRACE encode", "decode 4", "encode", "decode 4", "ratio", "quartiles",
                 "GRACE bytes", "bytes"), rows))
    if options.json:
        command = "OMP_NUM_THREADS=1 python jobs/compare_grace.py --grace grace"
        write_json(options.json, surroundings() | {"command": command, "cases": found})
    return None


if __name__ == "__main__":
    main()
