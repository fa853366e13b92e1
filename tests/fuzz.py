#!/usr/bin/env python3
"""Damaged packets by the million: every compressor refuses them, or decodes to finite numbers.

    python tests/fuzz.py                                 10,000 mutations of each compressor
    python tests/fuzz.py --mutations 1000000 --asan      the slow lane: minutes a compressor
    python tests/fuzz.py --only strom --seed 7           one compressor, other mutations
    python tests/fuzz.py --backends cpu --out FILE       a backend alone; the figures as JSON
    python tests/fuzz.py --backends cpu,shim             with the CUDA kernels, run on the CPU

Each mutation is decoded by every backend, and by the compiled kernels with each level of vector
instructions that this CPU has: all refuse it with PacketError, or all make the same bytes of it,
all finite. Nothing may be written outside of the output, and the packet stays as it is. With --asan
the C++ kernels are built anew with AddressSanitizer and UBSan and run with libasan before
everything else: a read or write outside of an array, a shift too far or a signed overflow ends the
process. What the CUDA kernels get ends where a page ends behind which nobody may read. Ends with
status 1 where anything of this does not hold, naming the packet.
"""

import argparse
import ctypes
import json
import mmap
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import laws
import levels
import material
import numpy as np
from shim import arrays
from shim.arrays import DeviceArray
from shim.device import Shim

from mpicomp import PacketError, kernels
from mpicomp.compressors.registry import from_spec
from mpicomp.kernels.gpu import device
from mpicomp.philox import Key
from mpicomp.transport import packet

KERNELS = Path(kernels.__file__).parent
SHAPES = ["vector of 7", "small convolution", "tall", "network", "scalar", "vector of 257"]
NAMES = ["normal", "ties", "heavy tail", "huge"]
WORDS = [0, 1, 2, 3, 0x7F, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE,
         0xFFFFFFFF, 0x7F800000, 0xFF800000, 0x7FC00000, 0x7F7FFFFF, 0xFF7FFFFF, 0x00000001,
         0x3F800000, 0x7C007C00, 0x7F807F80]  # ends of ranges, NaN, infinite, largest floats
BEYOND = """
import numpy as np
from mpicomp.kernels.cpu.library import lib
x = np.zeros(300, np.float32)
print(lib.mp_finite(x.ctypes.data, x.size + 1))
"""  # reads one float too many: the test of the sanitizer
LONGER = 64  # bytes by which a mutation makes a payload longer at most
EDGE = 8  # floats on either side of the output that nobody may write
HOW = [(1, 1 << 17, 1 << 20), (3, 16, 16)]  # as always; threads and streaming on small arrays


class Found(AssertionError):
    """A packet that is neither refused nor decoded as it should be."""


def mutated(good, other, layout, rng):
    """A damaged copy of the payload `good`, as a bytearray. `other` is one more good payload."""
    bad = bytearray(good)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        kind = rng.getrandbits(4)
        n = len(bad)
        at = rng.randrange(n) if n else 0
        word = at & ~3
        if kind < 4 and n:
            bad[at] ^= 1 << rng.getrandbits(3)
        elif kind < 6 and n:
            bad[at] = rng.getrandbits(8)
        elif kind < 8:
            bad[word:word + 4] = rng.choice(WORDS).to_bytes(4, "little")
        elif kind == 8:  # an index or a count near the end of the layout
            value = max(0, layout.size + rng.randrange(-2, 3)) << rng.getrandbits(1)
            bad[word:word + 4] = value.to_bytes(4, "little")
        elif kind == 9:
            del bad[at:]
        elif kind == 10:
            del bad[at:at + 1 + rng.randrange(8)]
        elif kind == 11:
            bad[at:at] = rng.randbytes(1 + rng.randrange(8))
        elif kind == 12:
            bad += rng.randbytes(4 * (1 + rng.getrandbits(2)))
        elif kind == 13 and other:
            start = rng.randrange(len(other)) & ~3
            bad[word:word + 16] = other[start:start + 16]
        elif kind == 14 and n >= 8:  # two words change places
            to = rng.randrange(n - 3) & ~3
            word = min(word, (n - 4) & ~3)
            bad[word:word + 4], bad[to:to + 4] = bad[to:to + 4], bad[word:word + 4]
        else:
            bad[at:] = rng.randbytes(n - at)
    return bad


