"""The laws that every compressor obeys: each function takes one and raises AssertionError.

`check(compressor)` runs them all; a compressor that is defined elsewhere can be held to them too.
`LAWS` are tried on every layout and gradient of material.py, `FEEDBACK_LAWS` apply to what declares
feedback. The rest choose their own gradients.
"""

from itertools import islice

import numpy as np
from material import LAYOUTS, cases, gradient, vectors

from mpicomp import PacketError, SpecError
from mpicomp.compressors import Residual
from mpicomp.compressors.base import Compressor
from mpicomp.compressors.registry import from_spec
from mpicomp.philox import Key

KEY = Key(seed=2**40 + 5, rank=1, step=3, bucket=2)
UNIT = 2.0**-24  # of rounding: |fl(a + b) - (a + b)| <= UNIT * |fl(a + b)|
TINY = 2.0**-149  # the smallest subnormal float32
LEAST = 2.0**-126  # the smallest normal one: what a weight makes less than this may be rounded off
SEES_THE_NEWEST = {"adacomp"}  # its encode_owed is more than the three lines, as the paper asks
ALIKE = {"randomk"}  # all ranks draw the same
SPARE = 24  # bytes behind the capacity, which nobody may touch


def same(a, b):
    """Are these arrays equal to the bit?"""
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def pack(compressor, x, layout, key=KEY, state=None, fill=0xA5):
    """The payload for `x`, as an exchange with one rank makes it."""
    if state is None:
        state = compressor.init(layout, x)
    compressor.measure(x, layout, state)
    return encode(compressor, x, layout, key, state, fill)


def encode(compressor, x, layout, key, state, fill=0xA5):
    """The payload for `x`; what lies behind the capacity must stay as it was."""
    buffer = np.full(compressor.capacity(layout) + SPARE, fill, np.uint8)
    used = compressor.encode(x, buffer, layout, key, state)
    assert isinstance(used, int) and 0 <= used <= compressor.capacity(layout)
    assert (buffer[-SPARE:] == fill).all(), "encode wrote behind its capacity"
    return buffer[:used]


def decode(compressor, payload, layout, weight=1.0, key=KEY, onto=None):
    """weight * what the payload says, added to `onto` or to zeros."""
    out = np.zeros(layout.size, np.float32) if onto is None else onto.copy()
    compressor.decode_add(payload, out, layout, key, weight)
    return out


# ---- on every layout and gradient -----------------------------------------------------------


def encode_is_pure(compressor, layout, x):
    """Same bytes again, from a new state and into other rubbish; x and what persists stay."""
    before, state = x.copy(), compressor.init(layout, x)
    payload = pack(compressor, x, layout, state=state)
    kept = {k: v.copy() for k, v in compressor.persistent(state).items()}
    assert same(encode(compressor, x, layout, KEY, state, fill=0x5A), payload)
    other = compressor.init(layout, x)
    pack(compressor, np.roll(x, 1) + np.float32(1), layout, state=other)
    assert same(pack(compressor, x, layout, state=other), payload), "encode remembers the last x"
    assert same(x, before), "encode changed the gradient"
    assert all(same(v, kept[k]) for k, v in compressor.persistent(state).items())


def length_is_declared(compressor, layout, x):
    """capacity is a number that the layout determines; fixed payloads fill it."""
    capacity = compressor.capacity(layout)
    assert isinstance(capacity, int) and capacity >= 0
    if compressor.fixed:
        assert pack(compressor, x, layout).size == capacity


def decode_accumulates(compressor, layout, x):
    """decode_add is out += weight * value: linear in the weight, whatever stood in out."""
    payload = pack(compressor, x, layout)
    written = payload.copy()
    once = decode(compressor, payload, layout)
    assert np.isfinite(once).all(), "a finite gradient decodes to something that is not"
    assert same(decode(compressor, payload, layout, 2.0), once + once)
    half = decode(compressor, payload, layout, 0.5)
    assert (np.abs(half + half - once) <= LEAST).all()
    assert (decode(compressor, payload, layout, 0.0) == 0).all()
    ground = gradient("normal", layout, seed=7)
    there = decode(compressor, payload, layout, onto=ground)
    assert same(there, ground + once), "what stood in out changes what is added"
    assert (decode(compressor, payload, layout, -1.0, onto=once) == 0).all()
    third = decode(compressor, payload, layout, 1 / 3)
    assert (np.abs(third.astype(float) * 3 - once) <= 4 * UNIT * np.abs(once) + LEAST).all()
    assert same(payload, written), "decode changed the payload"


