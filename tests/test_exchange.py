"""What every exchange owes: the exact sum, identical replicas, nothing lost, and honest bytes."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from training import (
    examples,
    give,
    network,
    parameters,
    replicas_are_identical,
    same_error,
    train,
    whole_numbers,
)

import mpicomp
from mpicomp import Compressor, NonFiniteError, SpecError, method, mpi
from mpicomp.exchange import exchanges, hierarchical
from mpicomp.philox import words

pytestmark = pytest.mark.mpi
SUMMING = [name for name, cls in exchanges().items()
           if not cls.asynchronous and name != "silent"]  # silent ranks hear nothing
OWN = ["dense", "fp16", "bf16", "terngrad", "onebit", "strom:tau=0.02"]
SPECS = [f"{spec}{',' if ':' in spec else ':'}exchange={name}" for spec in OWN for name in SUMMING]
SPECS += ["fp16:feedback=yes", "bf16:exchange=allreduce", "terngrad:packing=planar",
          "terngrad:packing=int16,exchange=allreduce", "onebit:feedback=no",
          "onebit:wire=cntk,min_rows=4", "strom:tau=0.02,strict=no,feedback=no", "onebit:warmup=7",
          "onebit:exchange=sharded,own=raw", "onebit:exchange=sharded,adagrad=yes"]


def possible(specs):
    """Those whose exchange can carry them."""
    for spec in specs:
        try:
            yield repr(method(spec)) and spec
        except SpecError:
            assert "allreduce" in spec, spec


@pytest.fixture
def nodes_of_two(monkeypatch):
    """Ranks 0 and 1 on one node, 2 and 3 on the next: for exchange=hierarchical."""
    monkeypatch.setattr(hierarchical, "node_of", lambda comm: comm.Split(comm.rank // 2))


def test_the_list_of_methods_is_complete():
    specs = list(possible(SPECS))
    assert {s.split(":")[0] for s in specs} == {s.split(":")[0] for s in OWN}
    assert len(specs) == len(SPECS) - 2  # MPI cannot add what onebit and strom send


# ---- the sum --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SUMMING)
@pytest.mark.parametrize("spec", ["dense", "fp16", "bf16", "dense:feedback=yes"])
def test_sum_of_whole_numbers_is_exact(spec, name, any_comm, nodes_of_two):
    """average=False: the sum of all ranks' gradients, which 16-bit floats hold too, to the bit."""
    named = parameters(a=(3, 5), b=(), c=(17,), d=(2, 3, 2))
    joint = "," if ":" in spec else ":"
    reducer = mpicomp.Reducer(named, f"{spec}{joint}exchange={name}", any_comm, average=False,
                              bucket_bytes=64)
    for step in range(3):
        mine = [whole_numbers(any_comm.rank, step + k, p.numel()) for k, (_, p) in enumerate(named)]
        give(named, mine)
        reducer.finish()
        for k, (_, p) in enumerate(named):
            expected = sum(whole_numbers(rank, step + k, p.numel())
                           for rank in range(any_comm.size))
            assert p.grad.reshape(-1).tolist() == expected.tolist()
            p.grad = None


def test_mean_is_the_sum_times_one_over_the_ranks(comm):
    """allreduce adds, then weighs; allgather weighs, then adds in rank order: both rounded once."""
    gradients = [whole_numbers(rank, 0, 100) for rank in range(comm.size)]
    part = np.float32(1 / comm.size)
    in_order = np.zeros(100, np.float32)
    for gradient in gradients:
        in_order += gradient * part
    for spec, expected in (("dense", sum(gradients) * part),
                           ("dense:exchange=allgather", in_order)):
        named = parameters(w=100)
        reducer = mpicomp.Reducer(named, spec, comm)
        give(named, [gradients[comm.rank]])
        reducer.finish()
        assert named[0][1].grad.tolist() == expected.tolist()


