#!/usr/bin/env python3
"""The parts of jobs/gpu_check.sh: parity, bench, training and the report; it says which to run."""

import argparse
import json
import platform
import sys
from pathlib import Path
from time import perf_counter

import numpy as np

from mpicomp import kernels
from mpicomp.compressors.registry import from_spec
from mpicomp.kernels.gpu import device as gpu
from mpicomp.layout import Layout
from mpicomp.philox import Key

SIZES = (1, 2, 3, 31, 32, 33, 255, 257, 4095, 4096, 4097, 100_003, 1_000_001, 25_030_657, 10**8)
SPECS = ("dense", "fp16", "bf16", "strom:tau=1.0", "strom:tau=1.0,strict=no",
         "dropping:rate=0.99", "dropping:rate=0.9,sample=exact", "onebit", "terngrad",
         "terngrad:packing=planar,clip=0.0", "terngrad:packing=5trit", "terngrad:packing=int8",
         "dorefa", "dorefa:bits=3", "dorefa:bits=2,packing=int8", "dorefa:bits=8,packing=int16",
         "dryden", "dryden:proportion=4,min_rows=1", "adacomp", "adacomp:bin=50",
         "onebit:wire=cntk", "onebit:threshold=mean", "onebit:bits=4",
         "dropping:rate=0.99,survivors=onebit", "block", "block:bits=4", "block:form=fp8",
         "block:round=random", "sign", "sign:scope=row", "qsgd", "qsgd:norm=l2", "chunks",
         "chunks:bits=8", "chunks:bits=32", "randomk:density=0.1,scale=yes")
PEERS = 8
STEPS = ("dense", "onebit", "strom:tau=3.3")
# bytes that must move an element when encoding: the gradient, and with a residual its reading and
# writing; the packet is added by its size
BENCH = (("strom:tau=3.3", 12), ("dropping:rate=0.999", 12), ("onebit", 12), ("terngrad", 4),
         ("dorefa", 12), ("dryden", 12), ("adacomp:bin=512", 12))


def layouts(n):
    """A vector of n elements and, where it is long enough, a matrix and a bias of as many."""
    yield Layout.of([("vector", (n,))])
    rows = 512
    if n >= 4 * rows:
        columns = n // rows
        yield Layout.of([("matrix", (rows, columns)), ("bias", (n - rows * columns,))])


# what a run is judged by: share of the copying bandwidth when encoding, when decoding and
# summing, times faster than torch operations, times less communication than dense
WANTED = {"encode": 0.8, "encode dryden": 0.6, "encode adacomp": 0.6, "decode": 0.7, "torch": 5.0,
          "step": 3.0}


# ---- parity -------------------------------------------------------------------------------------


def one_step(spec, layout, seed, there):
    """(packet, residual, sum of it and one more) of a step with feedback; on the device if `there`.

    The packet and the gradient begin at addresses that are multiples of 4 and 1 only.
    """
    move = gpu.current().array if there else np.copy
    back = gpu.current().host if there else np.copy
    rng = np.random.default_rng([seed, layout.size])
    compressor, room = from_spec(spec), np.zeros(layout.size + 1, np.float32)
    room[1:] = rng.standard_normal(layout.size, np.float32)
    grad, owed = move(room)[1:], move(np.roll(room, 7))[1:]
    state = compressor.init(layout, grad)
    packet = move(np.zeros(compressor.capacity(layout) + 4, np.uint8))[4:]
    out, key = move(np.ones(layout.size, np.float32)), Key(seed, 1, 2, 3)
    given = grad
    if compressor.feedback:
        given = owed.copy()
        given += grad
    compressor.measure(given, layout, state)
    if compressor.feedback:
        used = compressor.encode_owed(grad, owed, packet, layout, key, state)
    else:
        used = compressor.encode(grad, packet, layout, key, state)
    said = packet[:used]
    compressor.decode_sum([said, said], out, layout, [key, key], 0.5)
    return back(said), back(owed), back(out)


def parity(largest, specs=SPECS) -> int:
    """Compare every spec at every size up to `largest` with the CPU's kernels; returns failures."""
    wrong = 0
    for n in [size for size in SIZES if size <= largest]:
        for spec in specs:
            for layout in layouts(n):
                mine, expected = (one_step(spec, layout, 1, there) for there in (True, False))
                names = [name for name, a, b in zip(("packet", "residual", "sum"), mine, expected)
                         if a.tobytes() != b.tobytes()]
                wrong += bool(names)
                if names:
                    print(f"DIFFERS {spec}, {n:,} elements, {layout.segments[0].name}: {names}")
        print(f"{n:>12,} elements: {len(specs)} configurations compared", flush=True)
    print(f"{wrong} differ" if wrong else "all bytes and floats are equal")
    return wrong


# ---- bench --------------------------------------------------------------------------------------


