"""Said + owed = given: the seven systems over 100 steps, through every synchronous exchange."""

import numpy as np
import pytest
from exchange_laws import SHAPES, exchanged, joined, said_and_owed_is_given
from training import parameters

import mpicomp
from mpicomp import catalogue
from mpicomp.exchange import hierarchical

pytestmark = pytest.mark.mpi(sizes=(1, 3, 4))  # 2 would be 4 without the other node
STEPS = 100
OWING = {  # at least one of each system that has a residual
    "onebit": ["onebit", "onebit:min_rows=1", "onebit:bits=2,wire=cntk"],
    "dorefa": ["dorefa:feedback=yes"],
    "strom": ["strom:tau=0.05", "strom:density=0.05,coding=rice"],
    "dryden": ["dryden:proportion=16,min_rows=1", "dryden:version=2017,sample=20"],
    "dropping": ["dropping:rate=0.95", "dropping:rate=0.9,scope=layer,survivors=onebit"],
    "adacomp": ["adacomp:bin=20"],
    "chunks": ["chunks:k=4,block=40", "chunks:k=4,block=40,bits=8"],
    "topk": ["topk:density=0.1"],
    "block": ["block:size=32", "block:bits=4", "block:form=fp8"],
    "sign": ["sign", "sign:scope=row"],
    "qsgd": ["qsgd:bucket=64,feedback=yes"],
    "rule": ["rule(b:dense; ndim>2:adacomp; w:dropping:rate=0.9; onebit)"],
}
EXCHANGES = ["exchange=allgather", "exchange=sharded", "exchange=sharded,own=raw",
             "exchange=hierarchical"]


def specs():
    """The first configuration of a system in every exchange, the others where they are decoded
    by all and where they are quantised twice."""
    for listed in OWING.values():
        for number, spec in enumerate(listed):
            for options in EXCHANGES if number == 0 else EXCHANGES[:2]:
                yield joined(spec, options)
    yield "dorefa:feedback=yes,exchange=allreduce"
    yield "randomk:density=0.1"


@pytest.fixture(autouse=True)
def nodes_of_two(monkeypatch):
    """Ranks 0 and 1 on one node, 2 and 3 on the next: for exchange=hierarchical."""
    monkeypatch.setattr(hierarchical, "node_of", lambda comm: comm.Split(comm.rank // 2))


def test_all_seven_are_here():
    """TernGrad is the one that owes nothing; see below."""
    assert {*OWING, "terngrad"} >= {"terngrad", "onebit", "dorefa", "strom", "dryden", "dropping",
                                    "adacomp"}
    assert all(catalogue.method(spec).feedback for spec in specs() if not spec.startswith("rule"))


@pytest.mark.parametrize("spec", list(specs()))
def test_said_and_owed_is_given(spec, comm):
    state = said_and_owed_is_given(spec, comm, STEPS)
    assert {kind.split("/")[0] for kind in state} <= {"step", "error", "error2"}
    assert ("error2/w" in state) == ("sharded" in spec)


@pytest.mark.parametrize("exchange", ["allgather", "allreduce", "sharded", "hierarchical"])
def test_terngrad_owes_nothing_and_is_right_on_average(exchange, comm):
    """No residual: what 100 steps said differs from what was given by their noise alone.

    An element has a variance of at most s^2 / 4 a step, and again for each sender or stage.
    """
    named = parameters(**SHAPES)
    reducer = mpicomp.Reducer(named, f"terngrad:clip=0,exchange={exchange}", comm, average=False,
                              seed=3)
    given, applied, largest = exchanged(reducer, named, comm.rank, STEPS)
    assert reducer.state_dict().keys() == {"step"}
    for k in range(len(named)):
        total = sum(comm.allgather(given[k]))
        noise = largest * comm.size * np.sqrt(2 * STEPS) / 2
        assert np.abs(applied[k] - total).max() < 5 * noise
        assert np.abs(applied[k] - total).max() > 0