@pytest.mark.parametrize("name", SUMMING)
def test_mean_in_every_exchange(name, any_comm, nodes_of_two):
    named = parameters(a=(3, 5), b=17)
    reducer = mpicomp.Reducer(named, f"dense:exchange={name}", any_comm, bucket_bytes=64)
    give(named, [whole_numbers(any_comm.rank, 0, p.numel()) for _, p in named])
    reducer.finish()
    for _, p in named:
        total = sum(whole_numbers(rank, 0, p.numel()) for rank in range(any_comm.size))
        np.testing.assert_allclose(p.grad.reshape(-1), total / any_comm.size, rtol=1e-6, atol=1e-6)


@dataclass(frozen=True, repr=False)
class Masked(Compressor):
    """float32 under a mask of random words, which decode draws again with the sender's key."""

    name = "masked"

    def capacity(self, layout):
        return 4 * layout.size

    def encode(self, x, packet, layout, key, state):
        packet[:4 * x.size].view(np.uint32)[:] = x.view(np.uint32) ^ words(key, 0, x.size)
        return 4 * x.size

    def decode_add(self, packet, out, layout, key, weight=1.0):
        plain = packet.view(np.uint32) ^ words(key, 0, layout.size)
        out += np.float32(weight) * plain.view(np.float32)


@pytest.mark.parametrize("name", [name for name in SUMMING if name != "allreduce"])
def test_decoding_has_the_key_of_the_sender(name, comm, nodes_of_two):
    """With another rank's, step's or bucket's key this payload decodes to noise."""
    named = parameters(a=40, b=(8, 5))
    method = mpicomp.Method("masked", Masked(), name)
    reducer = mpicomp.Reducer(named, method, comm, average=False, bucket_bytes=160, seed=5)
    for step in range(3):
        give(named, [whole_numbers(comm.rank, step, 40)] * 2)
        reducer.finish()
        total = sum(whole_numbers(rank, step, 40) for rank in range(comm.size))
        for _, p in named:
            assert p.grad.reshape(-1).tolist() == total.tolist()
            p.grad = None


@pytest.mark.parametrize("name", SUMMING)
def test_ranks_steps_and_buckets_draw_their_own_numbers(name, comm, nodes_of_two):
    """The same gradient of 1/2 everywhere, beside a 1: the codes of any two draws differ."""
    named = parameters(a=1024, b=1024)
    spec = f"terngrad:clip=0,exchange={name}"
    reducer = mpicomp.Reducer(named, spec, comm, average=False, bucket_bytes=4096)
    gradient = np.full(1024, 0.5)
    gradient[0] = 1
    seen = []
    for _ in range(2):
        give(named, [gradient] * 2)
        reducer.finish()
        seen += [p.grad.numpy().copy() for _, p in named]
        for _, p in named:
            p.grad = None
    assert len({grad.tobytes() for grad in seen}) == len(seen)
    if comm.size > 1 and name in ("allgather", "allreduce"):
        # independent ranks: P/2 on average, variance P/4; in step they would say 0 or P only
        assert all(set(np.unique(grad)) == set(range(comm.size + 1)) for grad in seen)


def test_silent_hears_only_itself(comm):
    named = parameters(w=50)
    reducer = mpicomp.Reducer(named, "dense:exchange=silent", comm, average=False)
    give(named, [whole_numbers(comm.rank, 0, 50)])
    reducer.finish()
    assert named[0][1].grad.tolist() == (whole_numbers(comm.rank, 0, 50) * comm.size).tolist()
    assert reducer.stats.sent == reducer.stats.received == 0


