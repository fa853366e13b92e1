"""A rule: which parameter goes where, bytes, residuals, and how it is written."""

import numpy as np
import pytest
from training import give, parameters

import mpicomp
from mpicomp.catalogue import METHODS
from mpicomp.compressors import Dense, OneBit, Residual, Rule
from mpicomp.compressors.registry import from_spec
from mpicomp.compressors.rule import Cases, runs
from mpicomp.errors import PacketError, SpecError
from mpicomp.layout import Layout
from mpicomp.philox import Key

NETWORK = Layout.of([("conv.weight", (40, 3, 2, 2)), ("conv.bias", (40,)), ("norm.weight", (40,)),
                     ("embed.weight", (50, 7)), ("nothing", (0, 3)), ("head.weight", (33, 5)),
                     ("head.bias", (33,)), ("gain", ())])


def gradient(seed=0, layout=NETWORK):
    return np.random.default_rng(seed).normal(size=layout.size).astype(np.float32)


def step(compressor, x, layout, state, key=Key()):
    compressor.measure(x, layout, state)
    room = np.full(compressor.capacity(layout), 0xA5, np.uint8)
    payload = room[:compressor.encode(x, room, layout, key, state)]
    compressor.commit(state)
    return payload


def decode(compressor, payload, layout, key=Key()):
    out = np.zeros(layout.size, np.float32)
    compressor.decode_add(payload, out, layout, key)
    return out


def chosen(spec, layout=NETWORK):
    """{parameter: name of the compressor it gets}."""
    return {s.name: repr(run.compressor) for run in runs(from_spec(spec), layout)
            for s in run.layout.segments}


def test_the_first_case_that_holds():
    found = chosen("rule(*.bias:dense; ndim>2:fp16; size<=165:bf16; e*.w?ight:strom; onebit)")
    assert {name: spec.split(":")[0] for name, spec in found.items()} == {
        "conv.weight": "fp16", "conv.bias": "dense", "norm.weight": "bf16",
        "embed.weight": "strom", "nothing": "bf16", "head.weight": "bf16", "head.bias": "dense",
        "gain": "bf16"}
    assert set(chosen("rule(ndim=0:fp16; dense)").values()) == {"fp16", "dense"}


def test_shapes():
    found = chosen("rule(shape=*x2x2:fp16; shape=50x*:bf16; shape=40:strom; dense)")
    assert {name: spec.split(":")[0] for name, spec in found.items()} == {
        "conv.weight": "fp16", "conv.bias": "strom", "norm.weight": "strom", "embed.weight": "bf16",
        "nothing": "dense", "head.weight": "dense", "head.bias": "dense", "gain": "dense"}


NAMES = ["conv.weight", "conv.bias", "fc[1].weight", "fc[1].bias"]


def test_the_last_two_parameters_of_a_model():
    """quantize_logits=False of TernGrad's authors: a place in the model becomes a name."""
    method = mpicomp.method("rule(last<=2:dense; last=4:fp16; terngrad)")
    assert mpicomp.method(repr(method)) == method
    resolved = method.of(NAMES)
    assert [test for test, _ in resolved.compressor.inner] == [
        "fc[[]1].bias", "fc[[]1].weight", "conv.weight", ""]
    layout = Layout.of((name, (3, 3)) for name in reversed(NAMES))
    kinds = {s.name: run.compressor.name for run in runs(resolved.compressor, layout)
             for s in run.layout.segments}
    assert kinds == {"fc[1].bias": "dense", "fc[1].weight": "dense", "conv.bias": "terngrad",
                     "conv.weight": "fp16"}
    assert mpicomp.method(repr(resolved)) == resolved and resolved.of(NAMES) == resolved
    with pytest.raises(SpecError, match="only a Reducer knows"):
        runs(method.compressor, layout)
    assert mpicomp.method("onebit").of(NAMES) == mpicomp.method("onebit")


