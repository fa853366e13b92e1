"""exchange=server: pushes are applied at once, pulls say the difference, and it adds up."""

import io
import time

import numpy as np
import pytest
import torch
from training import (
    examples,
    give,
    impatient,
    network,
    outcome,
    parameters,
    replicas_are_identical,
    same_error,
    whole_numbers,
)

import mpicomp
from mpicomp import Key, PacketError, SpecError, StallError
from mpicomp.compressors import Dropping, Residual, Strom
from mpicomp.exchange.shards import equal_borders, part
from mpicomp.layout import Layout
from mpicomp.transport import packet

pytestmark = pytest.mark.mpi
two = pytest.mark.mpi(min_size=2)
SPECS = ["dense", "onebit", "strom:tau=0.05", "dropping:rate=0.9", "adacomp",
         "dryden:proportion=8"]
MORE = ["strom:tau=0.05,coding=rice", "strom:density=0.1", "dropping:rate=0.9,survivors=onebit",
        "dropping:rate=0.9,scope=layer", "bf16:feedback=yes"]
SHAPES = dict(w=(40, 5), b=(40,), k=(5, 2, 3), s=())
N = 271


def server(spec, **options):
    """The specification with exchange=server behind it."""
    told = ",".join(f"{key}={value}" for key, value in dict(exchange="server", **options).items())
    return f"{spec}{',' if ':' in spec else ':'}{told}"


def make(comm, spec, named=None, optimizer=None, **keywords):
    """(named parameters, Reducer, optimizer)."""
    named = named or parameters(**SHAPES)
    make_optimizer = optimizer or (lambda ps: torch.optim.SGD(ps, lr=0.5))
    optimizer = make_optimizer([p for _, p in named])
    reducer = mpicomp.Reducer(named, spec, comm, **keywords).attach(optimizer)
    return named, reducer, optimizer


def step(named, optimizer, gradients):
    optimizer.zero_grad()
    give(named, gradients)
    optimizer.step()


def random_gradients(rank, step, named):
    rng = np.random.default_rng([rank, step])
    return [(0.05 * rng.normal(size=p.shape)).astype(np.float32) for _, p in named]


def identical(comm, named):
    return len(set(comm.allgather(b"".join(p.detach().numpy().tobytes() for _, p in named)))) == 1


def flat(named):
    """All parameters in the order of the bucket."""
    return torch.cat([p.detach().reshape(-1) for _, p in reversed(named)]).numpy().copy()


# ---- the sum --------------------------------------------------------------------------------


@pytest.mark.parametrize("spec, average, thread", [
    *((spec, False, "yes") for spec in SPECS),
    *(pytest.param(spec, False, "yes", marks=pytest.mark.slow) for spec in MORE),
    ("strom:tau=0.05", True, "no"),
    ("dropping:rate=0.9", True, "no"), ("dropping:rate=0.9", True, "yes")])
def test_after_flush_all_that_was_given_was_applied(spec, average, thread, comm):
    """parameters = start - lr * (sum of all gradients, / P if average); nothing is owed."""
    named, reducer, optimizer = make(comm, server(spec, thread=thread), average=average)
    steps = 100
    for k in range(steps):
        step(named, optimizer, random_gradients(comm.rank, k, named))
        assert all(p.grad is None for _, p in named), "the owners have applied it"
    reducer.flush()
    optimizer.step()
    assert identical(comm, named)
    weight = 1 / comm.size if average else 1
    for i, (_, p) in enumerate(named):
        given = sum(random_gradients(rank, k, named)[i].astype(np.float64)
                    for rank in range(comm.size) for k in range(steps))
        largest = 0.5 * max(1, np.abs(given).max()) * 8
        bound = steps * (comm.size + 2) * 4 * 2.0**-24 * largest
        np.testing.assert_allclose(p.detach().numpy(), -0.5 * weight * given, rtol=0, atol=bound)
    state = reducer.state_dict()
    assert state.pop("step") == steps and state.pop("shard")
    assert not any(v.any() for v in state.values())