def fenced(size):
    """`size` zero bytes; who reads or writes behind them is ended by SIGSEGV."""
    page = mmap.PAGESIZE
    whole = np.frombuffer(mmap.mmap(-1, -(-size // page) * page + page), np.uint8)
    end = whole.size - page
    if ctypes.CDLL(None).mprotect(ctypes.c_void_p(whole.ctypes.data + end), page, 0):
        raise OSError("mprotect failed")
    return whole[end - size:end]


class Target:
    """One configuration on one layout: good payloads, and what is to hold of damaged ones."""

    def __init__(self, compressor, layout, backends, seed):
        self.compressor, self.layout, self.backends = compressor, layout, backends
        self.how = HOW[0]
        self.good = [laws.pack(compressor, material.gradient(name, layout, seed), layout).tobytes()
                     for name in NAMES]
        self.wide = np.zeros(layout.size + 2 * EDGE, np.float32)
        self.out = self.wide[EDGE:-EDGE] if layout.size else self.wide[:0]
        self.exact = np.zeros(layout.size, np.float32)  # its end is the end of the memory
        if "shim" in backends:
            self.sent = fenced(max(map(len, self.good)) + LONGER)
            self.filled = fenced(4 * (EDGE + layout.size)).view(np.float32)
        self.refused = self.decoded = 0

    def tell(self, bad, problem):
        raise Found(f"{self.compressor!r} on {[s.shape for s in self.layout.segments]}: {problem}\n"
                    f"payload {bytes(bad).hex()}")

    def decoders(self):
        """(backend, level of vector instructions) of each way to decode a payload."""
        for name in self.backends:
            for level in range(levels.MOST, -1, -1) if name == "cpu" else [None]:
                yield name, level

    def decode(self, name, level, payload, together):
        """The bytes of what a backend decodes, or None where it refuses."""
        if name == "shim":
            return self.decode_on_device(payload, together)
        kernels.use(name)
        if level is not None:
            levels.run_with(level, *self.how)
        out = self.exact if together else self.out
        out[...] = 0
        return out.tobytes() if self.accepts(payload, out, together) else None

    def decode_on_device(self, payload, together):
        """The same by the CUDA kernels, from and into arrays that end where memory ends."""
        kernels.use(None)
        self.filled[:] = 0
        sent = self.sent[self.sent.size - payload.size:]
        sent[:] = payload
        result = None
        if self.accepts(DeviceArray(sent), DeviceArray(self.filled[EDGE:]), together):
            result = self.filled[EDGE:].tobytes()
        if self.filled[:EDGE].any() or not np.array_equal(sent, payload):
            self.tell(payload, "a CUDA kernel wrote outside of the output")
        if len(arrays.LIVE) > 1000:
            arrays.check()
        return result

    def accepts(self, payload, out, together):
        """Decode the payload, alone or twice; False where it is refused."""
        try:
            if together:
                self.compressor.decode_sum([payload, payload], out, self.layout,
                                           [laws.KEY, Key()], 0.25)
            else:
                self.compressor.decode_add(payload, out, self.layout, laws.KEY, 0.5)
        except PacketError:
            return False
        return True

    def attack(self, rng):
        """One mutation, decoded by every backend."""
        good = rng.choice(self.good)
        bad = mutated(good, rng.choice(self.good), self.layout, rng)
        memory = np.empty(len(bad) + rng.getrandbits(2), np.uint8)  # any address, an exact end
        payload = memory[memory.size - len(bad):]
        payload[:] = bad
        together = rng.getrandbits(2) == 0
        decoders = [*self.decoders()]
        results = [self.decode(*decoder, payload, together) for decoder in decoders]
        if any(result != results[0] for result in results):
            said = ["refused" if r is None else np.frombuffer(r, np.float32)[:8] for r in results]
            self.tell(bad, f"the backends disagree: {dict(zip(decoders, said))}")
        if results[0] is None:
            self.refused += 1
            return
        self.decoded += 1
        if not np.isfinite(np.frombuffer(results[0], np.float32)).all():
            self.tell(bad, "decodes to NaN or Inf")
        if payload.tobytes() != bad:
            self.tell(bad, "decoding changed the payload")
        edges = self.wide if not self.layout.size else np.r_[self.wide[:EDGE], self.wide[-EDGE:]]
        if edges.any():
            self.tell(bad, "written outside of the output")


def fuzz(name, mutations, backends, seed=0):
    """(refused, decoded) of so many mutations over all configurations of one compressor."""
    rng = random.Random(f"{name} {seed}")
    targets = [Target(from_spec(row.spec), material.LAYOUTS[shape], backends, seed)
               for row in material.ROWS.get(name, [material.Row(name)]) for shape in SHAPES]
    before = kernels.for_numpy()
    if "shim" in backends:
        device.use(Shim())
    try:
        for number in range(mutations):
            target = targets[number % len(targets)]
            target.how = HOW[number // len(targets) % len(HOW)]
            target.attack(rng)
        arrays.check()
    finally:
        device.use(None)
        levels.reset()
        kernels.use(next(n for n, m in kernels.backends().items() if m is before))
    return sum(t.refused for t in targets), sum(t.decoded for t in targets)


def fuzz_headers(mutations, seed=0):
    """(refused, read) of damaged headers: PacketError, or fields in their ranges."""
    rng, refused, read = random.Random(f"header {seed}"), 0, 0
    good = bytearray(packet.SIZE)
    packet.Header(3, 1, 2**63 + 5, 40, 1).write(good)
    for _ in range(mutations):
        bad = mutated(good, good, material.LAYOUTS["tall"], rng)
        try:
            header = packet.Header.read(bad)
        except PacketError:
            refused += 1
            continue
        read += 1
        if not (0 <= header.step < 2**32 and 0 <= header.length < 2**64 and header.flags < 2**16):
            raise Found(f"header {bytes(bad).hex()} reads as {header}")
    return refused, read


# ---- the slow lane --------------------------------------------------------------------------


def sanitized(argv):
    """This program again, with kernels built with sanitizers; returns its exit status."""
    with tempfile.TemporaryDirectory() as folder:
        library, compiler = Path(folder, "kernels.so"), os.environ.get("CXX", "g++")
        subprocess.run([compiler, "-std=c++17", "-O1", "-g", "-ffp-contract=off", "-fPIC",
                        "-fno-math-errno", "-fvisibility=hidden", "-pthread", "-shared",
                        "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined",
                        str(KERNELS / "cpu" / "src" / "cpu.cpp"), "-o", str(library)], check=True)
        runtime = subprocess.run([compiler, "-print-file-name=libasan.so"], check=True, text=True,
                                 capture_output=True).stdout.strip()
        environment = {
            **os.environ, "LD_PRELOAD": runtime, "MPICOMP_KERNELS_LIBRARY": str(library),
            "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
        seen = subprocess.run([sys.executable, "-c", BEYOND], env=environment, text=True,
                              capture_output=True)
        if "heap-buffer-overflow" not in seen.stderr:
            raise SystemExit(f"fuzz: a read beyond an array was not noticed: {seen.stderr[-2000:]}")
        return subprocess.run([sys.executable, __file__, *argv], env=environment).returncode


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mutations", type=int, default=10_000, help="of each compressor")
    parser.add_argument("--only", action="append", help="these compressors, or header")
    parser.add_argument("--backends", default=",".join(kernels.backends()),
                        help="default: %(default)s; shim: the CUDA kernels on the CPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--asan", action="store_true", help="kernels with AddressSanitizer, UBSan")
    parser.add_argument("--out", type=Path, help="add the figures to this JSON file")
    args = parser.parse_args(argv)
    if args.asan:
        return sanitized([a for a in argv or sys.argv[1:] if a != "--asan"])
    instrumented = bool(os.environ.get("MPICOMP_KERNELS_LIBRARY"))
    rows = json.loads(args.out.read_text()) if args.out and args.out.exists() else []
    for name in args.only or [*sorted(material.registry()), "header"]:
        began = time.time()
        backends = args.backends.split(",")
        refused, decoded = (fuzz_headers(args.mutations, args.seed) if name == "header" else
                            fuzz(name, args.mutations, backends, args.seed))
        rows.append(dict(compressor=name, backends=backends, sanitizers=instrumented,
                         mutations=refused + decoded, refused=refused, decoded=decoded,
                         seconds=round(time.time() - began, 1), seed=args.seed))
        print(f"{name:10} {refused + decoded:9,} mutations: {refused:,} refused, {decoded:,} "
              f"decoded to finite numbers, {rows[-1]['seconds']} s", flush=True)
        if args.out:
            args.out.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
