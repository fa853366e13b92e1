"""One rank of tests/chaos: small trainings in which one rank is killed, and what came of it.

    launch/run --with-ft -n 12 tests/chaos_rank.py FOLDER '{"ranks": 4, "trials": [...]}'

A trial is {"method": ..., "victim": 2, "phase": ..., "step": ..., "moment": ...}, or only a method:

victim, phase, step  who is killed, in what: "backward", "exchange", "step" or "checkpoint"
moment               when, as a fraction of what that phase took this rank the last time

It is made by the first `ranks` of those that are alive. The others sleep: whoever was left of the
trial before and one of them make the next, since to start a rank takes longer than a trial.

Each rank appends a line of JSON to FOLDER/TRIAL/rank-R.jsonl, R as numbered at its start, for each
start of a step (digests of its state) and for the end. At the end those that are left do it once
more: from the state in which the interrupted step was done again, with a new model, optimizer and
Reducer over as many ranks, and no Recovery. Both ways must end in the same bits.
"""

import copy
import json
import os
import signal
import sys
import threading
import time
from hashlib import blake2b
from pathlib import Path

import torch
from mpi4py import MPI

import mpicomp
from mpicomp import checkpoint
from mpicomp.exchange import hierarchical

torch.set_num_threads(1)
folder, plan = Path(sys.argv[1]), json.loads(sys.argv[2])
STEPS, REPORT, BATCH = 24, 4, 48
hierarchical.node_of = lambda comm: comm.Split(me // 2, me)  # two nodes of two ranks
me, here, log = None, folder, None  # of the present trial: number, folder, file
what, training, recovery, began = {}, None, None, {}


def tell(**line):
    """A line, in one piece, whatever happens next."""
    os.write(log, (json.dumps(line) + "\n").encode())


def digest(value):
    """16 hexadecimal digits of nested containers of tensors and numbers."""
    total = blake2b(digest_size=8)

    def add(part):
        if isinstance(part, torch.Tensor):
            total.update(part.detach().contiguous().numpy().tobytes())
        elif isinstance(part, dict):
            for key in sorted(part, key=str):
                total.update(str(key).encode())
                add(part[key])
        elif isinstance(part, (list, tuple)):
            for item in part:
                add(item)
        else:
            total.update(repr(part).encode())
    add(value)
    return total.hexdigest()


def owed(state):
    """What is owed by parameter, whichever stage it is in: other ranks have other shards."""
    total = {}
    for key, value in state.items():
        kind, _, name = key.partition("/")
        if kind in ("error", "error2"):
            total[name] = total.get(name, 0) + value
    return {name: value for name, value in total.items() if value.any()}  # a new leader has zeros


class Momentum:
    """What Reducer needs of an optimizer. (torch.optim takes a second to load, on every rank.)"""

    def __init__(self, parameters, lr, momentum):
        self.parameters, self.lr, self.momentum = list(parameters), lr, momentum
        self.moving = [torch.zeros_like(p) for p in self.parameters]
        self.before, self.after = [], []

    def register_step_pre_hook(self, hook):
        self.before.append(hook)

    def register_step_post_hook(self, hook):
        self.after.append(hook)

    def zero_grad(self):
        for p in self.parameters:
            p.grad = None

    def step(self):
        for hook in self.before:
            hook(self, (), {})
        self.update()
        for hook in self.after:
            hook(self, (), {})

    @torch.no_grad()
    def update(self):
        for p, moving in zip(self.parameters, self.moving):
            if p.grad is not None:
                moving.mul_(self.momentum).add_(p.grad)
                p.add_(moving, alpha=-self.lr)

    def state_dict(self):
        return {"moving": [m.clone() for m in self.moving]}

    def load_state_dict(self, state):
        for moving, value in zip(self.moving, state["moving"]):
            moving.copy_(value)


class Training:
    """A model with buffers and dropout, so that more than gradients must be taken back."""

    def __init__(self, comm):
        torch.manual_seed(1)
        self.comm = comm
        self.model = torch.nn.Sequential(
            torch.nn.Linear(20, 64), torch.nn.BatchNorm1d(64), torch.nn.ReLU(),
            torch.nn.Dropout(0.2), torch.nn.Linear(64, 64), torch.nn.ReLU(),
            torch.nn.Linear(64, 4))
        kind = torch.optim.SGD if "server" in what["method"] else Momentum
        self.optimizer = kind(self.model.parameters(), lr=0.02, momentum=0.9)
        self.reducer = mpicomp.Reducer(
            self.model.named_parameters(), what["method"], comm, bucket_bytes=6000, seed=5,
            stall_timeout=900).attach(self.optimizer)
        torch.manual_seed(100 + me)  # dropout differs from rank to rank

    def state(self):
        averager = self.reducer.averager
        settled = averager.link.exchange.settled and not averager.mode.late
        return dict(model=self.model.state_dict(), optimizer=self.optimizer.state_dict(),
                    random=torch.get_rng_state(),
                    reducer=self.reducer.state_dict() if settled else {})

    def load(self, state):
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.reducer.load_state_dict(state["reducer"])
        torch.set_rng_state(state["random"])

    def train(self, step):
        """This rank's part of the batch, by its number among those that are there."""
        data = torch.Generator().manual_seed(step)
        x = torch.randn(BATCH, 20, generator=data)
        y = x.view(BATCH, 4, 5).sum(2).argmax(1)
        mine = slice(self.comm.rank * BATCH // self.comm.size,
                     (self.comm.rank + 1) * BATCH // self.comm.size)
        self.optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(self.model(x[mine]), y[mine])
        loss.backward()
        self.optimizer.step()


def note(step):
    """What everything is at the start of a step, for comparison with an undisturbed run."""
    state = training.state()
    tell(step=step, left=training.comm.size, time=time.time(), reducer_step=training.reducer.step,
         own=digest([state["model"], state["optimizer"], state["random"], owed(state["reducer"])]))
    if began.get("left") != training.comm.size:  # after a loss: where the others begin again
        began.update(left=training.comm.size, step=step, state=copy.deepcopy(state))


# ---- the end of one of them

took = {"backward": 3e-3, "exchange": 3e-3, "step": 1e-3, "checkpoint": 2e-2}


def at(phase, work):
    """`work`, during which the victim is killed in its step, at its moment."""
    def wrapped(*args, **named):
        if me == what.get("victim") and (phase, training.reducer.step) == (what["phase"],
                                                                           what["step"]):
            threading.Thread(target=die, args=(took[phase] * what["moment"], here)).start()
        start = time.perf_counter()
        result = work(*args, **named)
        took[phase] = time.perf_counter() - start
        return result
    return wrapped


def die(wait, trial):
    time.sleep(wait)
    if trial == here and what:  # not in another one
        tell(killed=time.time())
        os.kill(os.getpid(), signal.SIGKILL)


finish = at("exchange", mpicomp.Reducer.finish)
mpicomp.Reducer.finish = lambda self: None if self.averager.current.finished else finish(self)
backward = at("backward", Training.train)
save = at("checkpoint", checkpoint.save)


# ---- one trial

def train(step):
    note(step)
    backward(training, step)


def report(step):
    """What a training does now and then: everybody's part of a score, and a checkpoint."""
    if training.reducer.averager.link.exchange.asynchronous:
        training.reducer.deliver()
    recovery.comm.allgather(step)
    save(here / "checkpoint", recovery.comm, step, shared=dict(step=step),
         mine=dict(reducer=training.reducer.state_dict()))


def regrouped(recovery):
    training.comm = recovery.comm


def trial(comm):
    """Train; say how it ended."""
    global training, recovery
    began.clear()
    training = Training(comm)
    name = "update" if isinstance(training.optimizer, Momentum) else "step"
    setattr(training.optimizer, name, at("step", getattr(training.optimizer, name)))
    recovery = mpicomp.Recovery(training.reducer, training.model, comm, regrouped=regrouped)
    training.comm = recovery.comm
    try:
        for step in range(STEPS):
            recovery.run(train, step)
            if (step + 1) % REPORT == 0:
                recovery.run(report, step)
        if training.reducer.irreplaceable is None:
            recovery.run(lambda: None)  # all that are left have come here
    except mpicomp.DeadRankError as error:
        tell(dead=str(error), time=time.time())
        if not plan.get("go_on"):
            raise
        training.reducer.close()
        return
    final = digest([p for p in training.model.parameters()])
    lost, repeated = recovery.lost, None
    if lost and lost[0]["step"] < STEPS:  # else the last step was over, and nothing was done again
        again = Training(recovery.comm)
        again.load(began["state"])
        for step in range(began["step"], STEPS):
            again.train(step)
        repeated = digest([p for p in again.model.parameters()])
    tell(final=final, repeated=repeated, lost=lost, sent=training.reducer.stats.sent)


(folder / f"up-{MPI.COMM_WORLD.rank}").touch()
while len(list(folder.glob("up-*"))) < MPI.COMM_WORLD.size:
    time.sleep(0.1)  # not in MPI, which takes the cores from those that still start
world = MPI.COMM_WORLD.Dup()
for number, chosen in enumerate(plan["trials"]):
    over = folder / f"over-{number}"
    active = world.Split(world.rank < plan["ranks"], world.rank)
    if world.rank < plan["ranks"]:
        me, here, what = active.rank, folder / str(number), chosen
        here.mkdir(exist_ok=True)
        log = os.open(here / f"rank-{me}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        trial(active)
        what = {}
        over.touch()
    while not over.exists():
        time.sleep(0.1)
    world = world.Shrink()
sys.stdout.flush()
sys.stderr.flush()
os._exit(0)  # as Recovery.leave does