@pytest.mark.parametrize("spec", ["dense", "onebit", "strom:tau=0.05", "dropping:rate=0.9"])
def test_after_deliver_replicas_are_identical_and_residuals_make_up_the_rest(spec, comm):
    named, reducer, optimizer = make(comm, server(spec), average=False)
    for _ in range(2):
        before = reducer.step
        for k in range(before, before + 15):
            step(named, optimizer, random_gradients(comm.rank, k, named))
        reducer.deliver()
        assert identical(comm, named)
    state = reducer.state_dict()
    for i, (name, p) in enumerate(named):
        owed = state.get(f"error/{name}", torch.zeros(p.shape)).double().numpy()
        owed = sum(comm.allgather(owed))
        given = sum(random_gradients(rank, k, named)[i].astype(np.float64)
                    for rank in range(comm.size) for k in range(30))
        np.testing.assert_allclose(p.detach().numpy() / -0.5 + owed, given, rtol=0, atol=2e-4)


@pytest.mark.parametrize("kind", [
    lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, weight_decay=0.1),
    lambda ps: torch.optim.Adam(ps, lr=0.1),
    lambda ps: torch.optim.AdamW([{"params": ps[:1], "lr": 0.3}, {"params": ps[1:]}], lr=0.1),
    lambda ps: torch.optim.Adagrad(ps, lr=0.1)])
def test_one_worker_is_the_users_own_optimizer(kind, comm):
    """Alone, or where only one rank pushes: the same bits as that optimizer gives by itself."""
    named, reducer, optimizer = make(comm, "dense:exchange=server", optimizer=kind, average=False)
    alone = parameters(**SHAPES)
    expected = kind([p for _, p in alone])
    reducer.finish()  # compares the replicas, says nothing
    for k in range(6):
        for group in optimizer.param_groups + expected.param_groups:
            group["lr"] *= 0.7
        wait_for(comm, reducer)  # all have the learning rate of this step
        gradients = random_gradients(0, k, named)
        step(alone, expected, gradients)
        if comm.rank == 0:
            step(named, optimizer, gradients)
        wait_for(comm, reducer)
    reducer.deliver()
    for (_, p), (_, q) in zip(named, alone):
        np.testing.assert_allclose(p.detach(), q.detach(), rtol=1e-6, atol=1e-7)


def test_the_learning_rate_of_a_schedule_is_that_of_the_push(comm):
    named, reducer, optimizer = make(comm, "dense:exchange=server", average=False)
    for k, lr in enumerate((1.0, 0.5, 0.25)):
        optimizer.param_groups[0]["lr"] = lr
        wait_for(comm, reducer)
        step(named, optimizer, [np.ones(p.shape) for _, p in named])
        wait_for(comm, reducer)
    reducer.deliver()
    assert all((p == -1.75 * comm.size).all() for _, p in named)


@pytest.mark.parametrize("spec, optimizer", [
    ("dropping:rate=0.9,exchange=server", "adam"), ("strom:tau=0.01,exchange=server", "sgd"),
    ("onebit:exchange=server", "sgd"), ("dense:exchange=server", "sgd")])
def test_training_learns(spec, optimizer, comm):
    kind = {"adam": lambda ps: torch.optim.Adam(ps, lr=0.01),
            "sgd": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.5)}[optimizer]
    model = network()
    optimizer = kind(model.parameters())
    reducer = mpicomp.Reducer(model.named_parameters(), spec, comm, seed=3).attach(optimizer)
    losses = []
    for k in range(40):
        x, y = examples(comm, k)
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    reducer.deliver()
    replicas_are_identical(comm, model)
    first, last = (sum(comm.allgather(sum(part))) for part in (losses[:4], losses[-4:]))
    assert last < 0.8 * first


# ---- the worked example ----------------------------------------------------------------------

