"""Specifications: what they mean, that they round-trip, and what a wrong one is told."""

import numpy as np
import pytest

import mpicomp
from mpicomp import SpecError, method
from mpicomp.compressors import Dense, OneBit, Residual, Strom, TernGrad
from mpicomp.compressors.registry import from_spec, register, registry
from mpicomp.exchange import exchanges

GOOD = ["dense", "fp16", "bf16", "terngrad", "onebit", "strom", "strom:tau=0.5", "onebit:wire=cntk",
        "strom:tau=1e-05,strict=no", "terngrad:packing=planar,clip=0", "dense:exchange=allgather",
        "terngrad:exchange=allreduce", "terngrad:exchange=allreduce,packing=int16",
        "onebit:feedback=no", "fp16:feedback=yes,exchange=sharded", "onebit:warmup=10",
        "onebit:exchange=sharded,own=raw,adagrad=yes", "strom:exchange=silent",
        "strom:exchange=peers", "strom:exchange=peers,staleness=0", "strom:exchange=server",
        "onebit:exchange=server,thread=no", "onebit:delay=1"]


@pytest.mark.parametrize("spec", GOOD)
def test_repr_is_the_specification(spec):
    m = method(spec)
    assert method(repr(m)) == m and repr(method(repr(m))) == repr(m) and method(m) is m
    assert hash(method(repr(m))) == hash(m)


def test_every_listed_method_exists_and_explains_itself():
    listed = mpicomp.methods()
    assert {"dense", "fp16", "bf16", "terngrad", "onebit", "strom"} <= set(listed)
    for name, summary in listed.items():
        assert summary and "\n" not in summary, name
        assert name == method(name).name == repr(method(name)).split(":")[0].split("(")[0]


def test_defaults_are_those_of_the_papers():
    assert method("strom").compressor == Residual(Strom(tau=0.01, strict=True))
    assert method("onebit").compressor == Residual(OneBit(wire="means", min_rows=32))
    assert method("terngrad").compressor == TernGrad(clip=2.5, packing="2bit")
    assert method("dense") == mpicomp.Method("dense", Dense(), "allreduce")
    assert [method(name).feedback for name in ("onebit", "strom", "terngrad", "dense")] == \
        [True, True, False, False]


def test_the_options_of_an_exchange_from_python():
    """A dict, of texts or values, in any order; what is not given has its default."""
    one = mpicomp.Method("dense", Dense(), "sharded", {"adagrad": True})
    assert one == method("dense:exchange=sharded,adagrad=yes,own=quantised")
    assert dict(one.options) == {"own": "quantised", "adagrad": True} and one.adagrad
    with pytest.raises(SpecError, match="dense has no option 'wings'"):
        mpicomp.Method("dense", Dense(), "sharded", {"wings": 2})
    with pytest.raises(SpecError, match="staleness belongs to exchange=peers, found exchange=all"):
        mpicomp.Method("dense", Dense(), "allreduce", {"staleness": 4})


def test_what_a_method_says_of_its_exchange():
    """So that nobody has to know exchanges by their names."""
    server, peers = method("strom:exchange=server"), method("strom:exchange=peers")
    assert server.asynchronous and server.owns and not server.adagrad
    assert method("strom:exchange=server,thread=no").unattended
    assert peers.asynchronous and not peers.owns and not peers.unattended
    assert not method("strom").asynchronous and not method("strom").unattended


def test_allreduce_chooses_codes_that_can_be_added():
    assert method("terngrad:exchange=allreduce").compressor.packing == "int8"
    assert method("terngrad:exchange=allreduce,packing=int16").compressor.packing == "int16"


@pytest.mark.parametrize("spec", [" strom : tau = 0.5 ", "strom:tau=0.5,", "strom:,tau=.5",
                                  "strom:tau=5e-1,strict=yes", "strom:strict=TRUE,tau=0.5"])
def test_blanks_and_order_do_not_matter(spec):
    assert method(spec) == method("strom:tau=0.5")


def test_blanks_behind_the_bracket_of_a_rule_do_not_matter():
    expected = method("rule(*.bias:dense; onebit):exchange=sharded")
    for spec in ("rule(*.bias:dense; onebit) : exchange = sharded",
                 " rule( *.bias : dense ; onebit ): exchange=sharded "):
        assert method(spec) == expected
    assert from_spec("residual(onebit) ") == from_spec("residual(onebit)")


def test_numbers_from_python_are_taken_for_what_they_are():
    assert Strom(tau=1) == Strom(tau=1.0) == from_spec("strom:tau=1") == Strom(tau=np.float32(1))
    assert repr(Strom(tau=1)) == repr(Strom(tau=np.float64(1)))
    assert repr(Strom(tau=1)).startswith("strom:tau=1.0,strict=yes")
    assert OneBit(min_rows=np.int64(5)) == OneBit(min_rows=5)