@pytest.mark.parametrize("average", [True, False])
def test_dense_is_one_process_with_all_examples(average, comm):
    """A linear model of whole numbers, lr a power of two: two steps need less than 24 bits.

    With average=True the sum over P ranks is divided by P, which is exact for 1, 2 and 4 only.
    """
    torch.manual_seed(0)
    x, y = torch.randint(-3, 4, (2, 4 * comm.size, 6)).float(), torch.randint(-3, 4, (2, 2)).float()

    def run(model, shard, after):
        for step in range(2):
            model.zero_grad()
            loss = ((model(x[step][shard]) - y[step]) ** 2).sum()
            (loss / 2 if average else loss).backward()
            after(model)
            with torch.no_grad():
                for p in model.parameters():
                    p -= 2.0**-5 * p.grad
        return torch.cat([p.detach().reshape(-1) for p in model.parameters()])

    def linear():
        model = torch.nn.Linear(6, 2)
        for p in model.parameters():
            torch.nn.init.ones_(p)
        return model

    def scale(model):
        for p in model.parameters():
            p.grad /= comm.size if average else 1

    alone = run(linear(), slice(None), scale)
    model = linear()
    reducer = mpicomp.Reducer(model.named_parameters(), "dense", comm, average=average)
    together = run(model, slice(4 * comm.rank, 4 * comm.rank + 4), lambda _: reducer.finish())
    if average and comm.size == 3:
        torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-6)
    else:
        assert together.tolist() == alone.tolist()


# ---- replicas -------------------------------------------------------------------------------

