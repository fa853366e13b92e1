"""Philox4x32-10: the known answers of Random123, and words as a function of the element alone."""

import numpy as np
import pytest

from mpicomp.philox import Key, block, common, part, uniform, words

ONES = 0xFFFFFFFF
KNOWN = [  # counter, key, answer
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
     (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]


@pytest.mark.parametrize("counter, key, answer", KNOWN)
def test_known_answers(counter, key, answer):
    assert tuple(int(word) for word in block(counter, key)) == answer


def philox(counter, key):
    """Philox4x32-10 once more, with Python's integers."""
    (a, b, c, d), (low, high) = counter, key
    for _ in range(10):
        x, y = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = (y >> 32) ^ b ^ low, y & ONES, (x >> 32) ^ d ^ high, x & ONES
        low, high = (low + 0x9E3779B9) & ONES, (high + 0xBB67AE85) & ONES
    return a, b, c, d


@pytest.mark.parametrize("key", [Key(), Key(7, 3, 12, 5), Key(2**64 - 1, 4095, 2**32 - 1, 9)])
def test_element_takes_its_word_of_its_block(key):
    """Element i: word i % 4 of counter (i // 4, bucket, step, rank), key (seed low, seed high)."""
    found = words(key, 0, 23)
    for i in range(23):
        counter = (i // 4, key.bucket, key.step, key.rank)
        assert found[i] == philox(counter, (key.seed & ONES, key.seed >> 32))[i % 4]


def test_words_do_not_depend_on_where_one_begins():
    key, rng = Key(1, 2, 3, 4), np.random.default_rng(0)
    everything = words(key, 0, 1000)
    assert everything.dtype == np.uint32
    for start, count in [(0, 0), (5, 0), (3, 1), (999, 1), *rng.integers(0, 500, (50, 2))]:
        part = words(key, int(start), int(count))
        assert part.tolist() == everything[start:start + count].tolist()


def test_uniform_is_the_upper_24_bits():
    key = Key(9)
    draws = uniform(key, 0, 4096)
    assert draws.dtype == np.float32 and draws.min() >= 0 and draws.max() < 1
    assert (draws * 2.0**24 == words(key, 0, 4096) >> 8).all()


def test_uniform_is_uniform():
    """2^20 draws: mean, variance and each of 64 cells within five standard errors."""
    draws = uniform(Key(3), 0, 2**20).astype(float)
    assert abs(draws.mean() - 1 / 2) < 5 * np.sqrt(1 / 12) / 2**10
    assert abs(draws.var() - 1 / 12) < 5 * np.sqrt(1 / 180) / 2**10
    cells = np.histogram(draws, 64, (0, 1))[0]
    assert np.abs(cells - 2**14).max() < 5 * 2**7
    bits = words(Key(3), 0, 2**16)[:, None] >> np.arange(32, dtype=np.uint32) & 1
    assert np.abs(bits.mean(axis=0) - 0.5).max() < 5 * 0.5 / 2**8


def test_keys_differ_in_every_part():
    keys = [Key(), Key(seed=1), Key(seed=2**32), Key(rank=1), Key(step=1), Key(bucket=1)]
    assert len({words(key, 0, 8).tobytes() for key in keys}) == len(keys)


def test_two_ranks_choose_the_same_by_the_common_key():
    """At any number of ranks, and by seed, step and bucket otherwise; unlike any rank's own."""
    keys = [Key(part(5, 3), rank, 7, 2) for rank in (0, 1, 2**16, 2**17 + 1)]
    drawn = {words(common(key), 0, 8).tobytes() for key in keys}
    assert len(drawn) == 1 and not drawn & {words(key, 0, 8).tobytes() for key in keys}
    assert common(common(keys[0])) == common(keys[0])
    others = [Key(), Key(seed=1), Key(seed=2**32), Key(step=1), Key(bucket=1)]
    assert len({words(common(key), 0, 8).tobytes() for key in others}) == len(others)
