"""`mpicomp bench step`: seconds per training step, against DistributedDataParallel on gloo.

Contenders, in turn: the step without communication (the floor); DDP on gloo without a hook, with
the fp16 hook, with PowerSGD; and mpicomp's methods, split into stages. All train the same network
on the same batches with SGD and momentum.

The stages add up to the step: forward, backward (without the stages that run inside it), encode,
post (MPI calls and polling), wait (for what backward did not hide), decode, optimizer. DDP's
communication is part of its backward. `wire` is reported separately: the seconds during which a
call was open. With a progress thread encode runs beside backward, and the sum exceeds the step.
"""

import gc
import os
import socket
from collections import Counter
from time import perf_counter

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy

import mpicomp
from mpicomp import mpi
from mpicomp.bench.models import MODELS
from mpicomp.bench.timing import in_turn, noise_warning, quiet_barrier, ratios, summary, table

FLOOR, DENSE = "no communication", "ddp gloo"
PEERS = (DENSE, "ddp gloo fp16", "ddp gloo powersgd")
INNER = ("encode", "post", "wait", "decode")  # what the Reducer books
STAGES = ("forward", "backward", *INNER, "optimizer")  # a step, in its order


class Contender:
    """Builds a model, trains it for a few steps and forgets it, each time it is called."""

    def __init__(self, name, model, steps, comm, progress="auto"):
        self.name, self.model, self.steps, self.comm = name, model, steps, comm
        self.progress = progress
        self.rounds, self.ratio, self.sent = [], None, None

    @property
    def stages(self):
        """{stage: seconds per step, the median over rounds}, on this rank."""
        names = self.rounds[0] if self.rounds else ()
        return {name: summary([r[name] for r in self.rounds])["median"] for name in names}

    def __call__(self):
        """Median seconds of a step on this rank, after two steps to warm up."""
        gc.collect()  # models and Reducers hold on to each other
        torch.manual_seed(0)
        model, x, y = MODELS[self.model]()
        sgd = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        net, optimizer, reducer = distribute(self.name, model, sgd, self.progress)
        pipeline = reducer and reducer.averager.link.pipeline
        times, split = [], Counter()

        def booked():
            """The seconds that the Reducer has booked, by stage."""
            return Counter({s: reducer.stats.seconds[s] for s in INNER} |
                           {"wire": pipeline.under_way} if reducer else {})

        for step in range(2 + self.steps):
            if step == 2:
                split.clear()
            quiet_barrier(self.comm)
            marks = [(perf_counter(), booked())]
            optimizer.zero_grad()
            loss = cross_entropy(net(x), y)
            marks.append((perf_counter(), booked()))
            loss.backward()
            marks.append((perf_counter(), booked()))
            optimizer.step()
            marks.append((perf_counter(), booked()))
            times.append(marks[3][0] - marks[0][0])
            _split(split, marks, threaded=reducer and pipeline.progress == "thread")
        self.rounds.append({name: split[name] / self.steps
                            for name in (*STAGES, "wire") if reducer or name not in
                            (*INNER, "wire")})
        if reducer:
            self.ratio, self.sent = reducer.stats.ratio, reducer.stats.last["sent"]
            reducer.deliver()
            reducer.close()
        return summary(times[2:])["median"]


def distribute(name, model, optimizer, progress="auto"):
    """Make `model` parallel; returns (the model to call, optimizer, Reducer or None).

    name: FLOOR (not parallel), one of PEERS, or a method of this package.
    """
    if name == FLOOR:
        return model, optimizer, None
    if name not in PEERS:
        optimizer = mpicomp.DistributedOptimizer(optimizer, model.named_parameters(), name,
                                                 progress=progress)
        return model, optimizer, optimizer.reducer
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

    # PowerSGD on gloo wants one bucket only
    bucket = 4000 if name.endswith("powersgd") else 25
    net = torch.nn.parallel.DistributedDataParallel(model, bucket_cap_mb=bucket)
    if name.endswith("fp16"):
        net.register_comm_hook(None, default_hooks.fp16_compress_hook)
    elif name.endswith("powersgd"):
        state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=1,
                                            start_powerSGD_iter=2)
        net.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    return net, optimizer, None


def _split(split, marks, threaded):
    """Add one step's seconds by stage; `marks` has clock and booked seconds between stages."""
    for name, (start, before), (end, after) in zip(("forward", "backward", "optimizer"), marks,
                                                   marks[1:]):
        inside = 0.0
        for stage in after:
            seconds = after[stage] - before[stage]
            split[stage] += seconds
            # what a thread does beside backward takes nothing from it
            inside += seconds if stage in INNER and not (threaded and name != "optimizer") else 0.0
        split[name] += end - start - inside


def join_gloo(comm):
    """Make torch's process group of these ranks, at MASTER_ADDR or else rank 0's address."""
    address = os.environ.get("MASTER_ADDR", "127.0.0.1")
    with socket.socket() as free:
        free.bind(("", 0))
        port = comm.bcast(free.getsockname()[1])
    dist.init_process_group("gloo", init_method=f"tcp://{comm.bcast(address)}:{port}",
                            rank=comm.rank, world_size=comm.size)


def run(model, methods, rounds, steps, peers=True, progress=("auto",)) -> dict:
    """Print a table on rank 0; returns {"contenders": {name: {...}}}.

    Each method runs with each value in `progress` (the Reducer's option); if there are several, the
    names show it.
    """
    comm = mpi.communicator()
    if peers:
        join_gloo(comm)
    contenders = {name: Contender(name, model, steps, comm)
                  for name in (FLOOR, *(PEERS if peers else ()))}
    contenders |= {f"{method} ({way})" if len(progress) > 1 else method:
                   Contender(method, model, steps, comm, way)
                   for method in methods for way in progress}
    seconds = in_turn(contenders, rounds, comm)
    if peers:
        dist.destroy_process_group()
    dense = [n for n, c in contenders.items() if n == DENSE or c.name.split(":")[0] == "dense"]
    base = dense[0] if dense else FLOOR
    dense = dense or [base]
    best = min(dense, key=lambda name: summary(seconds[name])["median"])
    figures, rows = {}, []
    for name, values in seconds.items():
        c, gain = contenders[name], ratios(seconds[base], values)
        cap, over_best = ratios(seconds[FLOOR], values), ratios(seconds[best], values)
        figures[name] = {"seconds": summary(values), "gain": gain, "of_cap": cap,
                         "over_best_dense": over_best,
                         "stages": c.stages, "ratio": c.ratio, "bytes": c.sent}
        s = figures[name]["seconds"]
        rows.append((name, f"{s['median']:.3f}", f"{s['low']:.3f} .. {s['high']:.3f}",
                     f"{gain['median']:.2f}x", f"{over_best['median']:.2f}x",
                     f"{cap['median']:.2f}", *(f"{1e3 * c.stages[k]:.0f}" if k in c.stages else ""
                                               for k in (*STAGES, "wire")),
                     f"{c.ratio:.1f}" if c.ratio else ""))
    if comm.rank == 0:
        print(f"\n{model}, {comm.size} ranks, seconds per step; gain over {base}; over dense: over "
              f"{best}, the fastest dense; of cap = seconds with no communication / seconds; then "
              "ms by stage")
        print(table(("", "s", "quartiles", "gain", "over dense", "of cap", *STAGES, "wire",
                     "ratio"), rows), flush=True)
        if warning := noise_warning(seconds):
            print(warning, flush=True)
    return {"model": model, "ranks": comm.size, "base": base, "best_dense": best,
            "links": os.environ.get("MPICOMP_LINKS"), "contenders": figures}