A = [.1, -.8, .3, .05, -.2, .6, -.05, .4]
B = [0, -.5, 0, .7, .1, 0, .2, -.1]


@two
def test_worked_example_of_push_and_pull(comm):
    """Two tensors of eight, an owner each: A's and B's push, then what A is told of B's shard."""
    pair = comm.Split(comm.rank // 2)
    if pair.size < 2:
        return
    spec = "dropping:rate=0.75,sample=exact,scope=layer,exchange=server"
    named, reducer, optimizer = make(pair, spec, parameters(theirs=8, mine=8), average=False,
                                     optimizer=lambda ps: torch.optim.SGD(ps, lr=0.1))
    # the bucket is in reverse order: rank 0 owns "mine", rank 1 owns "theirs"
    reducer.finish()  # compares the replicas and says nothing
    if pair.rank == 1:
        step(named, optimizer, [B, B])
    wait_for(pair, reducer)
    if pair.rank == 0:
        first = reducer.stats.sent
        step(named, optimizer, [A, A])
        # header, (1, -.8) and (5, .6) of the part that rank 1 owns
        assert reducer.stats.sent - first == 32 + 2 * 8
        np.testing.assert_allclose(named[0][1].detach(), [0, .13, 0, -.07, 0, 0, 0, 0], atol=1e-6)
        np.testing.assert_allclose(named[1][1].detach(), [0, .13, 0, -.07, 0, -.06, 0, 0],
                                   atol=1e-6)  # its own shard as it is
        owed = [.1, 0, .3, .05, -.2, 0, -.05, .4]
    else:
        owed = [0, 0, 0, 0, .1, 0, .2, -.1]
    wait_for(pair, reducer)
    if pair.rank == 1:  # the server keeps what it has not said
        shard = reducer.averager.link.exchange.shard
        kept = shard.latest - shard.given[0]
        np.testing.assert_allclose(kept, [0, 0, 0, 0, 0, -.06, 0, 0], atol=1e-6)
    reducer.deliver()
    for name in ("theirs", "mine"):
        np.testing.assert_allclose(reducer.state_dict()[f"error/{name}"], owed, atol=1e-6)
    assert identical(pair, named)


def wait_for(comm, reducer):
    """A barrier in which this rank serves its shard, also where it has no thread."""
    barrier = comm.Ibarrier()
    while not barrier.Test():
        reducer.averager.link.exchange.poll()
        time.sleep(1e-4)


# ---- bytes -----------------------------------------------------------------------------------


def test_bytes_of_pushes_and_pulls(comm):
    """dense: 32 + 4 n bytes of every other owner's part, and one's own part to every worker."""
    named, reducer, optimizer = make(comm, "dense:exchange=server")
    borders = equal_borders(Layout.of([("all", (N,))]), comm.size)
    sizes = np.diff(borders)
    own, others, steps = int(sizes[comm.rank]), comm.size - 1, 5
    for k in range(steps):
        step(named, optimizer, random_gradients(comm.rank, k, named))
    reducer.deliver()
    pushes = others * 32 + 4 * (N - own)
    pulls = others * (32 + 4 * own)
    stats = reducer.stats
    assert stats.calls["Isend"] == steps * (pushes + pulls) + others * 32
    assert stats.calls["Allgatherv"] == 4 * own
    assert stats.sent == sum(stats.calls.values())
    assert stats.received == stats.calls["Isend"] + 4 * (N - own)
    assert stats.dense == steps * 4 * N
    assert stats.reasons["deliver"] == 4 * own


@two
def test_a_sparse_push_is_cut_at_the_borders(comm):
    """8 bytes for each element sent, whoever owns it, and a header for each owner."""
    named, reducer, optimizer = make(comm, "strom:tau=0.5,exchange=server,thread=no")
    step(named, optimizer, [np.zeros(p.shape) for _, p in named])
    reducer.deliver()
    before, borders = reducer.stats.calls["Isend"], reducer.averager.link.exchange.borders
    gradient = whole_numbers(0, 0, N, most=1)
    if comm.rank == 0:
        named[0][1].grad = None
        at = 0
        for _, p in reversed(named):
            p.grad = torch.from_numpy(gradient[at:at + p.numel()]).reshape(p.shape)
            at += p.numel()
        optimizer.step()
        mine = np.abs(gradient[borders[0]:borders[1]]).sum()
        assert reducer.stats.calls["Isend"] - before == 32 * (comm.size - 1) + 4 * int(
            np.abs(gradient).sum() - mine)
    reducer.deliver()
    expected = -0.5 / comm.size * 0.5 * np.sign(gradient)
    np.testing.assert_allclose(flat(named), expected, atol=1e-6)


@pytest.mark.parametrize("compressor", [Strom(tau=0.5), Dropping(rate=0.7), Dropping(
    rate=0.7, scope="layer"), Residual(Strom(tau=0.5)), Strom(density=0.2)])
@pytest.mark.parametrize("borders", [[0, 100], [0, 7, 7, 50, 100], [0, 1, 99, 100]])
def test_parts_of_a_payload_say_what_the_whole_says(compressor, borders):
    layout, key = Layout.of([("a", (60,)), ("b", (8, 5))]), Key(0, 0, 0, 0)
    x = np.random.default_rng(0).normal(size=100).astype(np.float32)
    payload, state = np.zeros(compressor.capacity(layout), np.uint8), compressor.init(layout, x)
    compressor.measure(x, layout, state)
    used = compressor.encode(x, payload, layout, key, state)
    whole, parts = np.zeros(100, np.float32), np.zeros(100, np.float32)
    compressor.decode_add(payload[:used], whole, layout, key)
    assert compressor.can_split and whole.any()
    pieces = compressor.split(payload[:used], layout, borders)
    assert len(pieces) == len(borders) - 1
    for piece, a, b in zip(pieces, borders, borders[1:]):
        compressor.decode_add(piece, parts[a:b], part(layout, a, b), key)
    assert (parts == whole).all()
    assert not Strom(coding="rice").can_split and not Dropping(survivors="onebit").can_split


def test_a_part_keeps_whole_rows_together():
    layout = Layout.of([("a", (3,)), ("w", (4, 5)), ("k", (2, 3, 2))])
    assert [s.shape for s in part(layout, 0, 35).segments] == [(3,), (4, 5), (2, 3, 2)]
    assert [s.shape for s in part(layout, 1, 15).segments] == [(2,), (2, 5), (2,)]
    assert [s.shape for s in part(layout, 15, 29).segments] == [(3,), (1, 5), (1, 3, 2)]
    assert [s.shape for s in part(layout, 4, 7).segments] == [(3,)]
    assert [s.name for s in part(layout, 2, 4).segments] == ["a", "w"]
    assert not part(layout, 35, 35).segments


# ---- slow, late and ended ranks --------------------------------------------------------------


@two
def test_others_go_on_against_the_shard_of_a_rank_that_sleeps(comm):
    """Its thread applies their pushes and answers, as often as they like."""
    named, reducer, optimizer = make(comm, "dropping:rate=0.9,exchange=server", average=False)
    if not reducer.averager.link.exchange.threaded:
        return
    slow = comm.size - 1
    step(named, optimizer, random_gradients(comm.rank, 0, named))
    if comm.rank == slow:
        awake = time.monotonic() + 0.3
        for rank in range(slow):  # they are through while this rank is in its first step
            while not comm.Iprobe(rank):
                time.sleep(0.01)
            comm.recv(source=rank)
        time.sleep(max(0, awake - time.monotonic()))
        step(named, optimizer, random_gradients(comm.rank, 1, named))
    else:
        for k in range(1, 21):
            step(named, optimizer, random_gradients(comm.rank, k, named))
        comm.send(None, slow)
    reducer.flush()
    assert reducer.step == 21 and identical(comm, named)
    for i, (_, p) in enumerate(named):
        given = sum(random_gradients(rank, k, named)[i].astype(np.float64)
                    for rank in range(comm.size) for k in range(2 if rank == slow else 21))
        np.testing.assert_allclose(p.detach().numpy(), -0.5 * given, atol=2e-5)


@two
def test_without_a_thread_a_rank_serves_while_it_waits_and_from_hooks(comm):
    named, reducer, optimizer = make(comm, "dense:exchange=server,thread=no", average=False)
    assert not reducer.averager.link.exchange.threaded
    for k in range(5 + 3 * comm.rank):  # also in deliver()
        step(named, optimizer, [np.ones(p.shape) for _, p in named])
    reducer.deliver()
    total = sum(5 + 3 * rank for rank in range(comm.size))
    assert all((p == -0.5 * total).all() for _, p in named)


@two
def test_an_owner_that_does_not_answer_is_named(comm):
    named, reducer, optimizer = make(comm, "dense:exchange=server,thread=no")
    late = comm.size - 1
    step(named, optimizer, [np.ones(p.shape) for _, p in named])
    reducer.deliver()
    if comm.rank != late:
        with impatient(reducer), pytest.raises(
                StallError, match=rf"rank {comm.rank} waited 0.4 s .*for rank .*{late}"):
            step(named, optimizer, [np.ones(p.shape) for _, p in named])
    comm.Barrier()
    if comm.rank != late:
        optimizer.step()  # waits on
    reducer.deliver()
    assert identical(comm, named)


# ---- gradients that are not finite, and none at all ------------------------------------------


@pytest.mark.parametrize("spec", ["dense", "strom:tau=0.05", "onebit"])
def test_nonfinite_is_skipped_by_its_own_rank_alone(spec, comm):
    named, reducer, optimizer = make(comm, server(spec), nonfinite="skip", average=False)
    sick = comm.size - 1
    for k in range(6):
        gradients = random_gradients(comm.rank, k, named)
        if k == 3 and comm.rank == sick:
            gradients[1][2] = np.nan
        step(named, optimizer, gradients)
    assert reducer.stats.skipped == (comm.rank == sick) and reducer.step == 6
    reducer.flush()
    for i, (_, p) in enumerate(named):
        given = sum(random_gradients(rank, k, named)[i].astype(np.float64)
                    for rank in range(comm.size) for k in range(6) if (rank, k) != (sick, 3))
        np.testing.assert_allclose(p.detach().numpy(), -0.5 * given, atol=1e-5)


def test_nonfinite_raises_on_its_own_rank_and_names_it(comm):
    named, reducer, optimizer = make(comm, "strom:tau=0.05,exchange=server")
    sick = comm.size - 1
    gradients = random_gradients(comm.rank, 0, named)
    if comm.rank == sick:
        gradients[1][0] = np.inf
    errors = outcome(comm, lambda: step(named, optimizer, gradients))
    assert errors[:sick] == [None] * sick
    assert errors[sick].startswith("NonFiniteError") and f"rank {sick}: b)" in errors[sick]
    step(named, optimizer, random_gradients(comm.rank, 1, named))  # who catches it may go on
    reducer.deliver()
    assert reducer.step == 2 and identical(comm, named)


# ---- state -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [lambda ps: torch.optim.Adam(ps, lr=0.01),
                                  lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9)])