@pytest.mark.mpi
def test_a_reducer_counts_from_the_last_parameter(comm):
    """The last two come back as they were given, over two buckets; others as ternary codes."""
    named = parameters(conv=(40, 3), bias=(40,), out=(5, 40), logits=(5,))
    reducer = mpicomp.Reducer(named, "rule(last<=2:dense; terngrad:clip=0)", comm, bucket_bytes=900)
    gradients = [np.linspace(-1, 1, p.numel()).astype(np.float32).reshape(p.shape)
                 for _, p in named]
    give(named, gradients)
    reducer.finish()
    for (name, p), gradient in zip(named, gradients):
        exact = np.allclose(p.grad, gradient, atol=1e-6)
        assert exact == (name in ("out", "logits"))


def test_every_method_can_be_a_case():
    """The seven systems and the baselines, each for one parameter of one bucket.

    Not powersgd, which only exchange=allreduce carries.
    """
    names = [name for name in METHODS if name not in ("rule", "auto", "powersgd")]
    assert len(names) >= 10
    layout = Layout.of((f"{name}.w", (40, 9)) for name in names)
    cases = "; ".join(f"{name}.*:{name}" for name in names)
    rule = mpicomp.method(f"rule({cases}; dense)").compressor
    state, x = rule.init(layout, gradient(layout=layout)), gradient(layout=layout)
    said = decode(rule, step(rule, x, layout, state), layout)
    owed = rule.persistent(state)["error"]
    for segment, name in zip(layout.segments, names):
        part, method = segment.slice, mpicomp.method(name)
        if method.feedback:
            np.testing.assert_allclose(said[part] + owed[part], x[part], atol=1e-6)
        assert (np.abs(owed[part]).max() > 0) == method.feedback


def test_bins_of_adacomp_by_name():
    """Recurrent weights in bins of 7, embeddings in bins of 70, the rest as the paper says."""
    rule = from_spec("rule(embed.*:residual(adacomp:bin=70); head.*:residual(adacomp:bin=7); "
                     "residual(adacomp))")
    bins = {s.name: run.compressor.inner.bin_size(s) for run in runs(rule, NETWORK)
            for s in run.layout.segments}
    assert bins == {"conv.weight": 50, "conv.bias": 500, "norm.weight": 500, "embed.weight": 70,
                    "nothing": 500, "head.weight": 7, "head.bias": 7, "gain": 500}


def test_bytes_are_those_of_the_parts():
    """A length word for each run that has none of its own, and every run from a whole word on."""
    rule = from_spec("rule(*.bias:fp16; embed.*:strom:tau=1.0; terngrad:clip=0.0)")
    x, state = gradient(), rule.init(NETWORK, gradient())
    payload = step(rule, x, NETWORK, state)
    parts, lengths = [], []
    for run in runs(rule, NETWORK):
        own = run.compressor.init(run.layout, x)
        part = step(run.compressor, x[run.slice], run.layout, own, run.key(Key()))
        parts.append(part.tobytes() + bytes(-part.size % 4))
        if not run.compressor.fixed:
            lengths.append(part.size)
    assert [len(run.layout.segments) for run in runs(rule, NETWORK)] == [1, 1, 1, 1, 2, 1, 1]
    assert payload.tobytes() == np.array(lengths, np.uint32).tobytes() + b"".join(parts)
    assert len(lengths) == 1 and payload.size < rule.capacity(NETWORK)


def test_runs_draw_their_own_numbers():
    layout = Layout.of([("a", (64,)), ("b.bias", (1,)), ("c", (64,))])
    rule, x = from_spec("rule(*.bias:dense; terngrad:clip=0.0)"), np.tile(gradient(1)[:65], 2)[:129]
    x[65:] = x[:64]
    said = decode(rule, step(rule, x, layout, rule.init(layout, x)), layout)
    assert (said[:64] != said[65:]).any()
    alone = from_spec("terngrad:clip=0.0")
    first = Layout.of([("a", (64,))])
    same = decode(alone, step(alone, x[:64], first, alone.init(first, x)), first)
    assert (np.sign(said[:64]) == np.sign(same)).all(), "the first run draws what it drew alone"


def test_each_case_has_its_own_residual_or_none():
    rule = from_spec("rule(*.bias:terngrad; embed.*:residual(strom:tau=2.0); residual(onebit))")
    state = rule.init(NETWORK, gradient())
    given = said = 0
    for number in range(20):
        x, key = gradient(number), Key(step=number)
        payload = step(rule, x, NETWORK, state, key)
        given, said = given + x, said + decode(rule, payload, NETWORK, key)
    owed = rule.persistent(state)["error"]
    assert owed.shape == (NETWORK.size,)
    for segment in NETWORK.segments:
        part = segment.slice
        if segment.name.endswith("bias"):
            assert (owed[part] == 0).all()
        elif segment.size > 1:
            assert np.abs(owed[part]).max() > 0
            np.testing.assert_allclose(said[part] + owed[part], given[part], atol=1e-4)