def decode_stays_inside(compressor, layout, x):
    """Bytes at any address, out in the middle of something larger."""
    payload = pack(compressor, x, layout)
    shifted = np.empty(payload.size + 1, np.uint8)[1:]
    shifted[:] = payload
    wide = np.full(layout.size + 8, np.float32(5))
    wide[4:-4] = 0
    compressor.decode_add(shifted, wide[4:-4], layout, KEY)
    assert same(wide[4:-4], decode(compressor, payload, layout))
    assert (wide[:4] == 5).all() and (wide[-4:] == 5).all()


def specification_is_enough(compressor, layout, x):
    """Another process that reads the specification decodes the same and writes the same."""
    twin = from_spec(repr(compressor))
    payload = pack(compressor, x, layout)
    assert same(pack(twin, x, layout), payload)
    assert same(decode(twin, payload, layout), decode(compressor, payload, layout))


def owed_is_three_lines(compressor, layout, x):
    """encode_owed = add, encode, decode with -1, to the bit, in place or into another array.

    What looks at the newest gradient (AdaComp) chooses other elements than encode does, but owes
    what it did not say all the same.
    """
    if not compressor.feedback:
        return
    owed, state = gradient("normal", layout, seed=3), compressor.init(layout, x)
    total = owed + x
    compressor.measure(total, layout, state)
    for place in (owed.copy(), None):
        start, given = owed.copy(), x.copy()
        buffer = np.full(compressor.capacity(layout) + SPARE, 0x77, np.uint8)
        used = compressor.encode_owed(given, start, buffer, layout, KEY, state, out=place)
        assert (buffer[-SPARE:] == 0x77).all()
        if compressor.name not in SEES_THE_NEWEST:
            assert same(buffer[:used], encode(compressor, total, layout, KEY, state))
        expected = total.copy()
        compressor.decode_add(buffer[:used], expected, layout, KEY, -1.0)
        assert same(given, x), "the gradient was changed"
        assert same(start if place is None else place, expected)
        assert place is None or same(start, owed), "owed was changed though out is another array"


LAWS = (encode_is_pure, length_is_declared, decode_accumulates, decode_stays_inside,
        specification_is_enough, owed_is_three_lines)


def everywhere(law, compressor, every=1):
    """Try one of LAWS on every layout and gradient, or on one in `every` of these pairs."""
    for what, layout, x in islice(cases(), 0, None, every):
        try:
            law(compressor, layout, x)
        except Exception as error:
            error.add_note(f"{law.__name__}({compressor!r}) on: {what}")
            raise


# ---- on gradients of their own --------------------------------------------------------------


def specification_round_trips(compressor):
    """from_spec(repr(c)) == c, and equal ones have equal hashes; it cannot be changed."""
    twin = from_spec(repr(compressor))
    assert twin == compressor and hash(twin) == hash(compressor) and repr(twin) == repr(compressor)
    assert type(twin) is type(compressor) and from_spec(f"  {compressor!r} ") == compressor
    try:
        compressor.some_new_field = 1
    except AttributeError:
        return
    raise AssertionError("the configuration is not frozen")


def keys_matter_all_or_not(compressor):
    """Random numbers differ by rank, step, bucket and seed; the same key draws the same again."""
    layout = LAYOUTS["vector of 4096"]
    x = gradient("normal", layout)
    mine = pack(compressor, x, layout, KEY)
    another = same(pack(compressor, x, layout, Key(KEY.seed, 2, 3, 2)), mine)
    others = [Key(KEY.seed, 1, 4, 2), Key(KEY.seed, 1, 3, 0), Key(KEY.seed + 1, 1, 3, 2),
              Key(KEY.seed + 2**33, 1, 3, 2)]
    differs = [not same(pack(compressor, x, layout, key), mine) for key in others]
    assert all(differs) or not any(differs), differs
    assert another == (not any(differs) or compressor.name in ALIKE), "by rank"
    return all(differs)