def seconds(cupy, action, rounds=20):
    """The median of the GPU's seconds for action()."""
    for _ in range(3):
        action()
    taken = []
    for _ in range(rounds):
        begin, end = cupy.cuda.Event(), cupy.cuda.Event()
        begin.record()
        action()
        end.record()
        end.synchronize()
        taken.append(1e-3 * cupy.cuda.get_elapsed_time(begin, end))
    return float(np.median(taken))


def bench(n) -> dict:
    """Bytes that must move over time, as a share of what copying n floats reaches here."""
    cupy = gpu.current().cupy
    source, target = cupy.random.standard_normal(n, dtype=np.float32), cupy.empty(n, np.float32)
    copying = 8 * n / seconds(cupy, lambda: cupy.copyto(target, source))
    figures, layout = {}, Layout.of([("matrix", (1024, n // 1024))])
    print(f"{n:,} elements; copying moves {1e-9 * copying:.0f} GB/s; share of that:")
    for spec, each in BENCH:
        compressor = from_spec(spec)
        grad = source[:layout.size]
        owed, ahead = cupy.zeros(layout.size, np.float32), cupy.zeros(layout.size, np.float32)
        state = compressor.init(layout, grad)
        packet = cupy.zeros(compressor.capacity(layout), np.uint8)
        compressor.measure(grad, layout, state)

        def encode():
            with kernels.of(grad).deferred():
                if each == 4:
                    return compressor.encode(grad, packet, layout, Key(1), state)
                return compressor.encode_owed(grad, owed, packet, layout, Key(1), state, out=ahead)

        used = encode()
        payloads = [packet[:used].copy() for _ in range(PEERS)]
        time = seconds(cupy, encode)
        decoding = seconds(cupy, lambda: compressor.decode_sum(
            payloads, target[:layout.size], layout, [Key(1)] * PEERS, 1 / PEERS))
        moved, read = each * layout.size + used, 4 * layout.size + PEERS * used
        figures[spec] = {"bytes": used, "encode_seconds": time, "decode_seconds": decoding,
                         "encode_share": moved / time / copying,
                         "decode_share": read / decoding / copying}
        print(f"{spec:24} encode {moved / time / copying:.2f}, decode and sum {PEERS} "
              f"{read / decoding / copying:.2f}", flush=True)
    return {"elements": n, "copy_bytes_per_second": copying, "cases": figures}


def against_torch(n, device="cuda", **more) -> dict:
    """The same encoders in torch operations: see torch_codecs.timed."""
    import torch_codecs

    if device == "cuda":
        gpu.current().cupy.get_default_memory_pool().free_all_blocks()  # torch has its own pool
    return torch_codecs.timed(n, device, **more)


# ---- a step of several ranks ------------------------------------------------------------------


def step(parameters, device="cuda", rounds=10) -> dict:
    """Seconds of communication in a step of each of STEPS, over the ranks present.

    The backward pass only copies given gradients, so there is nothing to hide behind: communication
    is what a step takes with a Reducer less what it takes without, on the slowest rank.
    """
    import torch
    from torch_codecs import synchronize

    import mpicomp
    from mpicomp import mpi

    comm = mpi.communicator(None)
    if device == "cuda":
        torch.cuda.set_device(mpicomp.local_rank() % torch.cuda.device_count())
    rows, layers = 1024, 8
    columns = max(1, parameters // (rows * layers))
    generator = torch.Generator(device).manual_seed(comm.rank)
    given = [torch.randn(rows, columns, device=device, generator=generator) for _ in range(layers)]
    figures = {}
    for spec in (None, *STEPS):
        named = [(f"layer{i}", torch.nn.Parameter(torch.zeros_like(g)))
                 for i, g in enumerate(given)]
        reducer = mpicomp.Reducer(named, spec, comm) if spec else None
        taken = []
        for _ in range(rounds + 3):
            for _, p in named:
                p.grad = None
            synchronize(device)
            comm.Barrier()
            start = perf_counter()
            sum((p * g).sum() for (_, p), g in zip(named, given, strict=True)).backward()
            if reducer:
                reducer.finish()
            synchronize(device)
            taken.append(max(comm.allgather(perf_counter() - start)))
        figures[spec or "none"] = {"seconds": float(np.median(taken[3:])),
                                   "bytes": reducer.stats.last["sent"] if reducer else 0}
        if reducer:
            reducer.close()
    alone = figures.pop("none")["seconds"]
    for spec, found in figures.items():
        found["communication"] = max(1e-9, found["seconds"] - alone)
        found["ratio"] = figures[STEPS[0]]["communication"] / found["communication"]
        if comm.rank == 0:
            print(f"{spec:16} {1e3 * found['communication']:8.2f} ms of communication, "
                  f"{found['bytes']:,} bytes sent, {found['ratio']:.2f} times less than dense",
                  flush=True)
    return {"ranks": comm.size, "parameters": rows * columns * layers, "device": device,
            "alone_seconds": alone, "cases": figures} if comm.rank == 0 else {}


# ---- training -----------------------------------------------------------------------------------


def training() -> int:
    """A small network on the GPU learns a fixed rule with several methods; returns failures."""
    import torch

    import mpicomp
    from mpicomp import mpi

    comm = mpi.communicator(None)
    torch.cuda.set_device(mpicomp.local_rank() % torch.cuda.device_count())
    wrong = 0
    for spec in ("dense", "onebit", "strom:tau=0.003", "terngrad", "dropping:rate=0.9", "adacomp"):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(),
                                    torch.nn.Linear(256, 10)).cuda()
        rule = torch.randn(64, 10, device="cuda")
        optimizer = mpicomp.DistributedOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), spec, comm)
        torch.manual_seed(1 + comm.rank)
        losses = []
        for _ in range(200):
            x = torch.randn(64, 64, device="cuda")
            loss = torch.nn.functional.cross_entropy(model(x), (x @ rule).argmax(1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        weights = comm.allgather(model[0].weight.detach().cpu().numpy().tobytes())
        fine = np.mean(losses[-20:]) < 0.7 * np.mean(losses[:5]) and len(set(weights)) == 1
        wrong += not fine
        if comm.rank == 0:
            print(f"{spec:20} loss {np.mean(losses[:5]):.3f} -> {np.mean(losses[-20:]):.3f}, "
                  f"replicas {'equal' if len(set(weights)) == 1 else 'DIFFER'}"
                  f"{'' if fine else '   FAILED'}", flush=True)
    return wrong


# ---- report -------------------------------------------------------------------------------------


def report(work, name, result) -> None:
    """Write `result`.json and a table, `result`.md, from what the parts left in `work`."""
    from mpicomp.bench.timing import surroundings, table, write_json

    lines = (work / "parts.tsv").read_text().splitlines()
    parts = {what: {"verdict": verdict, "seconds": int(taken)}
             for what, verdict, taken in (line.split("\t") for line in lines)}
    for what, part in parts.items():
        log = work / f"{what}.log"
        part["says"] = log.read_text().splitlines()[-8:] if log.exists() else []
    found, torch_ops, steps = (
        json.loads(file.read_text()) if (file := work / f"{what}.json").exists() else None
        for what in ("bench", "torch", "step"))
    about = {**surroundings(), "command": "jobs/gpu_check.sh", "gpu": name,
             "platform": platform.platform()}
    write_json(f"{result}.json", {**about, "parts": parts, "bench": found,
                                   "torch_operations": torch_ops, "step": steps})
    rows = [(what, part["verdict"], part["seconds"]) for what, part in parts.items()]
    text = f"# {name}, {about['date']}\n\n```\n" + table(("part", "verdict", "s"), rows)
    if found:
        rows = [bench_row(spec, c, torch_ops or {}) for spec, c in found["cases"].items()]
        text += (f"\n\n{found['elements']:,} elements; share of the "
                 f"{1e-9 * found['copy_bytes_per_second']:.0f} GB/s that copying moves\n")
        text += table(("", "bytes", "encode", "wanted", f"decode {PEERS}", "wanted",
                       "times faster than torch", "wanted"), rows)
    if steps:
        rows = [(spec, f"{1e3 * c['communication']:.2f}", f"{c['bytes']:,}", f"{c['ratio']:.2f}",
                 "" if spec == STEPS[0] else WANTED["step"]) for spec, c in steps["cases"].items()]
        text += (f"\n\na step of {steps['parameters']:,} parameters, {steps['ranks']} ranks on one "
                 "GPU, through host memory\n")
        text += table(("", "ms of communication", "bytes sent", "times less", "wanted"), rows)
    Path(f"{result}.md").write_text(text + "\n```\n")


def bench_row(spec, case, torch_ops):
    """A line of the table: what was reached, and what was wanted."""
    name = spec.split(":")[0]
    theirs = torch_ops.get(name, {}).get("seconds")
    faster = f"{theirs / case['encode_seconds']:.1f}" if theirs else "not run"
    return (spec, f"{case['bytes']:,}", f"{case['encode_share']:.2f}",
            WANTED.get(f"encode {name}", WANTED["encode"]), f"{case['decode_share']:.2f}",
            WANTED["decode"], faster, WANTED["torch"])


def number(text):
    return int(float(text))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=("parity", "bench", "torch", "step", "training",
                                             "report"))
    parser.add_argument("--largest", type=number, default=10**8, metavar="N")
    parser.add_argument("--elements", type=number, default=10**8, metavar="N")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--device")
    parser.add_argument("--result")
    options = parser.parse_args()
    if options.part == "parity":
        return bool(parity(options.largest))
    if options.part == "training":
        return bool(training())
    if options.part == "report":
        report(options.work, options.device, options.result)
        return 0
    figures = {"bench": bench, "torch": against_torch, "step": step}[options.part](options.elements)
    if options.json and figures:  # rank 0 has them
        Path(options.json).write_text(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