def test_save_load_and_go_on(kind, comm):
    """Residuals, momenta and step counts of the shard come back; alone it is the same bits."""
    named, reducer, optimizer = make(comm, "dropping:rate=0.9,exchange=server", optimizer=kind)
    straight, whole, other = make(comm, "dropping:rate=0.9,exchange=server", optimizer=kind)
    for k in range(10):
        step(named, optimizer, random_gradients(comm.rank, k, named))
    assert all("deliver()" in e for e in outcome(comm, reducer.state_dict))
    reducer.deliver()
    file = io.BytesIO()
    torch.save((reducer.state_dict(), optimizer.state_dict()), file)
    reducer.close()
    again = [(name, torch.nn.Parameter(p.detach().clone())) for name, p in named]
    again, loaded, optimizer = make(comm, "dropping:rate=0.9,exchange=server", again, kind)
    file.seek(0)
    state, of_optimizer = torch.load(file, weights_only=True)
    loaded.load_state_dict(state)
    optimizer.load_state_dict(of_optimizer)
    assert loaded.state_dict()["shard"]["pieces"] == state["shard"]["pieces"]
    for k in range(10, 20):
        step(again, optimizer, random_gradients(comm.rank, k, named))
    loaded.deliver()
    steps = [v["step"].item() for o in loaded.state_dict()["shard"]["optimizers"]
             for v in o["state"].values() if "step" in v]
    assert identical(comm, again) and set(steps) <= {20 * comm.size}
    if comm.size == 1:
        for k in range(20):
            step(straight, other, random_gradients(comm.rank, k, named))
        whole.deliver()
        assert (flat(again) == flat(straight)).all()


