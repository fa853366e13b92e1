"""require_ratio: what was sent, by reason, and the same error everywhere where it is too much."""

import re

import numpy as np
import pytest
from training import give, parameters, same_error

import mpicomp
from mpicomp import RatioError, SpecError

pytestmark = pytest.mark.mpi
HEADER, N = 32, 64 * 10


def run(comm, spec, steps, named=None, scale=1.0, **keywords):
    """A Reducer after some steps of random gradients; float32 would be 2,560 bytes a step."""
    named = named or parameters(w=(64, 10))
    reducer = mpicomp.Reducer(named, spec, comm, **keywords)
    more(reducer, named, steps, scale)
    return reducer


def more(reducer, named, steps, scale=1.0):
    rng = np.random.default_rng(reducer.comm.rank)
    for _ in range(steps):
        for _, p in named:
            p.grad = None
        give(named, [scale * rng.standard_normal(tuple(p.shape)) for _, p in named])
        reducer.finish()


def test_a_run_that_keeps_the_ratio_goes_on(comm):
    """onebit sends 32 + 160 bytes of 2,560: a ratio of 13.3."""
    reducer = run(comm, "onebit", 5, require_ratio=13, ratio_window=3)
    reducer.check_ratio()
    assert reducer.stats.reasons["onebit"] == 5 * (HEADER + 160)
    assert reducer.stats.reasons["receipt"] == 3 * 16  # step 0, steps 0 to 2, steps 3 and 4
    assert sum(reducer.stats.reasons.values()) == reducer.stats.sent
    assert run(comm, "onebit", 1).stats.reasons["receipt"] == 0


def test_what_never_changes_is_judged_at_its_first_step(comm):
    text = same_error(comm, RatioError, lambda: run(comm, "onebit", 1, require_ratio=14))
    assert "require_ratio=14, found 13.33" in text and "in step 0:" in text
    assert f"onebit {comm.size * 192:,} (100 %)" in text and f"all {comm.size} ranks" in text


def test_a_warm_up_counts(comm):
    """Two dense steps of four: 2,560 * 4 / (2 * 2,592 + 2 * 192) = 1.84."""
    def go():
        run(comm, "onebit:warmup=2", 3, require_ratio=8, ratio_window=4)  # step 2 alone is well
        run(comm, "onebit:warmup=2", 4, require_ratio=8, ratio_window=4)

    text = same_error(comm, RatioError, go)
    assert "steps 0 to 3" in text
    assert re.search(rf"warm-up {comm.size * 2 * 2592:,} \(93 %\), onebit", text), text


def test_cases_of_a_rule_are_named(comm):
    """A bias that stays float32: 64 * 4 bytes beside 160 of w's; the length of w's needs none."""
    named = parameters(w=(64, 10), b=64)
    spec = "rule(*b:dense; onebit)"
    stats = run(comm, spec, 2, named).stats
    assert +stats.reasons == {"rule": 2 * HEADER, "rule *b:dense": 2 * 256,
                              "rule rest:onebit": 2 * 160}
    assert stats.sent == 2 * (HEADER + 256 + 160)
    assert sum(stats.last_reasons.values()) == stats.last["sent"]
    text = same_error(comm, RatioError, lambda: run(
        comm, spec, 1, parameters(w=(64, 10), b=64), require_ratio=8))
    assert f"rule *b:dense {comm.size * 256:,} (57 %)" in text


def test_cases_of_a_rule_with_equal_compressors_are_told_apart(comm):
    stats = run(comm, "rule(*b:dense; size<20:dense; onebit)", 1,
                parameters(w=(64, 10), b=64, s=15)).stats
    assert +stats.reasons == {"rule": HEADER, "rule *b:dense": 256, "rule size<20:dense": 60,
                              "rule rest:onebit": 160}


@pytest.mark.parametrize("name", ["allgather", "sharded", "hierarchical"])
def test_reasons_add_up_to_what_was_sent(name, comm):
    named = parameters(w=(64, 10), b=64, k=(8, 40))
    spec = f"rule(*b:dense; k:strom:tau=1; onebit):exchange={name}"
    stats = run(comm, spec, 6, named, bucket_bytes=2000).stats
    assert sum(stats.reasons.values()) == stats.sent
    assert all(size >= 0 for size in stats.reasons.values()), stats.reasons
    if stats.sent and (comm.size == 1 or name != "sharded"):  # shards may own no part of k
        assert stats.reasons["rule k:strom"] > 0 and stats.reasons["rule lengths"] > 0


def test_lengths_that_the_data_tell_are_judged_over_the_window(comm):
    """A threshold that nothing passes, then one that all pass: the third window is too much."""
    named = parameters(w=(64, 10))
    reducer = mpicomp.Reducer(named, "strom:tau=0.001,feedback=no", comm, require_ratio=4,
                              ratio_window=2)
    more(reducer, named, 4, scale=1e-6)
    text = same_error(comm, RatioError, lambda: more(reducer, named, 2, scale=1.0))
    assert "steps 4 to 5" in text and "strom" in text


def test_check_ratio_at_the_end(comm):
    reducer = run(comm, "strom:tau=0.001,feedback=no", 3, require_ratio=4)
    text = same_error(comm, RatioError, reducer.check_ratio)
    assert "steps 0 to 2" in text
    reducer = run(comm, "strom:tau=0.001,feedback=no", 3)
    assert reducer.check_ratio() is None


def test_one_rank_that_sends_more_is_enough_for_all(comm):
    """Judged is the sum over ranks: one rank alone sends everything, the others nothing."""
    def go():
        run(comm, "strom:tau=0.001,feedback=no", 1, scale=1.0 if comm.rank == 0 else 1e-9,
            require_ratio=2 * comm.size, ratio_window=1)

    assert "in step 0" in same_error(comm, RatioError, go)


def test_a_loaded_state_begins_a_new_window(comm):
    first = run(comm, "onebit:warmup=2", 2)
    named = parameters(w=(64, 10))
    reducer = mpicomp.Reducer(named, "onebit:warmup=2", comm, require_ratio=13, ratio_window=2)
    reducer.load_state_dict(first.state_dict())
    more(reducer, named, 4)
    assert reducer.step == 6


@pytest.mark.parametrize("keywords", [dict(require_ratio=0), dict(require_ratio="8"),
                                      dict(require_ratio=8, ratio_window=0)])
def test_bad_values_are_refused(keywords, comm):
    text = same_error(comm, SpecError, lambda: run(comm, "dense", 0, **keywords))
    assert "ratio" in text and "expected" in text


@pytest.mark.mpi(min_size=2)
def test_ranks_must_ask_for_the_same_ratio(comm):
    text = same_error(comm, mpicomp.MismatchError, lambda: run(
        comm, "dense", 0, require_ratio=8 if comm.rank else None))
    assert "require_ratio" in text