WRONG = [  # specification, what the error must name
    ("nope", ["'nope'", *GOOD[:6]]),
    ("Strom", ["'Strom'", "strom"]),
    ("", ["''", "dense"]),
    ("residual(onebit)", ["residual(onebit)", "onebit"]),
    ("strom:foo=1", ["strom", "'foo'", "tau", "strict", "exchange", "feedback"]),
    ("dense:tau=1", ["dense", "'tau'", "exchange"]),
    ("strom:tau", ["option=value", "'tau'"]),
    ("strom:tau=", ["option=value"]),
    ("strom:=1", ["option=value"]),
    ("strom:tau=1,tau=2", ["'tau'", "twice"]),
    ("strom:tau=much", ["tau=much", "a number", "threshold"]),
    ("strom:tau=0", ["tau=0"]),
    ("strom:tau=-1", ["tau=-1"]),
    ("strom:tau=nan", ["tau=nan"]),
    ("strom:tau=inf", ["tau=inf"]),
    ("strom:tau=1e39", ["tau=1e+39"]),
    ("strom:tau=1e-50", ["tau=1e-50"]),
    ("strom:strict=perhaps", ["strict=perhaps", "yes or no"]),
    ("terngrad:clip=-1", ["clip=-1", "0"]),
    ("terngrad:packing=3bit", ["packing=3bit", "2bit", "planar", "int8", "int16"]),
    ("onebit:min_rows=0", ["min_rows=0", "1"]),
    ("onebit:min_rows=2.5", ["min_rows=2.5", "whole number"]),
    ("onebit:wire=", ["option=value"]),
    ("onebit:wire=lbann", ["wire=lbann", "means", "cntk"]),
    ("onebit:exchange=pigeon", ["exchange=pigeon", *exchanges()]),
    ("onebit:exchange=allreduce", ["onebit", "add", "allgather"]),
    ("terngrad:exchange=allreduce,packing=2bit", ["terngrad", "add", "allgather"]),
    ("terngrad:feedback=yes", ["terngrad", "bounded"]),
    ("onebit:warmup=-1", ["warmup=-1"]),
    ("onebit:own=raw", ["own", "sharded"]),
    ("onebit:adagrad=yes", ["adagrad", "sharded"]),
    # at their default values, too
    ("onebit:own=quantised", ["own", "exchange=sharded,own=quantised", "exchange=allgather"]),
    ("onebit:adagrad=no", ["adagrad", "exchange=sharded,adagrad=no"]),
    ("onebit:staleness=4", ["staleness", "exchange=peers,staleness=4", "exchange=allgather"]),
    ("onebit:thread=yes", ["thread", "exchange=server,thread=yes"]),
    ("onebit:exchange=peers,thread=yes", ["thread", "exchange=server", "found exchange=peers"]),
    ("rule(*.bias:dense:staleness=4; onebit)", ["staleness=4", "behind the bracket"]),
    ("onebit:exchange=peers,staleness=soon", ["staleness=soon", "a whole number"]),
    ("auto:exchange=sharded", ["auto", "exchange=sharded", "no options"]),
    ("auto:warmup=3", ["warmup=3", "no options"]),
    ("rule(last<=2:auto; onebit)", ["'auto'", "whole model"]),
    ("rule(*.bias:dense; auto)", ["'auto'", "whole model"]),
    (7, ["7", "text"]),
    (None, ["None", "text"]),
]


@pytest.mark.parametrize("spec, words", WRONG, ids=[repr(spec) for spec, _ in WRONG])
def test_a_wrong_method_is_told_what_exists(spec, words):
    with pytest.raises(SpecError) as caught:
        method(spec)
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, mpicomp.MpicompError)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("spec, words", [
    ("nope", ["'nope'", "bf16", "dense", "residual", "terngrad"]),
    ("residual", ["residual(another compressor)"]),
    ("residual()", ["''", "dense"]),
    ("residual(nope)", ["'nope'", "dense"]),
    ("residual(onebit", ["bracket is not closed"]),
    ("residual(onebit))", ["'onebit)'"]),
    ("residual(onebit)tau=1", ["':' expected"]),
    ("residual(onebit):tau=1", ["residual", "'tau'"]),
    ("residual(residual(onebit))", ["residual", "bounded"]),
    ("residual(terngrad)", ["terngrad", "bounded"]),
    ("dense(onebit)", ["dense, no bracket"]),
    ("onebit:exchange=allgather", ["onebit", "'exchange'", "wire"]),
], ids=repr)
def test_a_wrong_compressor_is_told_what_exists(spec, words):
    with pytest.raises(SpecError) as caught:
        from_spec(spec)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("make", [
    lambda: Strom(tau="1"), lambda: Strom(tau=None), lambda: Strom(strict=1), lambda: Residual(),
    lambda: OneBit(min_rows=True), lambda: Residual("onebit"), lambda: TernGrad(packing=2)])
def test_wrong_types_from_python_are_refused(make):
    with pytest.raises(SpecError, match="found, .* must be"):
        make()


def test_two_classes_cannot_have_one_name():
    assert register(OneBit) is OneBit  # again: nothing happens
    impostor = type("OneBit", (OneBit,), {"name": "onebit"})
    with pytest.raises(SpecError, match="two compressors are called 'onebit'"):
        register(impostor)
    assert registry()["onebit"] is OneBit


def test_the_registry_cannot_be_changed_through_its_copy():
    registry().clear()
    assert "onebit" in registry()