def test_a_shard_of_another_job_is_refused(comm):
    named, reducer, optimizer = make(comm, "strom:exchange=server")
    state = reducer.state_dict()
    state["shard"]["pieces"] = [["w", 0, 3]]
    assert all("as many ranks" in e for e in outcome(
        comm, lambda: reducer.load_state_dict(state)))


# ---- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize("spec, words", [
    ("terngrad:exchange=server", ["terngrad", "bounded"]),
    ("rule(onebit):exchange=server", ["rule", "peers"]),
    ("strom:exchange=server,adagrad=yes", ["adagrad", "sharded"]),
    ("strom:exchange=server,warmup=3", ["warmup=3"]), ("strom:thread=no", ["exchange=server"])])
def test_what_it_cannot_do(spec, words):
    with pytest.raises(SpecError) as caught:
        mpicomp.method(spec)
    assert all(word in str(caught.value) for word in words)


def test_specifications():
    for spec in SPECS:
        method = mpicomp.method(server(spec, thread="no"))
        assert not dict(method.options)["thread"] and mpicomp.method(repr(method)) == method


@pytest.mark.parametrize("attach, word", [
    (lambda r, ps: None, "attached optimizer"),
    (lambda r, ps: r.attach(torch.optim.LBFGS(ps)), "LBFGS"),
    (lambda r, ps: r.attach(torch.optim.SGD(ps[:1], lr=1)), "no attached optimizer has")])