def unbiased(compressor, draws=2**17, most=6.0):
    """The mean of many draws is x, to `most` standard errors (a false alarm: 3e-8)."""
    values = np.array([0, 1, -1, 0.5, -0.25, 0.125, -0.75, 1e-3, -1e-3, 0.9, 0.3, -0.3, 0.99,
                       -0.6, 0.01, 2**-20], np.float32)
    layout = vectors(draws * values.size)
    said = decode(compressor, pack(compressor, np.tile(values, draws), layout), layout)
    said = said.reshape(draws, -1).astype(float)
    error = said.std(axis=0) / np.sqrt(draws)
    # A value that hit once or never tells no deviation: then allow for its largest one.
    floor = most**2 * np.abs(said).max() / draws
    assert (np.abs(said.mean(axis=0) - values) <= most * error + floor).all()


def sums_decode(compressor, ranks=5):
    """Adding payloads as MPI does and decoding once = decoding each and adding.

    The gradients are whole numbers that 16-bit floats hold, so that dense and cast are exact;
    codes times a scale round once for each rank.
    """
    layout, rng = LAYOUTS["network"], np.random.default_rng(5)
    gradients = [rng.integers(-15, 16, layout.size).astype(np.float32) for _ in range(ranks)]
    states = [compressor.init(layout, x) for x in gradients]
    agreed = [compressor.measure(x, layout, s) for x, s in zip(gradients, states)]
    if agreed[0] is not None:
        common = {"max": np.max, "sum": np.sum}[compressor.agreed_by](agreed, axis=0)
        for array in agreed:
            array[...] = common
    keys = [Key(rank=rank) for rank in range(ranks)]
    payloads = [encode(compressor, x, layout, key, state)
                for x, key, state in zip(gradients, keys, states)]
    shared = compressor.shared_bytes(layout)
    total = payloads[0].copy()
    for payload in payloads[1:]:
        assert same(payload[:shared], total[:shared]), "the shared bytes differ between ranks"
        total[shared:] = add(total[shared:], payload[shared:], compressor.summable)
    each = sum(decode(compressor, p, layout, key=key).astype(float)
               for p, key in zip(payloads, keys))
    largest = max(np.abs(decode(compressor, p, layout)).max(initial=0) for p in payloads)
    assert compressor.most_ranks is None or compressor.most_ranks >= ranks
    np.testing.assert_allclose(decode(compressor, total, layout, key=keys[-1]), each, rtol=0,
                               atol=2 * ranks**2 * UNIT * largest)


def add(a, b, kind):
    """a + b of two payloads of numbers of this kind."""
    if kind != "bfloat16":
        return (a.view(kind) + b.view(kind)).view(np.uint8)
    wide = [(side.view(np.uint16).astype(np.uint32) << 16).view(np.float32) for side in (a, b)]
    return ((wide[0] + wide[1]).view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)


def damage_is_noticed(compressor, tries=250):
    """Cut, extended or altered payloads: PacketError, or something finite; never anything else."""
    rng = np.random.default_rng(11)
    chosen = [("normal", "network"), ("ties", "tall"), ("huge", "vector of 257"),
              ("normal", "vector of 7"), ("heavy tail", "convolution"), ("normal", "nothing")]
    for attempt in range(tries):
        name, where = chosen[attempt % len(chosen)]
        layout = LAYOUTS[where]
        good = pack(compressor, gradient(name, layout), layout)
        bad, certain = _damaged(good, rng, attempt % 7)
        try:
            out = decode(compressor, bad, layout)
        except PacketError:
            continue
        assert np.isfinite(out).all(), f"damage to ({name}, {where}) decodes to NaN or Inf"
        assert not (certain and compressor.fixed), "a payload of the wrong length was accepted"


