"""`mpicomp bench kernels`: what each codec costs, against memcpy of the same gradient.

encode is what a step asks of the compressor: owed + gradient, selection or quantisation, packing
and the new residual, where the method has one; measure what ranks agree on first; decode the sum of
four peers' packets. memcpy takes turns with each of them; ratio = memcpy / case.
"""

import numpy as np

from mpicomp import kernels, systems
from mpicomp.bench.timing import in_turn, noise_warning, ratios, summary, table
from mpicomp.layout import Layout
from mpicomp.philox import Key

PEERS = 4
CASES = (("strom:tau=3.3", "vector"), ("dropping:rate=0.999", "vector"), ("onebit", "1024 rows"),
         ("onebit", "4096 rows"), ("terngrad", "vector"), ("dorefa:bits=4", "vector"),
         ("dryden", "1024 rows"), ("adacomp:bin=512", "vector"), ("adacomp:bin=64", "vector"),
         ("fp16", "vector"), ("bf16", "vector"), ("dense", "vector"))


class Case:
    """One method on one layout of n elements, with everything that it needs already in memory."""

    def __init__(self, spec, shape, n, rng):
        rows = n if shape == "vector" else int(shape.split()[0])
        self.label = f"{spec}, {shape}"
        self.layout = Layout.of([("gradient", (n,) if shape == "vector" else (rows, n // rows))])
        self.compressor = systems.method(spec).compressor
        self.grad = rng.standard_normal(self.layout.size, np.float32)
        self.state = self.compressor.init(self.layout, self.grad)
        self.packet = np.zeros(self.compressor.capacity(self.layout), np.uint8)
        self.out = np.ones(self.layout.size, np.float32)
        self.measures = self.measure() is not None
        for owed in self.compressor.persistent(self.state).values():
            owed[...] = 1e-3 * self.grad[::-1]  # memory that was never written reads faster
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
        """{what: function} of what a step asks of this codec."""
        found = {"encode": self.encode, f"decode {PEERS}": self.decode}
        if self.measures:
            found["measure"] = self.measure
        return found


def run(n, rounds, backend=None, only="") -> dict:
    """{"cases": {label: {what: {...}}}}; prints a table."""
    kernels.use(backend)
    name = next(k for k, v in kernels.backends().items() if v is kernels.of(None))
    rng = np.random.default_rng(0)
    source, target = rng.standard_normal(n, np.float32), np.ones(n, np.float32)
    figures, rows, warnings = {}, [], []
    for spec, shape in CASES:
        if only not in spec:
            continue
        case = Case(spec, shape, n, rng)
        size = sum(packet.size for packet in case.packets) // PEERS
        figures[case.label] = {"bytes": size}
        for what, action in case.actions().items():
            turns = {"memcpy": lambda: np.copyto(target, source),
                     what: lambda action=action: action() and None}
            in_turn(turns, 2)
            seconds = in_turn(turns, rounds)
            ratio, time = ratios(seconds["memcpy"], seconds[what]), summary(seconds[what])
            figures[case.label][what] = {"seconds": time, "ratio_to_memcpy": ratio}
            warnings.append(noise_warning(seconds))
            rows.append((case.label, what, f"{size:,}", f"{1e3 * time['median']:.2f}",
                         f"{1e3 * time['low']:.2f} .. {1e3 * time['high']:.2f}",
                         f"{4e-9 * n / time['median']:.1f}", f"{ratio['median']:.2f}",
                         f"{ratio['low']:.2f} .. {ratio['high']:.2f}"))
    print(f"{n:,} elements, backend {name}; ratio = memcpy / case, in turn")
    print(table(("", "", "bytes", "ms", "quartiles", "GB/s", "ratio", "quartiles"), rows))
    if any(warnings):
        print(next(filter(None, warnings)))
    return {"elements": n, "backend": name, "rounds": rounds, "cases": figures}
