"""`mpicomp bench allreduce`: the mean of N floats over the ranks present, compressed and by MPI."""

import numpy as np

from mpicomp import catalogue, mpi
from mpicomp.bench.timing import in_turn, noise_warning, ratios, summary, table
from mpicomp.layout import Layout
from mpicomp.transport.calls import Wire
from mpicomp.transport.meter import Meter
from mpicomp.transport.pipeline import Pipeline


class Mean:
    """One gradient of [rows, n / rows] elements, exchanged again and again by one method."""

    def __init__(self, spec, n, comm, rows=1024):
        self.method = catalogue.method(spec)
        self.meter = Meter()
        wire = Wire(comm, self.meter)
        self.pipeline = Pipeline(comm, 600.0)
        rows = min(rows, n)
        layout = Layout.of([("gradient", (rows, n // rows))])
        rng = np.random.default_rng(comm.rank)
        self.fresh = rng.standard_normal(layout.size, np.float32)
        self.grad = self.fresh.copy()
        self.exchange = self.method.open(wire)
        self.mail = self.exchange.open(self.method.compressor, layout, 0, self.grad, 0, 0)
        self.step, self.weight = 0, 1.0 / comm.size

    def __call__(self):
        self.grad[...] = self.fresh
        self.pipeline.launch("bench", self.exchange.run(self.mail, self.step, 0))
        self.pipeline.drain()
        self.exchange.decode(self.mail, self.step, self.weight)
        self.mail.commit()
        self.step += 1
        self.meter.step(4 * self.grad.size)


class MpiAllreduce:
    """What MPI itself takes: `Allreduce` in one call, or Iallreduce with Test and sleep."""

    def __init__(self, n, comm, blocking):
        self.comm, self.blocking = comm, blocking
        self.send = np.random.default_rng(comm.rank).standard_normal(n, np.float32)
        self.receive = np.empty_like(self.send)

    def __call__(self):
        if self.blocking:
            self.comm.Allreduce(self.send, self.receive)
        else:
            request = self.comm.Iallreduce(self.send, self.receive)
            mpi.wait(self.comm, request, 600.0, "timing Iallreduce")


def run(methods, sizes, rounds) -> dict:
    """{"sizes": {n: {contender: {...}}}}; prints a table for each size on rank 0."""
    comm = mpi.communicator()
    result = {"ranks": comm.size, "sizes": {}}
    for n in sizes:
        contenders = {"MPI Allreduce": MpiAllreduce(n, comm, True),
                      "MPI Iallreduce + Test": MpiAllreduce(n, comm, False)}
        contenders |= {spec: Mean(spec, n, comm) for spec in methods}
        in_turn(contenders, 3, comm)
        seconds = in_turn(contenders, rounds, comm)
        best = min(list(contenders)[:2], key=lambda name: summary(seconds[name])["median"])
        rows, figures = [], {}
        for name, values in seconds.items():
            gain = ratios(seconds[best], values)
            work = contenders[name]
            sent = work.meter.last["sent"] if isinstance(work, Mean) else 4 * n
            figures[name] = {"seconds": summary(values), "gain": gain, "bytes": sent}
            rows.append((name, f"{1e3 * figures[name]['seconds']['median']:.2f}",
                         f"{1e3 * figures[name]['seconds']['low']:.2f} .. "
                         f"{1e3 * figures[name]['seconds']['high']:.2f}",
                         f"{gain['median']:.2f}x", f"{sent:,}"))
        result["sizes"][n] = figures
        if comm.rank == 0:
            print(f"\n{n:,} floats over {comm.size} ranks; gain over {best}")
            print(table(("", "ms", "quartiles", "gain", "bytes sent"), rows), flush=True)
            if warning := noise_warning(seconds):
                print(warning, flush=True)
    return result
