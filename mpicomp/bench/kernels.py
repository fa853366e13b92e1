"""`mpicomp bench kernels`: times each codec against memcpy of the same gradient.

encode: owed + gradient, selection or quantisation, packing, and the new residual if the method has
one, starting from the residual that many steps leave (settled.py). measure: the scales that ranks
agree on first. decode: the sum of four peers' packets. Each takes turns with memcpy;
ratio = memcpy / case, turn by turn.
"""

from time import perf_counter

import numpy as np

from mpicomp import catalogue, kernels
from mpicomp.bench.settled import settle
from mpicomp.bench.timing import in_turn, noise_warning, ratios, summary, table
from mpicomp.errors import SpecError
from mpicomp.layout import Layout
from mpicomp.philox import Key

PEERS = 4
CASES = (("strom:tau=31.6", "vector"), ("dropping:rate=0.999", "vector"), ("onebit", "256 rows"),
         ("onebit", "1024 rows"), ("onebit", "4096 rows"), ("terngrad", "vector"),
         ("dorefa:bits=4", "vector"), ("dryden", "1024 rows"), ("adacomp:bin=512", "vector"),
         ("adacomp:bin=64", "vector"), ("chunks", "vector"), ("chunks:bits=8", "vector"),
         ("chunks:bits=32", "vector"), ("topk", "vector"), ("randomk", "vector"),
         ("powersgd", "1024 rows"),
         ("adacomp:bin=64", "vector"), ("block", "vector"), ("block:bits=4", "vector"),
         ("block:form=fp8", "vector"), ("block:round=random", "vector"), ("sign", "vector"),
         ("sign:scope=row", "4096 rows"), ("qsgd", "vector"),
         ("fp16", "vector"), ("bf16", "vector"), ("dense", "vector"))
SMALL, FEW = 2**18, 3  # elements and rounds for the reference, which is meant to be slow
HEAD = ("", "", "bytes", "ms", "quartiles", "GB/s", "ratio", "quartiles")