def test_it_needs_an_optimizer_that_it_can_cut(attach, word, comm):
    named = parameters(w=4, b=2)
    reducer = mpicomp.Reducer(named, "strom:exchange=server", comm)
    attach(reducer, [p for _, p in named])
    assert word in same_error(comm, SpecError, reducer.finish)


def test_float32_only(comm):
    named = [("w", torch.nn.Parameter(torch.zeros(4, dtype=torch.bfloat16)))]
    _, reducer, optimizer = make(comm, "strom:exchange=server", named)
    assert "bfloat16" in same_error(comm, SpecError, reducer.finish)


@two
def test_a_wrong_push_names_its_sender(comm):
    """An index beyond the shard: nothing is applied, and the owner says whose it was."""
    named, reducer, optimizer = make(comm, "strom:tau=0.05,exchange=server,thread=no")
    step(named, optimizer, random_gradients(comm.rank, 0, named))
    if comm.rank:
        wait_for(comm, reducer)
    if comm.rank == 1:
        message = np.zeros(36, np.uint8)
        packet.Header(1, 0, reducer.averager.buckets.plan, 4).write(message)
        message[32:] = 255
        reducer.averager.link.exchange.post.comm.Send(message, 0, 0)
    if comm.rank == 0:
        with pytest.raises(PacketError, match="rank 1: "):
            wait_for(comm, reducer)
            while True:
                reducer.averager.link.exchange.poll()
        with pytest.raises(PacketError):
            reducer.finish()
