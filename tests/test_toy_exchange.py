"""An exchange defined here by docs/adding-an-exchange.md: found by name, and held to the laws."""

import ast
from dataclasses import dataclass

import exchange_laws
import numpy as np
import pytest
from test_architecture import MODULES
from training import parameters, same_error

import mpicomp
from mpicomp.advice import predict
from mpicomp.advice.trial import Codec, Link
from mpicomp.compressor import option
from mpicomp.exchange import (
    Cost,
    Exchange,
    WholeBucket,
    exchanges,
    packet,
    register,
    registry,
)
from mpicomp.variants import listing


class PassedBucket(WholeBucket):
    """Headers and payloads of all ranks."""

    def __init__(self, exchange, *arguments):
        super().__init__(exchange, *arguments)
        ranks = exchange.wire.size
        self.header_box = np.zeros(ranks * packet.SIZE, np.uint8)
        self.inbox = np.zeros((ranks, self.codec.payload.size), np.uint8)
        self.payloads = []


@register
@dataclass(eq=False, repr=False)
class Passed(Exchange):
    """Every rank passes on what it has received to its neighbour, until all have all packets."""

    name = "passed"
    bucket = PassedBucket

    towards: str = option("next", "the neighbour that packets go to", choices=("next", "previous"))

    @classmethod
    def cost(cls, ranks):
        return Cost(packets=ranks - 1, calls=ranks, decodes=ranks)

    def run(self, bucket, step, flags):
        wire, codec, ranks = self.wire, bucket.codec, self.wire.size
        yield from self.agree(codec, flags)
        used = self.encode(codec, step, flags)
        yield [wire.allgather(1, codec.outbox[:packet.SIZE], bucket.header_box)]
        bucket.headers = self.read_headers(bucket.header_box,
                                           range(0, ranks * packet.SIZE, packet.SIZE))
        lengths = self.lengths(bucket.headers, [codec.payload.size] * ranks)
        bucket.inbox[wire.rank, :used] = codec.payload[:used]
        bucket.payloads = [bucket.inbox[rank, :length] for rank, length in enumerate(lengths)]
        way = 1 if self.towards == "next" else -1
        for turn in range(ranks - 1):
            held, comes = ((wire.rank - way * (turn + k)) % ranks for k in (0, 1))
            tag = bucket.index * ranks + turn
            yield [wire.receive(2, bucket.payloads[comes], (wire.rank - way) % ranks, tag),
                   wire.send(2, bucket.payloads[held], (wire.rank + way) % ranks, tag)]

    def decode(self, bucket, step, weight):
        keys = [bucket.codec.key(step, rank) for rank in range(self.wire.size)]
        bucket.codec.compressor.decode_sum(bucket.payloads, bucket.grad, bucket.layout, keys,
                                           weight)


def test_it_is_found():
    assert exchanges()["passed"] is Passed
    method = mpicomp.method("onebit:exchange=passed,towards=previous")
    assert method.carrier is Passed and dict(method.options) == {"towards": "previous"}
    assert repr(method).endswith("exchange=passed,towards=previous")
    assert mpicomp.method(repr(method)) == method != mpicomp.method("onebit:exchange=passed")
    assert not (method.asynchronous or method.owns or method.adagrad or method.unattended)


@pytest.mark.parametrize("spec, words", [
    ("onebit:exchange=passed,towards=up", "towards=up found, towards must be one of next"),
    ("onebit:towards=next", "towards belongs to exchange=passed, found exchange=allgather"),
    ("onebit:exchange=passed,staleness=4", "staleness belongs to exchange=peers"),
    ("onebit:exchange=past", "exchange=past found, there are: .*, passed")])
def test_what_is_wrong_is_said(spec, words):
    with pytest.raises(mpicomp.SpecError, match=words):
        mpicomp.method(spec)


def test_it_is_listed_with_its_options():
    assert "passed       Every rank passes on" in listing() and "towards=next:" in listing()


def test_its_cost_is_predicted():
    codec, links = Codec(1e-9, 2e-9, 1.0), {"gather": Link(1e-3, 1e-9)}
    found = predict(mpicomp.method("onebit:exchange=passed"), codec, links, 1000, 4)
    assert found.wire == pytest.approx(4e-3 + 3e-6) and found.decode == pytest.approx(8e-6)


def compared(path):
    """(line, text) of the exchanges' names that a file compares a method's exchange with."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Compare) and ast.unparse(node.left).split(".")[-1] == "exchange":
            yield from ((node.lineno, c.value) for c in ast.walk(node)
                        if isinstance(c, ast.Constant) and c.value in exchanges())


def test_nobody_outside_of_the_folder_knows_an_exchange_by_its_name(tmp_path):
    found = {str(path): list(compared(path)) for path in MODULES if path.parent.name != "exchange"}
    assert not {path: names for path, names in found.items() if names}
    source = tmp_path / "a.py"
    source.write_text("x = method.exchange in ('peers', 'server') or exchange == 'sharded'\n")
    assert [name for _, name in compared(source)] == ["peers", "server", "sharded"]


@pytest.fixture
def own_registry(monkeypatch):
    """What is registered in this test is gone after it."""
    monkeypatch.setattr(registry, "_REGISTRY", exchanges())


def test_names_and_options_are_held_apart(own_registry):
    with pytest.raises(mpicomp.SpecError, match="two exchanges are called 'passed'"):
        register(type("Other", (Passed,), {"name": "passed"}))
    with pytest.raises(mpicomp.SpecError, match="write @dataclass"):
        register(type("Bare", (Exchange,), {"name": "bare", "way": option(1, "a way")}))

    @register
    @dataclass(eq=False, repr=False)
    class Clash(Passed):
        name = "clash"
        bits: int = option(1, "the name of an option of onebit")

    assert mpicomp.method("dense:exchange=clash,bits=3").carrier is Clash
    with pytest.raises(mpicomp.SpecError, match="bits is an option of the method and of exchange="):
        mpicomp.method("onebit:exchange=clash")


@pytest.mark.mpi
def test_one_without_delay_or_warmup_or_rows_is_refused(comm, own_registry):
    @register
    class Plain(Passed):
        name = "plain"
        lacks = dict.fromkeys(("delay", "warmup", "sparse"), "it is too plain")

    for value in ("delay=1", "warmup=3"):
        with pytest.raises(mpicomp.SpecError, match=f"{value} found, .* has no .*: it is too plai"):
            mpicomp.method(f"onebit:exchange=plain,{value}")
    named = parameters(w=(4, 3))
    assert "sparse= needs a synchronous exchange" in same_error(
        comm, mpicomp.SpecError,
        lambda: mpicomp.Reducer(named, "dense:exchange=plain", comm, sparse=["w"]))


@pytest.mark.mpi
@pytest.mark.parametrize("law", exchange_laws.LAWS)
@pytest.mark.parametrize("exchange", ["passed", "sharded"])  # and one of ours
def test_it_obeys_the_laws(law, exchange, comm):
    law(exchange, comm)


@pytest.mark.mpi
def test_the_other_way_round(comm):
    exchange_laws.sums_are_exact("passed,towards=previous", comm)


@pytest.mark.mpi
def test_a_delayed_step_and_a_warm_up_go_through_it(comm):
    for more in ("delay=1", "warmup=2"):
        named = parameters(w=(8, 4))
        reducer = mpicomp.Reducer(named, f"onebit:exchange=passed,{more}", comm)
        for _ in range(4):
            (named[0][1] * 2.0).sum().backward()
            reducer.finish()
            named[0][1].grad = None
        reducer.deliver()
