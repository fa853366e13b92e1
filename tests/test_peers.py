"""exchange=peers: nobody waits for all, nothing is lost or applied twice, and it adds up."""

import time
from collections import Counter

import numpy as np
import pytest
import torch
from training import give, impatient, outcome, parameters, train, whole_numbers

import mpicomp
from mpicomp import MismatchError, PacketError, SpecError, StallError
from mpicomp.exchange import exchanges
from mpicomp.transport import packet

pytestmark = pytest.mark.mpi
two = pytest.mark.mpi(min_size=2)
SPECS = ["dense", "onebit", "strom:tau=0.05", "dropping:rate=0.9", "strom:tau=0.05,coding=rice",
         "strom:density=0.1", "adacomp", "dryden:proportion=8", "bf16:feedback=yes",
         "rule(*.bias:dense; w:strom:tau=0.02; onebit)"]
SHAPES = dict(w=(40, 5), b=(40,), k=(5, 2, 3), s=())


def peers(spec, **options):
    """The specification with exchange=peers behind it."""
    told = ",".join(f"{key}={value}" for key, value in dict(exchange="peers", **options).items())
    return f"{spec}{',' if ':' in spec.rpartition(')')[2] else ':'}{told}"


def sgd(named, lr=0.5):
    return torch.optim.SGD([p for _, p in named], lr=lr)


def make(comm, spec, named=None, optimizer=True, **keywords):
    """(named parameters, Reducer, optimizer) over several buckets."""
    named = named or parameters(**SHAPES)
    reducer = mpicomp.Reducer(named, spec, comm, **{"bucket_bytes": 500, **keywords})
    optimizer = sgd(named) if optimizer else None
    if optimizer:
        reducer.attach(optimizer)
    return named, reducer, optimizer


def step(named, optimizer, gradients):
    optimizer.zero_grad()
    give(named, gradients)
    optimizer.step()


def random_gradients(rank, step, named):
    rng = np.random.default_rng([rank, step])
    return [(0.05 * rng.normal(size=p.shape)).astype(np.float32) for _, p in named]


# ---- the sum --------------------------------------------------------------------------------


@pytest.mark.parametrize("spec, average, staleness", [
    *((spec, False, 4) for spec in SPECS), ("strom:tau=0.05", True, 0), ("strom:tau=0.05", True, 1),
    ("dropping:rate=0.9", True, 0), ("dropping:rate=0.9", True, 4)])
def test_after_flush_all_that_was_given_was_applied_everywhere(spec, average, staleness, comm):
    """parameters = start - lr * (sum of all gradients, / P if average); nothing is owed.

    Each rank adds in its own order, and each of 100 steps rounds.
    """
    named, reducer, optimizer = make(comm, peers(spec, staleness=staleness), average=average)
    steps = 100
    for k in range(steps):
        step(named, optimizer, random_gradients(comm.rank, k, named))
        if comm.rank == k % comm.size:
            time.sleep(0.0005 * (k % 3))  # ranks drift apart
    reducer.flush()
    optimizer.step()
    weight = 1 / comm.size if average else 1
    given = [sum(sum(random_gradients(rank, k, named)[i].astype(np.float64)
                     for k in range(steps)) for rank in range(comm.size))
             for i in range(len(named))]
    for total, (_, p) in zip(given, named):
        largest = 0.5 * max(1, np.abs(total).max()) * 8
        bound = steps * (comm.size + 2) * 4 * 2.0**-24 * largest
        np.testing.assert_allclose(p.detach().numpy(), -0.5 * weight * total, rtol=0, atol=bound)
    state = reducer.state_dict()
    assert state.pop("step") == steps and not any(v.any() for v in state.values())


@pytest.mark.parametrize("spec", ["dense", "onebit", "strom:tau=0.05", "dropping:rate=0.9"])
def test_deliver_applies_all_that_was_said(spec, comm):
    """What all ranks owe makes up the difference to the sum of all gradients, as ever."""
    named, reducer, optimizer = make(comm, peers(spec), average=False)
    for k in range(30):
        step(named, optimizer, random_gradients(comm.rank, k, named))
    reducer.deliver()
    state = reducer.state_dict()
    for i, (name, p) in enumerate(named):
        owed = state.get(f"error/{name}", torch.zeros(p.shape)).double().numpy()
        owed = sum(comm.allgather(owed))
        given = sum(random_gradients(rank, k, named)[i].astype(np.float64)
                    for rank in range(comm.size) for k in range(30))
        np.testing.assert_allclose(p.detach().numpy() / -0.5 + owed, given, rtol=0, atol=2e-4)


