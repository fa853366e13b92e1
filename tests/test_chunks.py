"""chunks, topk and randomk: worked examples to the digit, and what each promises."""

import numpy as np
import pytest
from laws import decode, pack, same
from material import GRADIENTS, LAYOUTS, gradient, vectors
from test_worked_seven import floats, raw

import mpicomp
from mpicomp import SpecError, method
from mpicomp.compressors import Chunks, Dropping, RandomK, Residual, TopK
from mpicomp.compressors.registry import from_spec
from mpicomp.kernels import reference
from mpicomp.layout import Layout
from mpicomp.philox import Key

E = floats(1, 0, 0, 0, 0, 0, .5, 0)  # owed before
D = floats(.2, -2, .3, .1, 3, -.1, .4, -1)  # given
A = floats(1.15, -2, .3, .1, 3, -.1, .875, -1)  # .95 E + D: kept are -2 and 1.15, 3 and -1

OFFSETS = np.uint8([0, 0x10, 0, 0, 0x30, 0])  # (0, 1) and (0, 3)


def after_a_step(compressor, layout):
    """(payload, what it says, what is owed then) of one step of SparseLoCo from E and D."""
    feedback = Residual(compressor, 0.95)
    state = feedback.init(layout, D)
    state.owed[:] = E
    payload = pack(feedback, D, layout, state=state)
    feedback.commit(state)
    return payload, decode(feedback, payload, layout), state.owed


# ---- chunks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("offsets, packed", [((5, 4095), "05 f0 ff"), ((1, 0), "01 00 00"),
                                             ((5,), "05 00"), ((0xABC, 0x123, 0xDEF),
                                                               "bc 3a 12 ef 0d")])
def test_two_offsets_take_three_bytes(offsets, packed):
    data = reference.chunks_pack(np.array(offsets))
    assert data.tobytes() == bytes.fromhex(packed)
    assert tuple(reference.chunks_unpack(data, len(offsets))) == offsets


def test_two_bits_are_a_sign_and_the_mean_of_a_half():
    """|1.15| and |-1| lie below the mean magnitude 1.7875, |-2| and |3| above."""
    payload, said, owed = after_a_step(Chunks(k=2, block=4), vectors(8))
    assert payload.tobytes() == raw(floats(1.075, 2.5), OFFSETS,
                                    np.uint8([0b01 | 0b10 << 2 | 0b11 << 4 | 0b00 << 6]))
    np.testing.assert_allclose(said, [1.075, -2.5, 0, 0, 2.5, 0, 0, -1.075], rtol=1e-6)
    np.testing.assert_allclose(owed, [.075, .5, .3, .1, .5, -.1, .875, .075], atol=1e-6)


def test_the_two_bits_of_templar_forget_a_sign():
    """Its four bins in numbers (docs/methods.md): 1.15 and -1 fall into one, and become 0.075.
    Ours of the same step keep every sign, and are nearer."""
    values = A[[1, 0, 4, 7]].astype(float)
    shift = values.mean()
    spread = (values - shift).std(ddof=1)
    codes = np.clip(np.round((values - shift) / (6 * spread / 4) + 2), 0, 3).astype(int)
    means = [values[codes == code].mean() if (codes == code).any() else 0 for code in range(4)]
    assert spread == pytest.approx(2.235462, abs=1e-6) and codes.tolist() == [1, 2, 3, 2]
    theirs = np.array(means)[codes]
    np.testing.assert_allclose(theirs, [-2, .075, 3, .075], atol=1e-7)
    _, said, _ = after_a_step(Chunks(k=2, block=4), vectors(8))
    ours = said[[1, 0, 4, 7]]
    assert (np.sign(ours) == np.sign(values)).all() and (np.sign(theirs) != np.sign(values)).any()
    assert np.square(ours - values).sum() < np.square(theirs - values).sum()


def test_eight_bits_are_multiples_of_a_127th_of_the_largest():
    payload, said, owed = after_a_step(Chunks(k=2, block=4, bits=8), vectors(8))
    step = np.float32(3) / np.float32(127)
    codes = np.array([49, -85, 127, -42], np.int8)  # of 1.15, -2, 3 and -1
    assert payload.tobytes() == raw(step, OFFSETS, codes)
    np.testing.assert_array_equal(said[[0, 1, 4, 7]], codes.astype(np.float32) * step)
    np.testing.assert_allclose(owed + said, A, atol=1e-6)


