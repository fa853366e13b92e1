"""method="auto": predictions are the arithmetic of docs/planning.md; dense wins when in doubt."""

import json

import numpy as np
import pytest

from mpicomp import SpecError, advice, catalogue, cli
from mpicomp.advice import advise, predict, trial
from mpicomp.advice.trial import Codec, Link, given, made_up
from mpicomp.exchange import allreduce
from mpicomp.transport import ring

N, P = 1_000_000, 4
LINKS = {"gather": Link(1e-3, 2e-9), "reduce": Link(2e-3, 3e-9)}
CODEC = Codec(encode=1e-9, decode=2e-9, bytes=0.125)


@pytest.mark.parametrize("spec, encode, wire, decode", [
    ("onebit", 1e-3, 1e-3 + 2e-9 * 3 * N / 8, 4 * 2e-3),
    ("onebit:exchange=sharded", 1e-3 * 1.25 + 5e-3, 2e-3 + 2e-9 * 1.5 * N / 8, 2 * 2e-3 + 10e-3),
    ("dense", 0.0, 2e-3 + 3e-9 * 1.5 * N / 8, 2e-3)])
def test_predictions_are_the_arithmetic_of_the_manual(spec, encode, wire, decode):
    found = predict(catalogue.method(spec), CODEC, LINKS, N, P, copy=5e-9)
    assert (found.encode, found.wire, found.decode) == pytest.approx((encode, wire, decode))
    hidden = predict(catalogue.method(spec), CODEC, LINKS, N, P, hidden=1.0, copy=5e-9)
    assert hidden.total == pytest.approx(encode + decode)


@pytest.mark.mpi
@pytest.mark.parametrize("faster, choice", [(1.2, "dense"), (2.0, "onebit")])
def test_dense_wins_unless_another_is_much_faster(faster, choice, comm, monkeypatch):
    """In shared memory a compressed method that is only predicted to be a bit faster is not."""
    whole = 4e-9 * N  # seconds of a dense exchange, all of them in the codec
    costs = {"dense": whole, "onebit": whole / faster}
    monkeypatch.setattr(advice, "measure_links",
                        lambda comm, *_: dict.fromkeys(LINKS, Link(0.0, 0.0)))
    monkeypatch.setattr(advice, "measure_codec", lambda method, comm, sample: Codec(
        0.0, costs[method.name] / N / (1 if method.name == "dense" else comm.size), 1.0))
    found = advise(comm, N, ("dense", "onebit"))
    expected = "dense" if comm.size == 1 else choice
    assert catalogue.method(found.choice).name == expected
    assert ("nothing to exchange" if comm.size == 1 else "ms") in found.reason


def test_one_rank_has_no_links_to_predict_from(comm):
    """What a call takes grows with its size also where nobody receives a byte."""
    links = trial.measure_links(comm, N)
    assert {link.per_byte for link in links.values()} == {0.0}
    with pytest.raises(SpecError, match="launch/run -n 2"):
        advise(comm, N, ("onebit",), ranks=4)