@pytest.mark.parametrize("spec", ["dense", "onebit", "strom:tau=0.02", "dropping:rate=0.9",
                                  "bf16", "onebit:warmup=3", "dryden:proportion=8", "adacomp"])
def test_lock_step_is_allgather_to_the_bit(spec, comm):
    """staleness=0: packets of this step, of all ranks, in rank order; momentum and all."""
    expected, _ = train(f"{spec}{',' if ':' in spec else ':'}exchange=allgather", comm, steps=12)
    model, _ = train(peers(spec, staleness=0), comm, steps=12)
    for p, q in zip(model.parameters(), expected.parameters()):
        assert torch.equal(p, q)


@pytest.mark.parametrize("spec", ["terngrad", "terngrad:packing=int8", "dorefa", "fp16", "dense"])
def test_every_compressor_travels(spec, comm):
    """Scales that ranks would agree on are each rank's own; whole numbers add up exactly."""
    named, reducer, _ = make(comm, peers(spec), optimizer=False, average=False)
    give(named, [np.full(p.shape, 2.0 * (comm.rank + 1)) for _, p in named])
    reducer.finish()
    said = [p.grad.clone() for _, p in named]
    reducer.deliver()
    for before, (_, p) in zip(said, named):
        rest = 0 if p.grad is None else p.grad
        assert (before + rest == comm.size * (comm.size + 1)).all()


@pytest.mark.parametrize("spec", ["strom:tau=0.02", "onebit", "dense"])
def test_training_learns(spec, comm):
    torch.manual_seed(0)
    _, losses = train(peers(spec), comm, steps=40)
    first, last = (sum(comm.allgather(sum(part))) for part in (losses[:4], losses[-4:]))
    assert last < 0.7 * first


