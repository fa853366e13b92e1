#!/usr/bin/env python3
"""Train one of a few small networks on several MPI ranks, with compressed gradients.

    launch/run -n 4 launch/train.py --data mnist5k --method onebit
    launch/run -n 4 launch/train.py --data fsdd --method strom:tau=0.01 --out runs/fsdd
    launch/run -n 4 launch/train.py --data fsdd --method strom:tau=0.01 --out runs/fsdd --resume
    launch/run -n 4 launch/train.py --model dorefa --bits 1,2,6 --method dorefa:bits=6
    python launch/train.py --data mnist5k                      alone, without mpirun: one rank

SIGTERM and SIGUSR1 to any rank make all of them save after the same step and end with status 75.
With launch/run --with-ft and --survive the others go on where a rank has died.

Read it from top to bottom: options, data, model, the three lines that make training distributed,
where it goes on from, the loop, the result. All that it writes lies in the folder --out:

    config.json     what was run              metrics.jsonl   a row per log line and evaluation
    result.json     how it ended              checkpoint/     the last two, for --resume
"""
from __future__ import annotations

import collections
import hashlib
import json
import math
import os
import re
import shutil
import signal
import statistics
import sys
import time
from pathlib import Path

import data as datasets  # this and other modules are beside this file, in launch/
import models
import numpy as np
import options
import torch
from journal import Journal
from recipes import DOREFA, RECIPES
from scores import count, evaluate, phoneme_error_rate, rows_of
from torch.nn import functional

import mpicomp.mpi
import mpicomp.nn
from mpicomp import checkpoint

device, no_device = options.take_device(sys.argv)  # before MPI starts

try:
    MPI = mpicomp.mpi.load()
except mpicomp.LaunchError as problem:
    print(f"train.py: {problem}", file=sys.stderr)
    sys.exit(2)
comm = MPI.COMM_WORLD.Dup()     # ours alone: the reducer makes its own, and the two never mix
rank, ranks = comm.rank, comm.size


def say(text):
    """Rank 0 speaks for all."""
    if rank == 0:
        print(text, flush=True)


def refuse(problem):
    """One line and exit status 2; only where all ranks come here together."""
    if rank == 0:
        print(f"train.py: {problem}", file=sys.stderr, flush=True)
    MPI.Finalize()
    sys.exit(2)


def agreed(work):
    """work() on every rank; if it fails on any, all of them leave with what the first one found."""
    result = problem = None
    try:
        result = work()
    except mpicomp.StallError:  # the others are not here to be told
        raise
    except (datasets.DataError, mpicomp.MpicompError, OSError) as found:
        problem = " ".join(str(found).split())
    problems = comm.allgather(problem)
    for r, problem in enumerate(problems):
        if problem:
            refuse(problem if len(set(problems)) == 1 else f"rank {r}: {problem}")
    return result


# ---------------------------------------------------------------- options

args = options.parse(__doc__, refuse, rank)
if no_device:
    refuse(no_device)
method = agreed(lambda: mpicomp.method(args.method))
data = agreed(lambda: datasets.load(args.data))

# Blocks of 40: a whole number of them in each class of mnist5k, two utterances of fsdd.
held = np.arange(len(data.train)) // 40 % 10 == 9
kept = np.flatnonzero(~held) if args.validate else np.arange(len(data.train))
scored = (data.train, np.flatnonzero(held)) if args.validate else (
    data.test, np.arange(len(data.test)))

recipe = RECIPES[args.data]
if args.model == "dorefa" and recipe["model"] == "cnn":
    recipe = recipe | DOREFA
if args.model not in (None, recipe["model"]):
    refuse(f"--model {args.model} does not fit --data {args.data}; leave it out")
if args.bits and "bits" not in recipe:
    refuse(f"--bits is for --model dorefa, found --model {recipe['model']}")