OPTIMIZERS = {"sgd": None, "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01)}


@pytest.mark.parametrize("spec, optimizer", [(spec, "sgd") for spec in possible(SPECS)]
                         + [(spec, "adam") for spec in OWN])
def test_replicas_are_identical_after_30_steps(spec, optimizer, comm, nodes_of_two):
    """Bit for bit, with momentum and with Adam, over several buckets; and the loss has fallen."""
    model, losses = train(spec, comm, steps=30, optimizer=OPTIMIZERS[optimizer])
    replicas_are_identical(comm, model)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    if optimizer == "sgd" and "adagrad" not in spec:
        first, last = (sum(comm.allgather(sum(part))) for part in (losses[:4], losses[-4:]))
        assert last < 0.7 * first


# ---- nothing is lost ------------------------------------------------------------------------

OWING = ["onebit", "onebit:wire=cntk,min_rows=4", "strom:tau=0.02", "fp16:feedback=yes",
         "bf16:feedback=yes", "dense:feedback=yes,exchange=allreduce"]
OWING += [f"{spec}{',' if ':' in spec else ':'}exchange={name}" for spec in OWING[:5]
          for name in SUMMING if name not in ("allreduce", "allgather")]


@pytest.mark.parametrize("spec", [*OWING, "onebit:exchange=sharded,own=raw"])
def test_applied_and_owed_is_given(spec, comm, nodes_of_two):
    """Sum of what was applied + all residuals of all ranks = sum of all gradients, to rounding.

    With exchange=allreduce, 16-bit sums round in MPI, outside of any residual: not in this list.
    """
    named, steps = parameters(w=(40, 5), b=40, k=(5, 2, 3)), 20
    reducer = mpicomp.Reducer(named, spec, comm, average=False, bucket_bytes=500)
    rng = np.random.default_rng(comm.rank)
    given = [np.zeros(p.shape) for _, p in named]
    applied = [np.zeros(p.shape) for _, p in named]
    largest = 0.0
    for _ in range(steps):
        gradients = [(0.05 * rng.normal(size=p.shape)).astype(np.float32) for _, p in named]
        give(named, gradients)
        reducer.finish()
        for k, (_, p) in enumerate(named):
            given[k] += gradients[k]
            applied[k] += p.grad.numpy()
            largest = max(largest, np.abs(gradients[k]).max(), p.grad.abs().max().item())
            p.grad = None
    state = reducer.state_dict()
    for k, (name, p) in enumerate(named):
        owed = sum(v.double().numpy() for key, v in state.items() if key.endswith(f"/{name}"))
        owed = sum(comm.allgather(owed + np.zeros(p.shape)))
        total = sum(comm.allgather(given[k]))
        largest = max(largest, np.abs(owed).max())
        # Each step rounds: twice at each sender, at each of P additions, in two stages at most.
        bound = steps * 4 * (comm.size + 1) * 2.0**-24 * 4 * largest
        np.testing.assert_allclose(applied[k] + owed, total, rtol=0, atol=bound)
        assert np.abs(applied[k]).max() > 0


@pytest.mark.parametrize("spec", OWING)
def test_flush_says_what_is_owed(spec, comm, nodes_of_two):
    """After flush nothing is owed, and the sum of all that was applied is the sum of all given."""
    named = parameters(w=(40, 5), b=40)
    reducer = mpicomp.Reducer(named, spec, comm, average=False)
    gradients = [[0.25 * whole_numbers(comm.rank, step, p.numel()) for _, p in named]
                 for step in range(4)]
    applied = [np.zeros(p.numel()) for _, p in named]
    for step in range(5):
        if step < 4:
            give(named, gradients[step])
            reducer.finish()
        else:
            reducer.flush()
        for k, (_, p) in enumerate(named):
            applied[k] += p.grad.reshape(-1).numpy()
            p.grad = None
    for k in range(len(named)):
        total = sum(comm.allgather(sum(g[k] for g in gradients)))
        np.testing.assert_allclose(applied[k], total, rtol=0, atol=1e-4)
    assert all(not v.any() for key, v in reducer.state_dict().items() if key != "step")


# ---- memory ---------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["dense", "onebit", "strom:tau=0.02", "terngrad", "fp16"])
def test_p_grad_is_the_bucket_itself(spec, comm):
    """The gradient's memory is the same in every step: no copy is made for the optimizer."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    mpicomp.DistributedOptimizer(optimizer, model.named_parameters(), spec, comm)
    places = []
    for step in range(5):
        optimizer.zero_grad()
        x, y = examples(comm, step)
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        places.append([p.grad.data_ptr() for p in model.parameters()])
    assert all(place == places[0] for place in places)
    assert places[0] == sorted(places[0], reverse=True) or len(set(places[0])) == len(places[0])


# ---- what MPI cannot count -------------------------------------------------------------------


@pytest.mark.parametrize("spec", [
    "dense", "dense:exchange=allgather", "bf16:exchange=allreduce", "onebit:feedback=no",
    "dense:exchange=sharded", "dense:exchange=hierarchical", "onebit:exchange=hierarchical"])
def test_buckets_that_mpi_cannot_count_are_refused(spec, comm, monkeypatch):
    """By all ranks when the Reducer is made; smaller buckets are the remedy."""
    named = parameters(**{f"p{i}": 25 for i in range(8)})
    mpicomp.Reducer(named, spec, comm)
    limit = 70 if spec.startswith("onebit") else 600 if "sharded" in spec else 150
    monkeypatch.setattr(mpi, "largest", lambda: limit)
    if spec.startswith("onebit"):
        named = parameters(**{f"p{i}": (2, 25) for i in range(8)})
    text = same_error(comm, SpecError, lambda: mpicomp.Reducer(named, spec, comm))
    assert f"counts to {limit}: make bucket_bytes smaller" in text
    reducer = mpicomp.Reducer(named, spec, comm, bucket_bytes=100)
    give(named, [np.ones(p.shape) for _, p in named])
    reducer.finish()


def test_lengths_that_mpi_cannot_count_are_refused_by_all(comm, monkeypatch):
    """Where the length depends on the data it is the gathered payloads of one step that count."""
    monkeypatch.setattr(mpi, "largest", lambda: 300)
    named = parameters(w=100)
    reducer = mpicomp.Reducer(named, "strom:tau=0.5", comm)
    give(named, [np.arange(100) < 5])
    reducer.finish()

    def go():  # a hook may meet it, or finish
        give(named, [np.ones(100)])
        reducer.finish()

    assert "make bucket_bytes smaller" in same_error(comm, SpecError, go)


def test_how_far_mpi_counts():
    from mpi4py import MPI

    assert mpi.largest() == (2**31 - 1 if MPI.Get_version() < (4, 0) else 2**63 - 1)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("average", [True, False])
def test_a_sum_beyond_float32_says_so_on_all_ranks(average, comm):
    """Nothing changes, and the step can be made again; allgather divides before it adds."""
    named = parameters(w=5)
    reducer = mpicomp.Reducer(named, "dense", comm, average=average)
    give(named, [np.full(5, 3e38)])
    text = same_error(comm, NonFiniteError, reducer.finish)
    assert f"step 0, bucket 0: every rank's gradient is finite, but their sum over {comm.size}" \
        in text and "exchange=allgather" in text and reducer.step == 0
    named[0][1].grad = None
    give(named, [np.full(5, 3e38)])
    other = mpicomp.Reducer(named, "dense:exchange=allgather", comm)
    other.finish()
    np.testing.assert_allclose(named[0][1].grad, 3e38, rtol=1e-6)


@pytest.mark.mpi(min_size=2)
def test_a_sum_beyond_float32_is_skipped_where_that_is_asked_for(comm):
    named = parameters(w=5)
    optimizer = torch.optim.SGD([p for _, p in named], lr=1.0)
    reducer = mpicomp.Reducer(named, "dense", comm, nonfinite="skip").attach(optimizer)
    for value in (3e38, 1.0):
        optimizer.zero_grad()
        give(named, [np.full(5, value)])
        optimizer.step()
    assert (reducer.step, reducer.stats.skipped) == (2, 1)
    assert named[0][1].tolist() == [-1.0] * 5


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("spec, dtype, value", [
    ("dense", torch.float16, 60000.0), ("dense:exchange=allgather", torch.float32, 3e38),
    ("fp16", torch.float16, 60000.0)])
def test_a_sum_that_the_parameter_cannot_hold(spec, dtype, value, comm):
    """With average=False: refused, with nothing left of it, or skipped."""
    for nonfinite in ("raise", "skip"):
        p = torch.nn.Parameter(torch.zeros(3, dtype=dtype))
        reducer = mpicomp.Reducer([("p", p)], spec, comm, average=False, nonfinite=nonfinite)
        give([("p", p)], [np.full(3, value)])
        if nonfinite == "raise":
            assert f"'p' is beyond {dtype}" in same_error(comm, NonFiniteError, reducer.finish)
        else:
            reducer.finish()
        assert p.grad is None and reducer.stats.skipped == (nonfinite == "skip")


def test_what_ranks_agree_on_is_four_bytes_a_piece_where_tensors_are_cut(comm):
    """docs/wire-format.md: one scale for each part of a tensor that has an owner of its own."""
    columns = 4 * comm.size
    named = parameters(w=(3, columns))
    for exchange, pieces in (("allgather", 1), ("sharded", comm.size)):
        reducer = mpicomp.Reducer(named, f"terngrad:exchange={exchange}", comm)
        give(named, [np.ones((3, columns))])
        reducer.finish()
        named[0][1].grad = None
        assert reducer.stats.calls["Iallreduce"] == 4 * pieces


@pytest.mark.parametrize("spec, known", [
    ("onebit", True), ("terngrad:exchange=allreduce", True), ("dense", False),
    ("onebit:exchange=sharded", False), ("onebit:exchange=hierarchical", False)])
def test_what_a_rank_has_sent_where_it_is_one_packet(spec, known, comm):
    """By parameter; elsewhere it was an AttributeError, or a packet that was none."""
    named = parameters(w=(40, 5))
    reducer = mpicomp.Reducer(named, spec, comm)
    give(named, [np.ones((40, 5))])
    reducer.finish()
    if known:
        assert reducer.named() == {"w": 200}
        return
    with pytest.raises(SpecError, match="with exchange=allgather only"):
        reducer.named()