def test_plan_on_one_rank_says_nothing_of_others(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(trial, "SAMPLE", 1 << 14)
    path = tmp_path / "plan.json"
    assert cli.main(["plan", "--gradient", "1e6", "--methods", "onebit", "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "P=" not in printed and "Gbit/s" not in printed
    assert "nothing to exchange" in printed and "launch/run -n 2 -m mpicomp plan" in printed
    assert json.loads(path.read_text())["ranks"] == 1


@pytest.mark.mpi
@pytest.mark.parametrize("n, around", [(1 << 19, True), (1 << 14, False)])
def test_what_is_timed_for_dense_is_the_exchange_of_dense(n, around, comm, monkeypatch):
    """On 2 to 4 ranks a large sum goes around our ring, not through MPI's Iallreduce."""
    opened, summed = [], []
    run = allreduce.Allreduce.run

    def noted(self, mail, step, flags):
        opened.append(mail.grad.size)
        return run(self, mail, step, flags)

    monkeypatch.setattr(allreduce.Allreduce, "run", noted)
    monkeypatch.setattr(ring.Ring, "run", lambda *_, run=ring.Ring.run: summed.append(1) or run(*_))
    links = trial.measure_links(comm, n)
    assert set(links) == {"gather", "reduce"}
    assert set(opened) == {trial.SMALL // 4, n} and opened.count(n) == 6
    assert len(summed) == (6 if around and comm.size in ring.RANKS else 0)


@pytest.mark.mpi
def test_a_sum_is_timed_at_the_size_of_the_gradient_up_to_a_limit(comm, monkeypatch):
    sizes = []
    monkeypatch.setattr(trial, "MOST", 1 << 18)
    monkeypatch.setattr(trial, "_time", lambda comm, pipeline, t: sizes.append(
        getattr(t, "elements", t)) or 1.0)
    for n in (100, 50_000, 1 << 30):
        sizes.clear()
        links = trial.measure_links(comm, n)
        assert sizes[2:] == [trial.SMALL // 4, min(1 << 16, max(1 << 14, n))]
        assert links["reduce"] == Link(1.0, 0.0)


@pytest.mark.mpi
def test_sums_of_other_numbers_have_a_link_of_their_own(comm, monkeypatch):
    """bf16 by exchange=allreduce is added by a function of ours: much slower than MPI's floats."""
    methods = [catalogue.method(spec) for spec in ("dense", "bf16:exchange=allreduce", "onebit")]
    names = {trial.reduction(m) for m in methods[:2]}
    assert names == {"reduce", "reduce bfloat16"}
    codecs = {repr(m): Codec(1e-9, 1e-9, 2.0) for m in methods}
    links = trial.measure_links(comm, 1 << 14, methods, codecs)
    assert set(links) == names | {"gather"}
    known = {"gather": Link(0, 1), "reduce": Link(0, 2), "reduce bfloat16": Link(0, 4)}
    wire = [predict(m, codecs[repr(m)], known, 100, 2).wire for m in methods]
    assert wire == pytest.approx([2 * 200, 4 * 200, 200])


def test_decoding_of_dense_is_what_the_exchange_does(comm, monkeypatch):
    """A sum that lies in place is scaled; nothing is added to it."""
    scaled = []
    k = trial.kernels.of(np.zeros(1, np.float32))
    monkeypatch.setattr(k, "dense_scale", lambda *_, own=k.dense_scale: scaled.append(1) or own(*_),
                        raising=False)
    trial.measure_codec(catalogue.method("dense"), comm, given(np.ones((4, 4), np.float32)))
    trial.measure_codec(catalogue.method("dense:exchange=allgather"), comm,
                        given(np.ones((4, 4), np.float32)))
    assert len(scaled) == 4


# ---- what codecs are tried on -------------------------------------------------------------------


def test_made_up_numbers_are_not_normal_noise(monkeypatch):
    monkeypatch.setattr(trial, "SAMPLE", 1 << 18)
    sample, other = made_up(0), made_up(1)
    assert sample.x.size == 1 << 18 == sample.layout.size and not sample.real
    assert (sample.x != other.x).any() and (made_up(0).x == sample.x).all()
    spread = [np.abs(sample.x[s.slice]).mean() for s in sample.layout.segments]
    assert 300 < spread[0] / spread[-1] < 3000
    for segment in sample.layout.segments:
        part = sample.x[segment.slice].astype(np.float64)
        assert (part**4).mean() / (part**2).mean()**2 > 4  # 3 for normal noise


def ratio(advice, name):
    """32 bits over those of an element."""
    return next(4 / codec.bytes for spec, codec in advice.codecs.items() if spec.startswith(name))


@pytest.mark.mpi
def test_a_gradient_given_is_what_codecs_are_tried_on(comm, tmp_path, monkeypatch):
    """One element in a hundred beyond tau: strom sends these, 100 times less than dense."""
    monkeypatch.setattr(advice, "measure_links", lambda comm, *_: dict.fromkeys(LINKS, Link(0, 0)))
    monkeypatch.setattr(trial, "SAMPLE", 1 << 14)
    x = np.zeros((40, 50), np.float64)
    x[::10, ::10] = 1.0
    path = tmp_path / "g.npz"
    np.savez(path, weight=x, bias=np.zeros(7))
    specs = ("strom:tau=0.5", "strom:density=0.01")
    for gradient in ({"weight": x, "bias": np.zeros(7)}, path, str(path)):
        found = advise(comm, candidates=specs, gradient=gradient)
        assert found.elements == 2007 and found.notes == () and "2,007 elements" in found.sample
        assert ratio(found, "strom:tau=0.5") == pytest.approx(2007 / 20, rel=0.01)
    assert given(x).layout.segments[0].shape == (40, 50)
    assert [s.shape for s in given(x.reshape(-1)).layout.segments] == [(1024, 1), (976,)]
    found = advise(comm, 10**6, specs)
    assert found.elements == 10**6 and len(found.notes) == 1
    assert "tau=0.5" in found.notes[0] and "strom:density=0.001" in found.notes[0]


@pytest.mark.mpi
@pytest.mark.parametrize("gradient, told", [
    (np.zeros(0, np.float32), "0 elements"), (np.array([1.0, np.nan]), "1 of them not finite"),
    (np.arange(3), "arrays of floats expected"), ("nowhere.npy", "numpy.save"),
    ({"a": np.full(2, 1e39)}, "2 of them not finite")])
def test_what_is_no_gradient(gradient, told, comm):
    with pytest.raises(SpecError, match=told):
        advise(comm, gradient=gradient)


@pytest.mark.mpi(min_size=2)
def test_a_gradient_that_one_rank_has_not_is_the_same_error_on_all(comm):
    with pytest.raises(SpecError, match="rank 1: gradient: an element or more"):
        advise(comm, gradient=np.zeros(5 if comm.rank != 1 else 0))
    with pytest.raises(SpecError, match="the same number expected"):
        advise(comm, gradient=np.ones(5 + comm.rank))


def test_a_rule_that_has_a_threshold_is_told_of():
    methods = [catalogue.method(spec) for spec in (
        "rule(*.bias:dense; strom:tau=0.5)", "strom:density=0.1", "dense", "dropping",
        "strom:feedback=no")]
    notes = advice.unit_free(methods)
    assert [note.split(":")[0] for note in notes] == ["rule", "strom"]


def test_plan_of_a_file(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(trial, "SAMPLE", 1 << 14)
    np.save(tmp_path / "g.npy", np.ones((10, 20)))
    assert cli.main(["plan", "--gradient", str(tmp_path / "g.npy"), "--methods", "strom"]) == 0
    printed = capsys.readouterr().out
    assert "200 elements" in printed and "tried on the gradient given" in printed
    assert "note" not in printed
    assert cli.main(["plan", "--gradient", "1e4", "--methods", "strom"]) == 0
    printed = capsys.readouterr().out
    assert "heavy tails" in printed and "note: strom" in printed
    assert cli.main(["plan", "--gradient", "no.npy"]) == 2
    assert "rank 0: no.npy: a gradient written by numpy.save" in capsys.readouterr().err


@pytest.mark.parametrize("words", [
    "plan --ranks 0", "plan --ranks 2 two", "plan --gradient 0", "bench allreduce --sizes 10 0",
    "bench allreduce --rounds 0", "bench allreduce --sizes inf", "bench step --steps 0",
    "bench kernels --rounds -1", "bench kernels --elements 1e-3"])
def test_numbers_of_which_there_is_nothing_to_measure(words, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(words.split())
    assert ended.value.code == 2
    assert f"{words.split()[-1]} found, expected a whole number of at least 1" in \
        capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("words, told", [
    ("--only nosuch", "--only nosuch found, expected a part of one of strom:tau=31.6, "),
    ("--elements 100", "--elements 100 found, expected at least 4096")])
def test_kernels_that_do_not_exist(words, told, capsys):
    assert cli.main(["bench", "kernels", "--rounds", "1", *words.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"mpicomp bench: {told}") and error.count("\n") == 1