def test_worked_example_of_strom_on_two_ranks(comm):
    """tau = 1, strict: what each rank says, keeps and applies, step by step, by hand."""
    pair = comm.Split(comm.rank // 2)
    if pair.size < 2:
        return
    mine = [[[.4, 2.6, -1.2, 0, -.9, 1.0], [.7, .1, -.3, .2, -.3, .1], [0] * 6],
            [[1.5, 1.5, 0, -2, 0, 0], [0] * 6, [0] * 6]][pair.rank]
    named, reducer, _ = make(pair, "strom:tau=1,exchange=peers,staleness=0", parameters(w=6),
                             optimizer=False, average=False)
    words = [[2, 4, 0], [3, 0, 0]]  # 3 4, then 1 3 8 11; of B 1 3 6: the -1 it keeps is not beyond
    applied, sent = [[1, 2, -1, -1, 0, 0], [1, 1, 0, 0, -1, 1], [0] * 6], []
    for gradient, expected in zip(mine, applied):
        named[0][1].grad = None
        give(named, [gradient])
        reducer.finish()
        assert named[0][1].grad.tolist() == expected
        sent.append(reducer.stats.last["sent"])
    assert sent == [32 + 4 * count for count in words[pair.rank]]
    reducer.deliver()
    owed = [[.1, .7, -.5, .2, -.2, .1], [.5, .5, 0, -1, 0, 0]][pair.rank]
    np.testing.assert_allclose(reducer.state_dict()["error/w"], owed, atol=1e-6)


# ---- bytes and memory -----------------------------------------------------------------------


@pytest.mark.parametrize("bucket_bytes, buckets", [(500, 2), (1 << 20, 1)])
def test_a_message_for_each_bucket_and_other_rank(bucket_bytes, buckets, comm):
    """32 bytes and the payload, P - 1 times; all of it is received once deliver() returns."""
    named, reducer, optimizer = make(comm, "onebit:exchange=peers", bucket_bytes=bucket_bytes)
    # w: five columns of 40; b: one; k is 5 rows, one column of 30; s: one element
    payload = 5 * (8 + 8) + (8 + 8) + (8 + 4) + (8 + 4)
    others = comm.size - 1
    for k in range(7):
        step(named, optimizer, random_gradients(comm.rank, k, named))
    stats = reducer.stats
    assert len(reducer.averager.buckets) == buckets
    assert stats.sent == stats.calls["Isend"] == 7 * others * (buckets * 32 + payload)
    reducer.deliver()
    assert stats.sent == 7 * others * (buckets * 32 + payload) + others * 32
    assert stats.received == stats.sent and +stats.reasons == +Counter(onebit=stats.sent)
    assert set(+stats.calls) <= {"Isend"}, "no collective"


def test_a_length_that_the_data_tell(comm):
    named, reducer, optimizer = make(comm, "strom:tau=0.5,exchange=peers,feedback=no")
    gradients = [whole_numbers(comm.rank, 0, p.numel(), most=1) for _, p in named]
    step(named, optimizer, gradients)
    used = 4 * sum(int(np.abs(g).sum()) for g in gradients)
    others = comm.size - 1
    assert reducer.stats.sent == others * (32 * len(reducer.averager.buckets) + used)


def test_memory_is_bounded_by_the_staleness(comm):
    """Blocks of messages are used again: at most 2 * staleness + 2 of a bucket and rank live."""
    named, reducer, optimizer = make(comm, "dense:exchange=peers,staleness=2")
    for k in range(30):
        step(named, optimizer, random_gradients(comm.rank, k, named))
        if comm.rank == 0:
            time.sleep(0.001)
    reducer.deliver()
    post, buckets = reducer.averager.link.exchange.post, len(reducer.averager.buckets)
    assert post.blocks <= buckets * comm.size * (2 * 2 + 2) + 2 * comm.size
    assert sum(map(len, post._free.values())) == post.blocks, "all of them came back"


# ---- slow, late and ended ranks --------------------------------------------------------------


@two
@pytest.mark.parametrize("staleness", [0, 1, 4])
def test_nobody_is_further_ahead_than_the_staleness(staleness, comm):
    """The last rank is slow: the others take `staleness` steps beyond it, and then wait."""
    spec = f"strom:tau=0.05,exchange=peers,staleness={staleness}"
    named, reducer, optimizer = make(comm, spec)
    slow = comm.size - 1
    step(named, optimizer, random_gradients(comm.rank, 0, named))  # compares the replicas
    reducer.deliver()
    if comm.rank == slow:  # begins when the others have said that they are that far ahead
        for rank in range(slow):
            comm.recv(source=rank)
        time.sleep(0.2)
    begin, ends = time.monotonic(), []
    for k in range(1, 10):
        if k == staleness + 1 and comm.rank != slow:
            comm.send(None, slow)
        step(named, optimizer, random_gradients(comm.rank, k, named))
        ends.append(time.monotonic())
    begin = comm.bcast(begin, slow)
    if comm.rank != slow:
        assert sum(end < begin for end in ends) == staleness
    reducer.flush()
    optimizer.step()
    for i, (_, p) in enumerate(named):
        given = sum(random_gradients(rank, k, named)[i].astype(np.float64)
                    for rank in range(comm.size) for k in range(10))
        np.testing.assert_allclose(p.detach().numpy(), -0.5 * given / comm.size, atol=1e-5)


@two
def test_ranks_may_make_different_numbers_of_steps(comm):
    """A rank in deliver() holds nobody back; afterwards all go on from the same step."""
    named, reducer, optimizer = make(comm, "dense:exchange=peers,staleness=1", average=False)
    mine = 3 + 5 * comm.rank
    for k in range(mine):
        step(named, optimizer, [np.ones(p.shape) for _, p in named])
    reducer.deliver()
    total = sum(3 + 5 * rank for rank in range(comm.size))
    assert all((p == -0.5 * total).all() for _, p in named)
    assert reducer.step == 3 + 5 * (comm.size - 1) == reducer.state_dict()["step"]
    step(named, optimizer, [np.ones(p.shape) for _, p in named])
    reducer.deliver()
    assert all((p == -0.5 * (total + comm.size)).all() for _, p in named)


@two
def test_a_silent_rank_is_named_and_may_come_after_all(comm):
    spec = "dense:exchange=peers,staleness=1"
    named, reducer, optimizer = make(comm, spec, average=False)
    late = comm.size - 1
    step(named, optimizer, [np.ones(p.shape) for _, p in named])
    if comm.rank != late:
        step(named, optimizer, [np.ones(p.shape) for _, p in named])
        with impatient(reducer), pytest.raises(
                StallError, match=rf"rank {comm.rank} waited 0.4 s .*for rank .*{late}:"):
            step(named, optimizer, [np.ones(p.shape) for _, p in named])
    comm.Barrier()
    if comm.rank == late:
        for _ in range(2):
            step(named, optimizer, [np.ones(p.shape) for _, p in named])
    else:
        optimizer.step()
    reducer.deliver()
    assert all((p == -0.5 * 3 * comm.size).all() for _, p in named)


@two
def test_deliver_names_who_does_not_come(comm):
    named, reducer, optimizer = make(comm, "dense:exchange=peers")
    late = comm.size - 1
    if comm.rank != late:
        with impatient(reducer), pytest.raises(
                StallError, match=rf"in deliver\(\) for rank .*{late}: "):
            reducer.deliver()
    comm.Barrier()


# ---- gradients that are not finite, and none at all ------------------------------------------


@pytest.mark.parametrize("spec", ["dense", "strom:tau=0.05", "onebit"])
def test_nonfinite_is_skipped_by_its_own_rank_alone(spec, comm):
    """The others go on; in the end everything but that gradient was applied everywhere."""
    named, reducer, optimizer = make(comm, peers(spec), nonfinite="skip", average=False,
                                     bucket_bytes=1 << 20)
    sick = comm.size - 1
    for k in range(6):
        gradients = random_gradients(comm.rank, k, named)
        if k == 3 and comm.rank == sick:
            gradients[1][2] = np.nan
        step(named, optimizer, gradients)
    assert reducer.stats.skipped == (comm.rank == sick) and reducer.step == 6
    reducer.flush()
    optimizer.step()
    for i, (_, p) in enumerate(named):
        given = sum(random_gradients(rank, k, named)[i].astype(np.float64)
                    for rank in range(comm.size) for k in range(6) if (rank, k) != (sick, 3))
        np.testing.assert_allclose(p.detach().numpy(), -0.5 * given, atol=1e-5)


def test_nonfinite_raises_on_its_own_rank_and_names_it(comm):
    named, reducer, optimizer = make(comm, "strom:tau=0.05,exchange=peers")
    sick = comm.size - 1
    gradients = random_gradients(comm.rank, 0, named)
    if comm.rank == sick:
        gradients[1][0] = np.inf
    errors = outcome(comm, lambda: step(named, optimizer, gradients))
    assert errors[:sick] == [None] * sick
    assert errors[sick].startswith("NonFiniteError") and f"rank {sick}: b)" in errors[sick]
    step(named, optimizer, random_gradients(comm.rank, 1, named))  # who catches it may go on
    reducer.deliver()
    assert reducer.step == 2


def test_a_rank_without_examples_says_nothing(comm):
    named, reducer, optimizer = make(comm, "onebit:exchange=peers", average=False)
    idle = comm.size - 1
    for k in range(4):
        optimizer.zero_grad()
        if comm.rank != idle or comm.size == 1:
            give(named, random_gradients(comm.rank, k, named))
        optimizer.step()
    reducer.flush()
    optimizer.step()
    ranks = [rank for rank in range(comm.size) if rank != idle or comm.size == 1]
    for i, (_, p) in enumerate(named):
        given = sum(random_gradients(rank, k, named)[i].astype(np.float64)
                    for rank in ranks for k in range(4))
        np.testing.assert_allclose(p.detach().numpy(), -0.5 * given, atol=1e-5)
    others = comm.size - 1
    if comm.rank == idle and others:
        assert reducer.stats.calls["Isend"] == others * 32 * (4 * len(reducer.averager.buckets) + 1)


# ---- state -----------------------------------------------------------------------------------


@two
def test_state_is_refused_while_packets_are_under_way(comm):
    named, reducer, optimizer = make(comm, "strom:tau=0.05,exchange=peers")
    assert reducer.state_dict()["step"] == 0
    step(named, optimizer, random_gradients(comm.rank, 0, named))
    text = outcome(comm, reducer.state_dict)
    assert all(t.startswith("MismatchError") and "reducer.deliver()" in t for t in text)
    reducer.deliver()
    assert reducer.state_dict()["step"] == 1


def test_deliver_in_the_middle_of_a_step_is_refused(comm):
    named, reducer, _ = make(comm, "strom:tau=0.05,exchange=peers")
    give(named, random_gradients(comm.rank, 0, named))
    assert "middle of a step" in outcome(comm, reducer.deliver)[comm.rank]


def test_save_load_and_go_on(comm):
    """After deliver and flush the law holds over both halves, in a new Reducer."""
    named, reducer, optimizer = make(comm, "strom:tau=0.05,exchange=peers", average=False)
    for k in range(10):
        step(named, optimizer, random_gradients(comm.rank, k, named))
    reducer.deliver()
    state = reducer.state_dict()
    mpicomp.broadcast_parameters([(name, p.data) for name, p in named], comm)
    again = [(name, torch.nn.Parameter(p.detach().clone())) for name, p in named]
    reducer.close()
    named, reducer, optimizer = make(comm, "strom:tau=0.05,exchange=peers", again, average=False)
    reducer.load_state_dict(state)
    for k in range(10, 20):
        step(named, optimizer, random_gradients(comm.rank, k, named))
    reducer.flush()
    optimizer.step()
    for i, (_, p) in enumerate(named):
        given = sum(random_gradients(rank, k, named)[i].astype(np.float64)
                    for rank in range(comm.size) for k in range(20))
        np.testing.assert_allclose(p.detach().numpy(), -0.5 * given, atol=2e-5)
    assert reducer.step == 20


@two
def test_states_of_different_steps_are_noticed(comm):
    named, reducer, optimizer = make(comm, "dense:exchange=peers,staleness=0")
    reducer.load_state_dict({"step": 5 if comm.rank == comm.size - 1 else 7})
    errors = outcome(comm, lambda: step(named, optimizer,
                                        [np.ones(p.shape) for _, p in named]))
    assert len(set(errors)) == 1 and errors[0].startswith("MismatchError")
    assert f"differ in step: 7 on rank{'s'[:comm.size > 2]} 0" in errors[0]


# ---- messages that are not right ------------------------------------------------------------


def forged(reducer, **changes):
    """The bytes of a message for bucket 0 that would be right but for these fields."""
    right = dict(step=reducer.step, bucket=0, plan=reducer.averager.buckets.plan, length=8)
    message = np.zeros(40, np.uint8)
    packet.Header(**{**right, **changes}).write(message)
    return message


@two
@pytest.mark.parametrize("changes, words", [
    (dict(plan=1), ["plan digest 1"]), (dict(bucket=2), ["bucket 2", "0 expected"]),
    (dict(step=3), ["step 3", "1 expected"]), (dict(length=9), ["length 9", "8 expected"])])
def test_a_wrong_header_names_its_sender(changes, words, comm):
    named, reducer, optimizer = make(comm, "strom:tau=0.05,exchange=peers")
    step(named, optimizer, random_gradients(comm.rank, 0, named))
    reducer.deliver()
    if comm.rank == 1:
        reducer.averager.link.exchange.post.comm.Send(forged(reducer, **changes), 0, 0)
    if comm.rank == 0:
        with pytest.raises(MismatchError, match="rank 1 sent") as caught:
            while True:
                reducer.averager.link.exchange.poll()
        assert all(word in str(caught.value) for word in words), caught.value
        with pytest.raises(MismatchError):  # whoever looks next hears of it as well
            reducer.averager.link.exchange.poll()


@two
def test_what_is_no_packet_names_its_sender(comm):
    named, reducer, _ = make(comm, "strom:tau=0.05,exchange=peers")
    if comm.rank == 1:
        reducer.averager.link.exchange.post.comm.Send(np.zeros(40, np.uint8), 0, 0)
    if comm.rank == 0:
        with pytest.raises(PacketError, match="rank 1: not a packet"):
            while True:
                reducer.averager.link.exchange.poll()


# ---- specifications --------------------------------------------------------------------------


def test_specifications():
    for spec in SPECS:
        method = mpicomp.method(peers(spec, staleness=2))
        assert dict(method.options)["staleness"] == 2 and mpicomp.method(repr(method)) == method
    for wrong, word in (("strom:exchange=peers,staleness=-1", "at least 0"),
                        ("strom:staleness=2", "exchange=peers"),
                        ("strom:exchange=peers,adagrad=yes", "sharded"),
                        ("strom:exchange=pears", "peers")):
        with pytest.raises(SpecError, match=word):
            mpicomp.method(wrong)


@pytest.mark.parametrize("name", [n for n, cls in exchanges().items()
                                  if not cls.asynchronous and n != "silent"])
def test_deliver_is_nothing_for_the_others(name, comm):
    named, reducer, optimizer = make(comm, f"dense:exchange={name}")
    step(named, optimizer, random_gradients(comm.rank, 0, named))
    before = [p.tolist() for _, p in named]
    reducer.deliver()
    assert [p.tolist() for _, p in named] == before and reducer.state_dict()["step"] == 1