class Case:
    """One method on one layout of n elements, with all buffers allocated."""

    def __init__(self, spec, shape, n, rng):
        rows = n if shape == "vector" else int(shape.split()[0])
        self.label = f"{spec}, {shape}"
        self.layout = Layout.of([("gradient", (n,) if shape == "vector" else (rows, n // rows))])
        self.compressor = catalogue.method(spec).compressor
        self.grad = rng.standard_normal(self.layout.size, np.float32)
        self.state = self.compressor.init(self.layout, self.grad)
        self.packet = np.zeros(self.compressor.capacity(self.layout), np.uint8)
        self.out = np.ones(self.layout.size, np.float32)
        self.measures = self.measure() is not None
        settle(self.compressor, self.layout, self.state, rng)
        self.packets = []
        for rank in range(PEERS):
            rng.standard_normal(out=self.grad, dtype=np.float32)
            self.measure()
            self.packets.append(self.packet[:self.encode(Key(1, rank))].copy())

    def measure(self):
        return self.compressor.measure(self.grad, self.layout, self.state)

    def encode(self, key=Key(1)):
        return self.compressor.encode(self.grad, self.packet, self.layout, key, self.state)

    def decode(self):
        self.compressor.decode_sum(self.packets, self.out, self.layout, [Key(1)] * PEERS, 0.25)

    def actions(self):
        """{what: function} for each part of a step that this codec does."""
        found = {"encode": self.encode, f"decode {PEERS}": self.decode}
        if self.measures:
            found["measure"] = self.measure
        return found


class Memcpy:
    """Copies an array of n elements."""

    def __init__(self, n, rng):
        self.source, self.target = rng.standard_normal(n, np.float32), np.ones(n, np.float32)

    def of(self, part):
        """A contender for `in_turn`: a copy, with its seconds scaled to `part` elements."""
        def copy():
            start = perf_counter()
            np.copyto(self.target, self.source)
            return (perf_counter() - start) * part / self.source.size

        return copy


def time_case(case, memcpy, rounds):
    """Times one case; ({what: figures}, [warning or None, ...])."""
    figures, warnings, n = {}, [], case.layout.size
    for what, action in case.actions().items():
        turns = {"memcpy": memcpy.of(n), what: lambda action=action: action() and None}
        in_turn(turns, min(rounds, 2))
        seconds = in_turn(turns, rounds)
        time = summary(seconds[what])
        figures[what] = {"seconds": time, "gigabytes_per_second": 4e-9 * n / time["median"],
                         "ratio_to_memcpy": ratios(seconds["memcpy"], seconds[what])}
        warnings.append(noise_warning(seconds))
    return figures, warnings


def run_backend(name, n, rounds, only, memcpy):
    """Time one backend and print a table; ({"elements", "rounds", "cases"}, warnings)."""
    rng = np.random.default_rng(0)
    cases, rows, warnings = {}, [], []
    for spec, shape in CASES:
        if only not in spec:
            continue
        kernels.use(None)  # the fastest: all write the same bytes
        case = Case(spec, shape, n, rng)
        kernels.use(name)
        size = sum(packet.size for packet in case.packets) // PEERS
        figures, noise = time_case(case, memcpy, rounds)
        cases[case.label] = {"bytes": size, **figures}
        warnings += noise
        rows += [row(case.label, what, size, found) for what, found in figures.items()]
    small = "" if n == memcpy.source.size else (
        f" (a small array: memcpy is that of {memcpy.source.size:,} elements, an element)")
    print(f"{n:,} elements, backend {name}{small}; ratio = memcpy / case, in turn")
    print(table(HEAD, rows))
    return {"elements": n, "rounds": rounds, "small": bool(small), "cases": cases}, warnings


def row(label, what, size, figures):
    """A case's line of the table."""
    time, ratio = figures["seconds"], figures["ratio_to_memcpy"]
    return (label, what, f"{size:,}", f"{1e3 * time['median']:.2f}",
            f"{1e3 * time['low']:.2f} .. {1e3 * time['high']:.2f}",
            f"{figures['gigabytes_per_second']:.2f}", f"{ratio['median']:.2f}",
            f"{ratio['low']:.2f} .. {ratio['high']:.2f}")


def run(n, rounds, backend=None, only="", plot=None) -> dict:
    """Time every backend that is present, or the one named, the fastest first.

    Returns {"backends": {name: {"elements", "rounds", "small", "cases": {label: {what: {...}}}}}}.
    `plot` is a file for a picture, which needs matplotlib. Raises SpecError if the backend is not
    present or there is nothing to measure.
    """
    names = dict.fromkeys(spec for spec, _ in CASES)
    if not any(only in spec for spec in names):
        raise SpecError(f"--only {only} found, expected a part of one of {', '.join(names)}")
    rows = max(int(shape.split()[0]) for _, shape in CASES if shape != "vector")
    if n < rows:
        raise SpecError(f"--elements {n} found, expected at least {rows}, a column of the largest "
                        "matrix")
    if backend:
        kernels.use(backend)
    memcpy, found, warnings = Memcpy(n, np.random.default_rng(1)), {}, []
    for name in [backend] if backend else list(kernels.backends())[::-1]:
        size, turns = (min(n, SMALL), min(rounds, FEW)) if name == "reference" else (n, rounds)
        found[name], noise = run_backend(name, size, turns, only, memcpy)
        warnings += noise
    kernels.use(None)
    if any(warnings):
        print(next(filter(None, warnings)))
    if plot:
        draw(found, plot)
    return {"elements": n, "rounds": rounds, "threads": _threads(), "noisy": any(warnings),
            "backends": found}


def _threads():
    cpu = kernels.backends().get("cpu")
    return cpu.threads() if cpu else 1


def draw(backends, path):
    """Draw the ratios to memcpy of encode and decode; prints a line if matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        print("no picture: matplotlib is missing; type: pip install matplotlib")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = ("encode", f"decode {PEERS}")
    figure, axes = pyplot.subplots(1, len(kinds), sharey=True, figsize=(10, 5))
    for axis, what in zip(axes, kinds):
        for number, (name, found) in enumerate(backends.items()):
            ratio = [case[what]["ratio_to_memcpy"] for case in found["cases"].values()]
            places = [i + 0.4 * number for i in range(len(ratio))]
            middle = [r["median"] for r in ratio]
            spread = [[r["median"] - r["low"] for r in ratio],
                      [r["high"] - r["median"] for r in ratio]]
            axis.barh(places, middle, 0.38, xerr=spread,
                      label=name + (" (small array)" if found["small"] else ""))
        labels = list(next(iter(backends.values()))["cases"])
        axis.set_yticks(range(len(labels)), labels)
        axis.axvline(1, color="gray", linewidth=0.8)
        axis.set_xscale("log")
        axis.set_xlabel(f"{what}: memcpy's time / this time")
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="lower left")
    figure.tight_layout()
    figure.savefig(path)
    print(f"picture: {path}")