chosen = {key: getattr(args, key, None) for key in recipe}
recipe = recipe | {key: value for key, value in chosen.items() if value is not None}
batch = recipe["batch"]
if not ranks <= batch <= len(kept):
    refuse(f"--batch {batch}: expected {ranks} (an example for each rank) to {len(kept)}")
epoch_steps = len(kept) // batch
if args.epochs:
    recipe["steps"] = args.epochs * epoch_steps
steps = recipe["steps"]
save_every = min(epoch_steps, 200) if args.save_every is None else args.save_every or steps
out = args.out or Path("runs", re.sub(r"[^\w.=]+", "-", "-".join(
    filter(None, (args.data, args.model, args.method)))))

# All that decides the result to the bit, besides the number of ranks and torch itself.
config = dict(data=args.data, source=data.source[:16], method=repr(method), **recipe,
              momentum=args.momentum, seed=args.seed, nonfinite=args.nonfinite,
              local_adagrad=args.local_adagrad, flush_epochs=args.flush_epochs,
              validate=args.validate)
digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]


# ---------------------------------------------------------------- model

# Torch takes every core it sees. Ranks on one machine must share them, or they only push each
# other off. (launch/run has seen to it; this is for a plain mpirun or srun.)
if "OMP_NUM_THREADS" not in os.environ:
    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    cores = set().union(*node.allgather(os.sched_getaffinity(0)))
    torch.set_num_threads(max(1, len(cores) // node.size))

torch.manual_seed(args.seed)    # the same on every rank: replicas start equal
noise = torch.Generator(device)  # of the gradients inside a dorefa network, anew in each step
model = agreed(lambda: models.MODELS[config["model"]](
    data.classes, *([config["bits"], noise] if "bits" in config else [])).to(device))
if config["optimizer"] == "adam":
    optimizer = torch.optim.Adam(model.parameters(), lr=config["lr"])
elif config["optimizer"] == "adagrad":
    optimizer = torch.optim.Adagrad(model.parameters(), lr=config["lr"], eps=1e-8)
else:
    optimizer = torch.optim.SGD(model.parameters(), lr=config["lr"], momentum=args.momentum)

# Table 3 of the 1-bit SGD paper compares places for AdaGrad: before the exchange (here), between
# its two quantisations (--method onebit:exchange=sharded,adagrad=yes), after it (--optimizer).
squares = {}


def local_adagrad(name):
    """A hook that divides a gradient by the root of the sum of its squares so far."""
    def divide(gradient):
        squares[name] = squares.get(name, 0) + gradient**2
        return gradient / (squares[name].sqrt() + 1e-8)
    return divide


if args.local_adagrad:
    for name, parameter in model.named_parameters():
        parameter.register_hook(local_adagrad(name))

# Here it becomes distributed: from now on step() first makes every p.grad the mean over all
# ranks, and then does what it always did.
optimizer = agreed(lambda: mpicomp.DistributedOptimizer(
    optimizer, model.named_parameters(), method=method, seed=args.seed, nonfinite=args.nonfinite,
    require_ratio=args.require_ratio, stall_timeout=args.stall_timeout))
mpicomp.broadcast_parameters(model)
reducer = optimizer.reducer


# ---------------------------------------------------------------- where it goes on from

finished, found, folders = comm.bcast(agreed(lambda: None if rank else (
    (out / "result.json").exists(), checkpoint.newest(out / "checkpoint"),
    checkpoint.folders(out / "checkpoint"))))
if found and not finished and not args.resume:
    refuse(f"{out} holds an unfinished run; add --resume to go on with it, or delete the folder")
if folders and not found and (args.resume or not finished):
    refuse(f"{out / 'checkpoint'} holds {len(folders)} checkpoint(s), all of them damaged; to "
           "start over, move that folder away or choose another --out")


def divided(everyone, mine):
    """This rank's part of what another number of ranks knew.

    The reducer takes the mean over ranks, and slices of the batch are scaled to suit, so it is the
    mean of the residuals that says what the parameters will still get.
    """
    holders = [r for r, keys in enumerate(comm.allgather(len(reducer.state_dict()))) if keys > 1]
    states = checkpoint.repartition([other["reducer"] for other in everyone], ranks,
                                    keep="mean", holders=holders or range(ranks))
    added = {key: sum(other["tally"][key] for other in everyone) * (rank == 0)
             for key in ("loss", "targets")}
    owed = {key: sum(other["squares"][key] for other in everyone) / len(everyone)
            for key in mine["squares"]}
    return mine | dict(reducer=states[rank], tally=mine["tally"] | added, squares=owed)


start, seconds = 0, 0.0
earlier = dict(sent=0, dense=0, reasons={})                         # bytes before a resumption
tally = dict(loss=0.0, targets=0, steps=0, seconds=0.0, sent=0)     # since the last log line
if found and args.resume:
    path, manifest = found
    if problem := checkpoint.objection(manifest, config):
        refuse(f"{path}: {problem}, or choose another --out")
    shared, mine = agreed(lambda: checkpoint.load(path, rank % manifest["ranks"]))
    if manifest["ranks"] != ranks:
        say(f"written by {manifest['ranks']} ranks, now {ranks}: what they owe is shared out anew "
            "and nothing of it is lost, but the run is not bit-identical to an undisturbed one")
        mine = agreed(lambda: divided(checkpoint.each_rank(path), mine))
    model.load_state_dict(shared["model"])
    optimizer.load_state_dict(shared["optimizer"])
    reducer.load_state_dict(mine["reducer"])
    torch.set_rng_state(mine["rng"])
    start, seconds = shared["step"], shared["seconds"]
    earlier, tally = mine["bytes"], mine["tally"]
    squares.update({name: value.to(device) for name, value in mine["squares"].items()})
    if manifest["threads"] != torch.get_num_threads():
        say(f"it had {manifest['threads']} threads a rank, now {torch.get_num_threads()}: "
            "the last bits will differ")


def take_over():
    """Rank 0 makes --out ours."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "result.json").unlink(missing_ok=True)
    if not start:
        shutil.rmtree(out / "checkpoint", ignore_errors=True)
    journal.open(start)
    (out / "config.json").write_text(json.dumps({**config, "ranks": ranks, "digest": digest}))


journal = Journal(out, ranks == 1)
agreed(lambda: take_over() if rank == 0 else None)


# ---------------------------------------------------------------- what it says on the way

def bytes_so_far():
    """What this rank handed to MPI since step 0, and what dense fp32 would have handed over."""
    reasons = collections.Counter(earlier.get("reasons", {}))
    reasons.update(reducer.stats.reasons)
    return dict(sent=earlier["sent"] + reducer.stats.sent,
                dense=earlier["dense"] + reducer.stats.dense, reasons=dict(reasons))


def record(kind, step, **values):
    """A row of metrics.jsonl."""
    counted = bytes_so_far()
    row = dict(kind=kind, step=step + 1, epoch=(step + 1) / epoch_steps, seconds=seconds,
               bytes_sent=counted["sent"], ratio=counted["dense"] / max(1, counted["sent"]),
               bytes_by_reason=counted["reasons"], **values)
    journal.write(row)
    return row


def log(step, parts):
    """Mean loss since the last line over all ranks, exactly: float64, added in rank order."""
    loss, targets, sent = (sum(column) for column in zip(*parts, strict=True))
    layers = {"layers": reducer.named()} if args.log_layers else {}
    row = record("train", step, loss=loss / targets, learning_rate=learning_rate(step),
                 bytes_all=sent, **layers,
                 bytes_per_step=tally["sent"] / tally["steps"],
                 examples_per_second=batch * tally["steps"] / tally["seconds"])
    journal.numbers(f"step {row['step']:5}/{steps}  epoch {row['epoch']:5.2f}",
                    f"loss {row['loss']:.4f}  {row['examples_per_second']:,.0f} examples/s  "
                    f"{row['bytes_per_step']:,.0f} bytes/step  ratio {row['ratio']:.1f}")


def within_ratio(work):
    """work(); where --require-ratio is not kept, all ranks learn it in the same step and leave."""
    try:
        work()
    except mpicomp.RatioError as problem:
        refuse(problem)


def settle():
    """With an asynchronous method: apply all that is under way, and have equal replicas."""
    reducer.deliver()
    if method.exchange == "peers":
        # Replicas have added the same packets in another order, and with momentum or Adam in
        # other steps. What is evaluated and saved is rank 0's, and from there all go on.
        size = 4 * sum(value.numel() for value in model.state_dict().values())
        reducer.stats.count("Bcast", 0 if rank else size, size if rank else 0)
        mpicomp.broadcast_parameters(model, comm)


# A rank that waits in a collective of ours must serve its shard all the same. Where no thread does
# that, there must be nothing under way.
unattended = method.unattended


# ---------------------------------------------------------------- the loop

def learning_rate(step):
    """Up over the first twentieth, then half a cosine down to zero: one schedule for everything.

    It suits error feedback: what is still owed when training ends would have moved little.
    """
    rise = min(1.0, (step + 1) / (steps / 20 + 1))
    return config["lr"] * rise * 0.5 * (1 + math.cos(math.pi * step / steps))


if rank == 0:
    parameters = sum(p.numel() for p in model.parameters())
    say("  ".join(f"{key}={value}" for key, value in config.items()))
    say(f"{parameters:,} parameters  {len(kept)} + {len(scored[1])} examples  "
        f"{ranks} ranks x {torch.get_num_threads()} threads  out={out}"
        + (f"  from step {start}" if start else ""))

# Asynchronous ranks must not meet in every step: there a signal is heard at the next checkpoint.
together = method.exchange not in ("peers", "server")
signals = checkpoint.Signals(comm)
what = "validation" if args.validate else "test"


def regrouped(recovery):
    """A rank has died: those that are left divide the data anew, the first of them speaks."""
    global comm, rank, ranks
    comm, rank, ranks = recovery.comm, recovery.rank, recovery.size
    recovery.track(signals.move(comm))
    if rank == 0 and journal.metrics is None:
        journal.open(reducer.step)


recovery = None
if args.survive:
    recovery = mpicomp.Recovery(reducer, model, comm, regrouped=regrouped, least=args.survive,
                                keep=lambda: dict(squares),
                                restore=lambda kept: (squares.clear(), squares.update(kept)))
    comm = recovery.comm
    recovery.track(signals.comm)


def piece(work, *arguments):
    """work(...); with --survive it is done again by those that are left where a rank dies."""
    return recovery.run(work, *arguments) if recovery else work(*arguments)


def train(step):
    """One step. (this rank's loss, its targets, the signal that any rank has heard or 0)."""
    if together:
        signals.post()
    x, y = rows_of(data.train, kept[
        datasets.my_rows(len(kept), batch, args.seed, step, rank, ranks)])
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step)
    if "bits" in config:
        mpicomp.nn.reseed(noise, args.seed, rank, step)
    optimizer.zero_grad()
    loss = functional.cross_entropy(model(x).flatten(0, -2), y.flatten(), reduction="sum",
                                    ignore_index=datasets.PADDING)
    # Slices of a batch can differ by one example. With this scale the mean over ranks, which is
    # what the reducer takes, is exactly the mean over the global batch (padding counts as 0).
    (loss * (ranks / (batch * y[0].numel()))).backward()
    heard = signals.agreed() if together else 0
    within_ratio(optimizer.step)
    return loss.item(), count(y), heard


def asked():
    """The signal that any rank has heard, where they meet at checkpoints only."""
    settle()
    signals.post()
    return signals.agreed()


def save(step):
    """A checkpoint after this step."""
    checkpoint.save(
        out / "checkpoint", comm, step + 1,
        shared=dict(step=step + 1, seconds=seconds, model=model.state_dict(),
                    optimizer=optimizer.state_dict()),
        mine=dict(reducer=reducer.state_dict(), rng=torch.get_rng_state(),
                  bytes=bytes_so_far(), tally=tally, squares=squares),
        about=dict(config=config, digest=digest, threads=torch.get_num_threads()))


journal.show(start, steps)
times, scores = [], None
for step in range(start, steps):
    began = time.perf_counter()
    loss, targets, heard = piece(train, step)
    times.append(time.perf_counter() - began)
    seconds += times[-1]
    for key, value in dict(loss=loss, targets=targets, steps=1, seconds=times[-1],
                           sent=reducer.stats.last["sent"]).items():
        tally[key] += value
    journal.advance()
    if args.flush_epochs and (step + 1) % epoch_steps == 0:
        settle()
        reducer.flush()
        optimizer.step()
    last = step + 1 == steps
    logs = (step + 1) % args.log_every == 0 or last
    evaluates = (step + 1) % epoch_steps == 0 or last
    stopped_by = heard * (not last)
    saves = stopped_by or (step + 1) % save_every == 0 or last
    if evaluates or saves or logs and unattended:
        piece(settle)
    if saves and not together:
        stopped_by = piece(asked) * (not last)
    if logs:
        parts = piece(lambda: comm.allgather((tally["loss"], tally["targets"],
                                              bytes_so_far()["sent"])))
        if rank == 0:
            log(step, parts)
        tally = dict.fromkeys(tally, 0)
    if evaluates:
        scores = piece(lambda: evaluate(model, *scored, comm))
        if rank == 0:
            record("eval", step, loss=scores[0], accuracy=scores[1])
            journal.say(f"step {step + 1:5}/{steps}  {what} accuracy {scores[1]:.2%}  "
                        f"{what} loss {scores[0]:.4f}")
    if saves:
        piece(save, step)
    if stopped_by:
        say(f"{signal.Signals(stopped_by).name}: saved after step {step + 1}, ending with status "
            f"{checkpoint.RESUME}; --resume goes on from there")
        journal.close()
        if recovery:
            recovery.leave(checkpoint.RESUME)
        MPI.Finalize()
        sys.exit(checkpoint.RESUME)
signals.close()


# ---------------------------------------------------------------- the result

within_ratio(reducer.check_ratio)

loss, accuracy = scores or piece(lambda: evaluate(model, *scored, comm))
errors = piece(lambda: phoneme_error_rate(model, *scored, comm))
weights = hashlib.sha256()
for name, value in model.state_dict().items():
    weights.update(name.encode() + value.cpu().numpy().tobytes())
replicas = piece(lambda: comm.allgather(weights.hexdigest()))
if len(set(replicas)) > 1:
    raise RuntimeError(f"rank {rank}: the replicas differ, which must never happen: {replicas}")
if rank == 0:
    journal.close()
    counted = bytes_so_far()
    result = dict(accuracy=accuracy, loss=loss, **errors, bytes_per_step=counted["sent"] / steps,
                  ratio=counted["dense"] / max(1, counted["sent"]), steps=steps, ranks=ranks,
                  bytes_by_reason=counted["reasons"],
                  seconds_per_step=statistics.median(times or [seconds / steps]), seconds=seconds,
                  parameters_sha256=replicas[0], skipped=reducer.stats.skipped, digest=digest,
                  **(dict(lost=recovery.lost) if recovery else {}),
                  config=config, torch=torch.__version__,
                  shapes={name: list(p.shape) for name, p in model.named_parameters()})
    checkpoint.write(out / "result.json.part", json.dumps(result, indent=1).encode())
    (out / "result.json.part").replace(out / "result.json")
    say(f"{what} accuracy {accuracy:.2%}  {what} loss {loss:.4f}  "
        + "".join(f"{name} {value:.2%}  " for name, value in errors.items()) +
        f"{result['bytes_per_step']:,.0f} bytes/step  ratio {result['ratio']:.1f}  "
        f"{1000 * result['seconds_per_step']:.1f} ms/step\nparameters {replicas[0]}")
if recovery:
    recovery.leave()
