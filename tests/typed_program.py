"""A program that uses the public names, for the type checker: mypy reads it, nobody runs it.

mypy is strict here, so a call of a function without types is an error, as is a wrong type.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, assert_type

import numpy as np
import torch
from mpi4py import MPI
from numpy.typing import NDArray

import mpicomp
import mpicomp.compat.horovod as hvd
from mpicomp import advice, checkpoint, ddp, kernels, nn, optim, philox, slurm
from mpicomp.compat import deepspeed
from mpicomp.compressor import State, check_options, find, option, registry
from mpicomp.exchange import Codec, Cost, Exchange, WholeBucket, exchanges, packet, staging
from mpicomp.transport.meter import Meter


def training(model: torch.nn.Module, optimizer: torch.optim.SGD, scaler: torch.amp.GradScaler,
             comm: MPI.Intracomm) -> None:
    mpicomp.broadcast_parameters(model, comm)
    mpicomp.broadcast_optimizer_state(optimizer, root=1)
    mpicomp.DistributedOptimizer(optimizer, model.named_parameters(), "onebit", seed=1)
    method = mpicomp.method("strom:tau=0.01")
    reducer = mpicomp.Reducer(model.named_parameters(), method, comm, average=False,
                              sparse=mpicomp.sparse_parameters(model), require_ratio=8)
    assert_type(reducer.attach(optimizer, scaler), mpicomp.Reducer)
    with reducer.no_sync():
        pass
    reducer.finish()
    mpicomp.clip_grad_norm_(optimizer, 1.0)
    adam = optim.OneBitAdam(model.parameters(), 1e-3, (0.9, 0.99), freeze="auto", freeze_by=100)
    assert_type(mpicomp.DistributedOptimizer(adam, model.named_parameters()), optim.OneBitAdam)
    mpicomp.Reducer(model.named_parameters(), "onebit", sends=adam.sends).attach(adam)
    assert_type(adam.frozen, bool)
    assert_type(adam.adamw_state_dict(), dict[str, Any])
    assert_type(reducer.stats, Meter)
    assert_type(reducer.stats.ratio, float)
    step: int = reducer.step
    assert_type(reducer.state_dict(), dict[str, Any])
    reducer.load_state_dict(reducer.state_dict())
    reducer.check_replicas(model, optimizer=optimizer)
    reducer.flush()
    reducer.deliver()
    reducer.discard()
    assert step >= 0
    assert_type(reducer.report(), str)
    reducer.close()
    averager = mpicomp.Averager(dict(model.named_parameters()), "onebit", comm, average=False)
    averager.average(dict(model.named_parameters()), weight=0.5)
    averager.start("w", np.zeros(4, np.float32))
    assert_type(averager.finish(), bool)
    assert_type(averager.send({"w": np.zeros(4, np.float32)}), bool)
    averager.poll()
    assert_type(averager.deliver(), dict[str, NDArray[np.float32]])
    assert_type(averager.stats, Meter)
    assert_type(averager.state_dict(), dict[str, Any])
    averager.load_state_dict(averager.state_dict())
    averager.check_ratio()
    averager.close()
    assert_type(mpicomp.local_rank(), int)


def alone(model: torch.nn.Module, comm: MPI.Intracomm) -> None:
    inner = torch.optim.AdamW(model.parameters())
    local = mpicomp.LocalUpdates(
        model, inner, lambda number: 4, "onebit", lambda anchors: torch.optim.Adam(anchors), comm,
        fragments=2, lag=1, mix=0.5, weight=2.0)
    local.step()
    local.step(lambda: torch.zeros(1))
    local.sync()
    assert_type(local.rounds, int)
    assert_type(local.stats, Meter)
    with local.anchored():
        pass
    local.load_state_dict(local.state_dict())
    local.regroup(comm)
    mpicomp.Recovery(local, model)
    assert_type(mpicomp.SparseLoCo(model, inner, method="onebit"), mpicomp.LocalUpdates)
    local.close()


def horovod(model: torch.nn.Module, optimizer: torch.optim.SGD, comm: MPI.Intracomm) -> None:
    hvd.init(comm)
    assert_type(hvd.rank() + hvd.size() + hvd.local_rank() + hvd.local_size(), int)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    optimizer = hvd.DistributedOptimizer(
        optimizer, model.named_parameters(), hvd.Compression.of("onebit"), op=hvd.Average,
        backward_passes_per_step=2)
    loss = torch.zeros(1)
    hvd.allreduce(hvd.allreduce_(loss), op=hvd.Sum, compression=hvd.Compression.fp16)
    hvd.broadcast(hvd.allgather(hvd.broadcast_(loss, 0)), 0)
    for handle in (hvd.allreduce_async(loss), hvd.allreduce_async_(loss), hvd.allgather_async(loss),
                   hvd.broadcast_async(loss, 0), hvd.broadcast_async_(loss, 0)):
        assert_type(handle, hvd.Handle)
        assert_type(hvd.poll(handle), bool)
        hvd.synchronize(handle)
    hvd.broadcast_object(hvd.allgather_object(1), 0)
    hvd.barrier()
    assert_type(hvd.join(), int)
    hvd.shutdown()
    assert_type(hvd.is_initialized(), bool)


def converted(folder: Path) -> dict[str, Any]:
    assert_type(deepspeed.translate({"optimizer": {"type": "Adam"}}, ranks=4), str)
    assert_type(deepspeed.config_file(folder / "ds_config.json"), str)
    assert_type(deepspeed.checkpoint_file(folder / "in.pt", folder / "out.pt"), list[str])
    found, notes = deepspeed.adamw_state({"module": {}}, [["*.bias"], ["*"]])
    assert_type(notes, list[str])
    return found


def hooks(model: torch.nn.parallel.DistributedDataParallel, comm: MPI.Intracomm) -> None:
    ddp.init_process_group(comm, timeout=60.0)
    state = ddp.HookState("onebit", comm, named_parameters=model.named_parameters())
    model.register_comm_hook(state, ddp.comm_hook)
    assert_type(state.stats, Meter)


def saved(folder: Path, reducer: mpicomp.Reducer, comm: MPI.Intracomm) -> Mapping[str, Any] | None:
    checkpoint.save(folder, comm, 1, {}, {"reducer": reducer.state_dict()}, about={"config": 1})
    found = checkpoint.newest(str(folder))
    if found is None:
        return None
    path, manifest = found
    assert_type(path, Path)
    assert_type(checkpoint.objection(manifest, 1), str | None)
    checkpoint.load(path, comm.rank, comm.size)
    states = [mine["reducer"] for mine in checkpoint.each_rank(path)]
    signals = checkpoint.Signals(comm)
    signals.post()
    assert_type(signals.agreed(), int)
    return checkpoint.repartition(states, 3, keep="mean")[comm.rank]


def survived(reducer: mpicomp.Reducer, model: torch.nn.Module) -> int:
    def train(step: int) -> float:
        return step / 2

    recovery = mpicomp.Recovery(reducer, model, least=2)
    assert_type(recovery.run(train, 1), float)
    assert_type(mpicomp.DeadRankError.status, int)
    assert_type(mpicomp.watchdog.STALLED, int)
    recovery.leave()
    return recovery.size


@mpicomp.register
@dataclass(frozen=True, repr=False)
class Nothing(mpicomp.Compressor):
    """sends nothing"""

    name = "nothing"
    bits: int = option(4, "of no use", least=1, choices=(4, 8))

    def __post_init__(self) -> None:
        check_options(self)

    def capacity(self, layout: mpicomp.Layout) -> int:
        return 0

    def encode(self, x: NDArray[Any], packet: NDArray[Any], layout: mpicomp.Layout,
               key: mpicomp.Key, state: State) -> int:
        return 0

    def decode_add(self, packet: NDArray[Any], out: NDArray[Any], layout: mpicomp.Layout,
                   key: mpicomp.Key, weight: float = 1.0) -> None:
        self.expect(packet, 0)


class Inboxes(WholeBucket):
    def __init__(self, exchange: Exchange, *arguments: Any) -> None:
        super().__init__(exchange, *arguments)
        size = self.codec.outbox.size * exchange.wire.size
        self.inbox = staging.buffers_for(self.grad)(size, "uint8")


@mpicomp.exchange.register
@dataclass(eq=False, repr=False)
class Ring(Exchange):
    name = "ring"
    bucket = Inboxes
    hops: int = option(1, "of no use", least=1)

    @classmethod
    def cost(cls, ranks: int) -> Cost:
        return Cost(ranks - 1, decodes=ranks)

    def run(self, bucket: Inboxes, step: int, flags: int) -> Iterator[list[Any]]:
        codec: Codec = bucket.codec
        yield from self.agree(codec, flags)
        self.encode(codec, step, flags)
        yield [self.wire.allgather(1, codec.outbox, bucket.inbox)]
        bucket.headers = self.read_headers(bucket.inbox, range(0, packet.SIZE, packet.SIZE))

    def decode(self, bucket: Inboxes, step: int, weight: float) -> None:
        bucket.grad[...] = weight * bucket.codec.decoded(step, self.wire.rank)


def costs(ranks: int) -> dict[str, Cost]:
    return {name: of.cost(ranks) for name, of in exchanges().items()}


def compressed(x: NDArray[np.float32], comm: MPI.Intracomm) -> int:
    layout, key = mpicomp.Layout.of([("x", x.shape)]), mpicomp.Key(seed=1)
    compressor = mpicomp.from_spec("nothing")
    assert_type(find("nothing"), type[mpicomp.Compressor])
    assert_type(registry()["nothing"], type[mpicomp.Compressor])
    assert_type(mpicomp.methods(), dict[str, str])
    packet = np.empty(compressor.capacity(layout), np.uint8)
    assert_type(philox.uniform(key, 0, 8), NDArray[np.float32])
    assert_type(philox.common(key), mpicomp.Key)
    kernels.use("reference")
    assert_type(kernels.note(), str | None)
    found = advice.advise(comm, gradient={"x": x})
    assert_type(found.predictions[0].total, float)
    return compressor.encode(x, packet, layout, key, compressor.init(layout, x))


def quantised(model: torch.nn.Sequential) -> torch.nn.Sequential:
    noise = nn.reseed(torch.Generator(), 0, 0, 0)
    nn.Linear(4, 8, weights=1, generator=noise)
    return nn.convert(model, weights=1, activations=2, generator=noise)


def batch_script() -> str:
    try:
        mpi = slurm.launcher_for(MPI.Get_library_version())
    except mpicomp.LaunchError:
        mpi = "pmix"
    return slurm.script(["python", "train.py"], mpi=mpi, name="train", nodes=2, ranks_per_node=4,
                        cpus=8, time="1:00:00")