def _damaged(good, rng, kind):
    """(a damaged copy, whether its length shows the damage)."""
    bad = good.copy()
    if kind == 0:
        cut = int(rng.integers(0, max(1, good.size)))
        return bad[:cut], cut < good.size
    if kind == 1:
        return np.append(bad, rng.integers(0, 256, rng.integers(1, 9)).astype(np.uint8)), True
    if kind == 2:
        return rng.integers(0, 256, good.size).astype(np.uint8), False
    if kind == 3:
        bad[:8] = 0xFF  # NaN where a float stands, the highest index where a word does
    elif kind == 4 and good.size >= 4:
        at = int(rng.integers(0, good.size // 4)) * 4
        bad[at:at + 4] = np.frombuffer(np.float32([np.inf, -np.inf, np.nan, 3.4e38][at // 4 % 4])
                                       .tobytes(), np.uint8)
    elif good.size:
        for _ in range(1 if kind == 5 else 20):
            bad[rng.integers(0, good.size)] ^= np.uint8(1 << rng.integers(0, 8))
    return bad, False


# ---- with error feedback --------------------------------------------------------------------


def said_and_owed_is_given(compressor, scale=1.0, steps=50, decay=1.0):
    """Over many steps: the sum of what was said + what is owed = the sum of what was given.

    Each step rounds twice, in owed + grad and in taking off what was said; the bound adds up both.
    With decay < 1 what was forgotten, owed - decay * owed in each step, is a third part.
    """
    feedback = Residual(compressor, decay)
    for where in ("vector of 257", "network", "tall"):
        layout, rng = LAYOUTS[where], np.random.default_rng(1)
        state = feedback.init(layout, np.zeros(layout.size, np.float32))
        given, said, bound = (np.zeros(layout.size) for _ in range(3))
        for step in range(steps):
            x = (scale * rng.normal(size=layout.size)).astype(np.float32)
            start = state.owed.copy()
            payload = pack(feedback, x, layout, Key(step=step), state)
            feedback.learn(payload, layout, Key(step=step), state)
            assert same(state.owed, start), "owed changed before the step was committed"
            feedback.commit(state)
            kept = start * np.float32(decay)
            given += x
            given -= start.astype(float) - kept  # forgotten
            said += decode(feedback, payload, layout, key=Key(step=step))
            bound += UNIT * (np.abs(kept + x) + np.abs(feedback.persistent(state)["error"])) + TINY
        owed = feedback.persistent(state)["error"]
        assert (np.abs(given - said - owed) <= bound * (1 + 1e-9)).all()
        assert compressor.capacity(layout) == 0 or np.abs(said).max() > 0


def residual_is_bounded(compressor, scale=1.0, steps=1000, most=30.0):
    """Fresh gradients with a drift for 1000 steps: the residual stops growing.

    What is never said grows by the drift of 0.3 a step, to 300 gradients; what is said too loudly
    explodes. Both exceed `most` gradients, and three times what the first 300 steps reached.
    """
    feedback, layout, rng = Residual(compressor), LAYOUTS["tall"], np.random.default_rng(2)
    state = feedback.init(layout, np.zeros(layout.size, np.float32))
    drift = 0.3 * rng.choice([-1, 1], layout.size)
    early = late = 0.0
    for step in range(steps):
        x = scale * (drift + rng.normal(size=layout.size))
        with np.errstate(over="ignore", invalid="ignore"):
            payload = pack(feedback, x.astype(np.float32), layout, Key(step=step), state)
            feedback.learn(payload, layout, Key(step=step), state)
            feedback.commit(state)
            norm = np.linalg.norm(state.owed.astype(float)) / (scale * np.sqrt(layout.size))
        early, late = (max(early, norm), 0.0) if step < 300 else (early, max(late, norm))
        assert norm <= most, f"after {step + 1} steps the residual is {norm:.3g} gradients long"
    assert late <= 3 * early, f"the residual grew from {early:.3g} to {late:.3g} gradients"


FEEDBACK_LAWS = (said_and_owed_is_given, residual_is_bounded)


def feedback_is_refused(compressor):
    """Residual takes nothing that does not declare feedback."""
    try:
        Residual(compressor)
    except SpecError as error:
        assert compressor.name in str(error)
        return
    raise AssertionError(f"{compressor!r} declares no feedback, and Residual took it")


def check(compressor, scale=1.0):
    """Hold one compressor to every law that applies to it."""
    assert isinstance(compressor, Compressor)
    for law in LAWS:
        everywhere(law, compressor)
    specification_round_trips(compressor)
    keys_matter_all_or_not(compressor)
    damage_is_noticed(compressor)
    if compressor.unbiased:
        unbiased(compressor)
    if compressor.summable:
        sums_decode(compressor)
    if not compressor.feedback:
        return feedback_is_refused(compressor)
    for law in FEEDBACK_LAWS:
        law(compressor, scale)