def test_32_bits_leave_nothing_of_what_was_sent():
    payload, said, owed = after_a_step(Chunks(k=2, block=4, bits=32), vectors(8))
    assert payload.tobytes() == raw(A[[0, 1, 4, 7]], OFFSETS)
    np.testing.assert_array_equal(owed, np.where(said == 0, A, 0))


def test_blocks_end_with_their_tensor():
    """And each tensor has levels of its own, however unlike they are."""
    layout = Layout.of([("a", (6,)), ("none", (0, 3)), ("b", ()), ("c", (2, 5))])
    x = floats(1, -1, 2, -2, 1, 1, 1000, *[.001] * 9, -.003)
    said = decode(Chunks(k=2, block=4, bits=2), pack(Chunks(k=2, block=4), x, layout), layout)
    assert np.flatnonzero(said).tolist() == [2, 3, 4, 6, 7, 8, 11, 12, 16]  # 2 + 1, 1, 2 + 2 + 1
    np.testing.assert_allclose(said[[2, 3, 4]], [2, -2, 1], rtol=1e-6)
    np.testing.assert_allclose(said[[6, 7, 16]], [1000, .001, -.003], rtol=1e-6)


@pytest.mark.parametrize("size, keeps", [(4096, 64), (4097, 64 + 1), (4096 + 96, 64 + 2),
                                         (4096 + 160, 64 + 2), (1, 1), (2 * 4096 + 2048, 160)])
