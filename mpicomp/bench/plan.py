"""`mpicomp plan`: what each method would take here, for how many ranks, and what to use."""

from mpicomp import catalogue, mpi
from mpicomp.advice import advise, predict
from mpicomp.bench.timing import table


def run(gradient, hidden, candidates, ranks) -> dict:
    """Print links, codecs and predictions on rank 0; returns the figures.

    gradient: the number of its elements, or the path of a file of numpy.save or numpy.savez.
    """
    comm = mpi.communicator()
    n, file = (None, gradient) if isinstance(gradient, str) else (gradient, None)
    advice = advise(comm, n, candidates, hidden, gradient=file)
    n = advice.elements
    alone = comm.size == 1  # no link: nothing can be told of other numbers of ranks
    counts = [] if alone else sorted({*ranks, comm.size} - {1})
    rows = []
    for p in advice.predictions:
        method, codec = catalogue.method(p.method), advice.codecs[p.method]
        others = [predict(method, codec, advice.links, n, c, hidden, advice.copy).total
                  for c in counts]
        rows.append((_short(p.method), f"{1e3 * p.encode:.1f}", f"{1e3 * p.wire:.1f}",
                     f"{1e3 * p.decode:.1f}", f"{32 / (8 * codec.bytes):.1f}",
                     *(f"{1e3 * t:.1f}" for t in others)))
    if comm.rank == 0:
        for kind, link in {} if alone else advice.links.items():
            rate = 8e-9 / link.per_byte if link.per_byte else float("inf")
            print(f"{kind}: {1e6 * link.latency:.0f} us a call, {rate:.2f} Gbit/s received a rank")
        here = "1 rank" if alone else f"{comm.size} ranks"
        print(f"\n{n:,} elements, {here} here, {1e3 * hidden:.0f} ms hidden by backward")
        print(f"tried on {advice.sample}")
        print(table(("", "encode ms", "wire ms", "decode ms", "ratio",
                     *(f"P={c} ms" for c in counts)), rows))
        print(f"\nuse {_short(advice.choice)}: {advice.reason}", flush=True)
        for note in advice.notes:
            print(f"note: {note}", flush=True)
        if alone:
            print("For more ranks links must be measured: start it with  "
                  "launch/run -n 2 -m mpicomp plan  or with more ranks", flush=True)
    return {"elements": n, "sample": advice.sample, "notes": list(advice.notes),
            "ranks": comm.size, "hidden": hidden, "choice": advice.choice, "reason": advice.reason,
            "links": {k: vars(v) for k, v in advice.links.items()},
            "codecs": {k: vars(v) for k, v in advice.codecs.items()},
            "predictions": [{**vars(p), "total": p.total} for p in advice.predictions]}


def _short(spec):
    """A specification without the options that have their defaults."""
    method = catalogue.method(spec)
    if repr(catalogue.method(method.name)) == spec:
        return method.name
    if repr(catalogue.method(f"{method.name}:exchange={method.exchange}")) == spec:
        return f"{method.name}:exchange={method.exchange}"
    return spec
