"""`mpicomp bench step`: seconds per training step, against DistributedDataParallel on gloo.

Contenders, in turn: the step with no communication at all (the floor); DDP on gloo without a hook,
with the fp16 hook, with PowerSGD; and mpicomp's methods, split into stages. All train the same
network on the same batches with SGD and momentum.
"""

import os
import socket
from time import perf_counter

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy

import mpicomp
from mpicomp import mpi
from mpicomp.bench.models import MODELS
from mpicomp.bench.timing import (in_turn, noise_warning, quiet_barrier, ratios, summary, table)

FLOOR, DENSE = "no communication", "ddp gloo"
PEERS = (DENSE, "ddp gloo fp16", "ddp gloo powersgd")
STAGES = ("encode", "post", "wait", "decode")


class Contender:
    """Builds a model, trains it for a few steps and forgets it, each time it is called."""

    def __init__(self, name, model, steps, comm):
        self.name, self.model, self.steps, self.comm = name, model, steps, comm
        self.stages, self.ratio, self.sent = {}, None, None

    def __call__(self):
        """Median seconds of a step on this rank, after two steps to warm up."""
        torch.manual_seed(0)
        model, x, y = MODELS[self.model]()
        net, optimizer, reducer = self._distribute(model)
        times = []
        for step in range(2 + self.steps):
            if step == 2:
                before = dict(reducer.stats.seconds) if reducer else {}
            quiet_barrier(self.comm)
            start = perf_counter()
            optimizer.zero_grad()
            cross_entropy(net(x), y).backward()
            optimizer.step()
            times.append(perf_counter() - start)
        if reducer:
            self.stages = {s: (reducer.stats.seconds[s] - before.get(s, 0)) / self.steps
                           for s in STAGES}
            self.ratio, self.sent = reducer.stats.ratio, reducer.stats.last["sent"]
            reducer.deliver()
            reducer.close()
        return summary(times[2:])["median"]

    def _distribute(self, model):
        """(what forward calls, optimizer, Reducer or None)."""
        def sgd():
            return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

        if self.name == FLOOR:
            return model, sgd(), None
        if self.name not in PEERS:
            optimizer = mpicomp.DistributedOptimizer(sgd(), model.named_parameters(), self.name)
            return model, optimizer, optimizer.reducer
        from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

        # PowerSGD on gloo wants one bucket only
        bucket = 4000 if self.name.endswith("powersgd") else 25
        net = torch.nn.parallel.DistributedDataParallel(model, bucket_cap_mb=bucket)
        if self.name.endswith("fp16"):
            net.register_comm_hook(None, default_hooks.fp16_compress_hook)
        elif self.name.endswith("powersgd"):
            state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=1,
                                                start_powerSGD_iter=2)
            net.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
        return net, sgd(), None


def join_gloo(comm):
    """Make torch's process group of these ranks; rank 0's address unless MASTER_ADDR says other."""
    address = os.environ.get("MASTER_ADDR", "127.0.0.1")
    with socket.socket() as free:
        free.bind(("", 0))
        port = comm.bcast(free.getsockname()[1])
    dist.init_process_group("gloo", init_method=f"tcp://{comm.bcast(address)}:{port}",
                            rank=comm.rank, world_size=comm.size)


def run(model, methods, rounds, steps, peers=True) -> dict:
    """{"contenders": {name: {...}}}; prints a table on rank 0."""
    comm = mpi.communicator()
    if peers:
        join_gloo(comm)
    names = [FLOOR, *(PEERS if peers else ()), *methods]
    contenders = {name: Contender(name, model, steps, comm) for name in names}
    seconds = in_turn(contenders, rounds, comm)
    if peers:
        dist.destroy_process_group()
    base = DENSE if peers else next((n for n in methods if n.startswith("dense")), FLOOR)
    figures, rows = {}, []
    for name, values in seconds.items():
        c, gain = contenders[name], ratios(seconds[base], values)
        cap = ratios(seconds[FLOOR], values)
        figures[name] = {"seconds": summary(values), "gain": gain, "of_cap": cap,
                         "stages": c.stages, "ratio": c.ratio, "bytes": c.sent}
        s = figures[name]["seconds"]
        rows.append((name, f"{s['median']:.3f}", f"{s['low']:.3f} .. {s['high']:.3f}",
                     f"{gain['median']:.2f}x", f"{cap['median']:.2f}",
                     *(f"{1e3 * c.stages[k]:.0f}" if c.stages else "" for k in STAGES),
                     f"{c.ratio:.1f}" if c.ratio else ""))
    if comm.rank == 0:
        print(f"\n{model}, {comm.size} ranks, seconds per step; gain over {base}; of cap = seconds "
              f"with no communication / seconds")
        print(table(("", "s", "quartiles", "gain", "of cap", *(f"{k} ms" for k in STAGES),
                     "ratio"), rows), flush=True)
        if warning := noise_warning(seconds):
            print(warning, flush=True)
    return {"model": model, "ranks": comm.size, "base": base, "contenders": figures}