def test_going_on_from_saved_residuals():
    rule = from_spec("rule(*.bias:dense; residual(onebit))")
    state = rule.init(NETWORK, gradient())
    for number in range(3):
        step(rule, gradient(number), NETWORK, state)
    other = rule.init(NETWORK, gradient())
    rule.persistent(other)["error"][...] = rule.persistent(state)["error"]
    for number in range(3, 6):
        assert (step(rule, gradient(number), NETWORK, state)
                == step(rule, gradient(number), NETWORK, other)).all()
    assert from_spec("rule(*.bias:dense; onebit)").persistent(state) is not None
    plain = from_spec("rule(*.bias:dense; onebit)")
    assert plain.persistent(plain.init(NETWORK, gradient())) == {}


def test_what_ranks_agree_on_lies_side_by_side():
    rule = from_spec("rule(*.bias:terngrad:clip=0.0; embed.*:dense; dorefa)")
    x, state = gradient(), rule.init(NETWORK, gradient())
    shared = rule.measure(x, NETWORK, state)
    largest = [np.abs(x[s.slice]).max(initial=0) for s in NETWORK.segments
               if s.name != "embed.weight"]
    np.testing.assert_array_equal(shared, np.array(largest, np.float32))
    shared *= 4  # another rank's are larger
    room = np.zeros(rule.capacity(NETWORK), np.uint8)
    payload = room[:rule.encode(x, room, NETWORK, Key(), state)]
    said = decode(rule, payload, NETWORK)
    bias = NETWORK.segments[1].slice
    assert set(np.abs(said[bias]).tolist()) <= {0, float(shared[1])}


def test_damage():
    rule = from_spec("rule(*.bias:fp16; strom:tau=1.0)")
    payload = step(rule, gradient(), NETWORK, rule.init(NETWORK, gradient()))
    for bad in (payload[:3], payload[:-4], np.append(payload, payload[:4])):
        with pytest.raises(PacketError):
            decode(rule, bad, NETWORK)
    longer = payload.copy()
    longer[0] += 4
    with pytest.raises(PacketError):
        decode(rule, longer, NETWORK)


# ---- how it is written ------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [
    "rule", "rule(onebit)", "rule( *.bias : dense ;onebit:wire=cntk )",
    "rule(a.*:residual(strom:tau=0.5,strict=no); size>=10:dorefa:bits=3; fp16)"])
def test_specifications_round_trip(spec):
    compressor = from_spec(spec)
    assert from_spec(repr(compressor)) == compressor
    method = mpicomp.method(spec)
    assert mpicomp.method(repr(method)) == method


def test_methods_bring_their_own_error_feedback():
    method = mpicomp.method("rule(*.bias:dense; a:terngrad; b:onebit:feedback=no; onebit)")
    kept = [isinstance(compressor, Residual) for _, compressor in method.compressor.inner]
    assert kept == [False, False, False, True]
    assert method.compressor == Rule(Cases((
        ("*.bias", Dense()), ("a", from_spec("terngrad")), ("b", OneBit()),
        ("", Residual(OneBit())))))
    assert mpicomp.method("rule(onebit):exchange=sharded").exchange == "sharded"


@pytest.mark.parametrize("spec, message", [
    ("rule(*.bias:dense)", "last entry has no pattern"), ("rule(dense;)", "pattern:compressor"),
    ("rule(*.bias;dense)", "pattern:compressor"), ("rule(size<1e3:dense;onebit)", "size<1000"),
    ("rule(a:rule(onebit);dense)", "inside of a rule"), ("rule(a:zip;dense)", "zip"),
    ("rule(onebit):feedback=yes", "belongs to the cases"),
    ("rule(a:onebit:exchange=sharded;dense)", "behind the bracket")])
def test_mistakes_are_explained(spec, message):
    with pytest.raises(SpecError, match=message):
        mpicomp.method(spec)