def test_a_short_last_block_keeps_its_share(size, keeps):
    """max(1, round(k n / block)), a half to the even number: 96 / 64 and 160 / 64 are both 2."""
    payload = pack(Chunks(bits=32), np.ones(size, np.float32), vectors(size))
    assert payload.size == 4 * keeps + -(-3 * keeps // 2)


def test_of_equal_magnitudes_those_of_lower_index_are_sent():
    x = floats(1, -2, 2, 1, -2, 2, 1, 0)
    said = decode(from_spec("chunks:k=3,block=8,bits=32"),
                  pack(from_spec("chunks:k=3,block=8,bits=32"), x, vectors(8)), vectors(8))
    np.testing.assert_array_equal(said, [0, -2, 2, 0, -2, 0, 0, 0])


@pytest.mark.parametrize("k, ratio", [(32, 293), (64, 146.3), (128, 73)])
def test_ratios_of_the_literature(k, ratio):
    """12 + 2 bits for k of 4096; the table of 8 bytes a tensor is not counted there."""
    size = 4096 * 1000
    assert 4 * size / (Chunks(k=k).capacity(vectors(size)) - 8) == pytest.approx(ratio, rel=2e-3)
    assert Chunks(k=k).capacity(vectors(size)) == 8 + size * k * 14 // 4096 // 8


@pytest.mark.parametrize("bits", [2, 8, 32])
def test_it_contracts(bits):
    """What is left of a block is at most 1 - k / block of its squared length; with few bits what is
    left of a tensor is no longer than it was. A zero is said as a zero."""
    compressor = Chunks(k=8, block=64, bits=bits)
    for name in GRADIENTS:
        for layout in (LAYOUTS["vector of 4096"], LAYOUTS["network"]):
            x = gradient(name, layout)
            said = decode(compressor, pack(compressor, x, layout), layout)
            assert not said[x == 0].any()
            for s in layout.segments:
                kept, given = (np.square(v[s.slice].astype(float))
                               for v in (x - said, x))
                assert kept.sum() <= given.sum() * (1 + 1e-6)
                for at in range(0, s.size if bits == 32 else 0, 64):
                    block = given[at:at + 64]
                    most = 1 - max(1, round(8 * block.size / 64)) / block.size
                    assert kept[at:at + 64].sum() <= most * block.sum() * (1 + 1e-6)


def test_the_levels_are_the_means_of_their_halves():
    values = np.random.default_rng(2).standard_cauchy(1001).astype(np.float32)
    low, high, above = reference.chunks_levels(values)
    sizes = np.abs(values).astype(float)
    assert (above == (sizes > sizes.mean())).all()
    assert high == pytest.approx(sizes[above].mean(), rel=1e-6)
    assert low == pytest.approx(sizes[~above].mean(), rel=1e-4)
    assert reference.chunks_levels(np.append(values, np.float32(0)))[0] == 0


def test_an_infinite_sum_is_refused_and_too_many_too():
    largest = np.full(8, 3e38, np.float32)
    feedback, layout = Residual(Chunks(k=2, block=4)), vectors(8)
    state = feedback.init(layout, largest)
    state.owed[:] = largest
    with np.errstate(over="ignore"), pytest.raises(mpicomp.PacketError, match="beyond float32"):
        pack(feedback, largest, layout, state=state)
    with pytest.raises(SpecError, match="k=100 found, k must be at most block=64"):
        Chunks(k=100, block=64)
    with pytest.raises(SpecError, match="bits=4 found, bits must be one of 2, 8, 32"):
        Chunks(bits=4)


# ---- topk ---------------------------------------------------------------------------------------


def test_topk_sends_exactly_so_many():
    x = floats(1, -3, 2, 3, 0, -3, 3, 1, 5, 0)
    said = decode(TopK(density=.4), pack(TopK(density=.4), x, vectors(10)), vectors(10))
    np.testing.assert_array_equal(said, [0, -3, 0, 3, 0, -3, 0, 0, 5, 0])
    payload = pack(TopK(density=.25), x, vectors(2, 8))  # one of 2, and two of 8
    assert payload.tobytes() == raw(np.int32([1, 3, 8]), floats(-3, 3, 5))
    payload = pack(TopK(density=.25, scope="bucket"), x, vectors(2, 8))  # 2.5 of 10: 2
    assert payload.tobytes() == raw(np.int32([1, 8]), floats(-3, 5))


def test_without_ties_topk_is_dropping_with_an_exact_threshold():
    layout, x = vectors(1000), np.random.default_rng(0).standard_normal(1000, np.float32)
    assert np.unique(np.abs(x)).size == x.size
    assert same(pack(TopK(density=0.1), x, layout),
                pack(Dropping(rate=0.9, sample="exact"), x, layout))


# ---- randomk ------------------------------------------------------------------------------------


def test_randomk_draws_one_of_each_run_alike_on_all_ranks():
    """Seven runs of 100 elements, 14 or 15 long; over many steps every element has its turn."""
    compressor, layout = RandomK(density=.07), vectors(100)
    x, hits, borders = np.arange(1, 101, dtype=np.float32), np.zeros(100), np.arange(8) * 100 // 7
    for step in range(2000):
        one, two = (pack(compressor, x, layout, Key(3, rank, step)) for rank in (0, 70_000))
        assert same(one, two)
        places = np.flatnonzero(decode(compressor, one, layout, key=Key(3, 5, step)))
        assert (np.searchsorted(borders, places, side="right") == np.arange(1, 8)).all()
        hits[places] += 1
    chance = np.repeat(1 / np.diff(borders), np.diff(borders))
    assert (np.abs(hits - 2000 * chance) < 6 * np.sqrt(2000 * chance)).all()


@pytest.mark.parametrize("scale, grows", [(True, 1000 / 100 - 1), (False, 1 - 100 / 1000)])
def test_how_a_residual_grows_without_a_gradient(scale, grows):
    """n/K - 1 a step with the factor n/K, which is why it is refused; 1 - K/n without.

    The first step of a hundred residuals, since later lengths of the growing one are carried by
    ever fewer elements.
    """
    compressor, layout, rng = RandomK(density=.1, scale=scale), vectors(1000), \
        np.random.default_rng(1)
    ratio = []
    for step in range(100):
        x = rng.standard_normal(1000, np.float32)
        left = x - decode(compressor, pack(compressor, x, layout, Key(step=step)), layout,
                          key=Key(step=step))
        ratio.append(float(left @ left) / float(x @ x))
    assert np.mean(ratio) == pytest.approx(grows, abs=5 * float(np.std(ratio)) / 10)


def test_what_randomk_can_be():
    assert method("randomk") == mpicomp.Method("randomk", Residual(RandomK()), "allreduce")
    assert method("randomk:scale=yes").compressor == RandomK(scale=True)
    assert not method("randomk:feedback=no").feedback
    for spec in ("randomk:scale=yes,feedback=yes", "rule(*.bias:dense; randomk:scale=yes,"
                                                   "feedback=yes)"):
        with pytest.raises(SpecError, match="scale=yes with feedback=yes.*type scale=no"):
            method(spec)
    with pytest.raises(SpecError, match="randomk.*bounded"):
        from_spec("residual(randomk:scale=yes)")
    assert mpicomp.methods()["chunks"].startswith("the largest 64")
