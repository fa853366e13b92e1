"""method="auto": predictions are the arithmetic of docs/planning.md; dense wins when in doubt."""

import json

import pytest

from mpicomp import SpecError, advice, cli, systems
from mpicomp.advice import Codec, Link, advise, predict

N, P = 1_000_000, 4
LINKS = {"gather": Link(1e-3, 2e-9), "reduce": Link(2e-3, 3e-9)}
CODEC = Codec(encode=1e-9, decode=2e-9, bytes=0.125)


@pytest.mark.parametrize("spec, encode, wire, decode", [
    ("onebit", 1e-3, 1e-3 + 2e-9 * 3 * N / 8, 4 * 2e-3),
    ("onebit:exchange=sharded", 1e-3 * 1.25 + 5e-3, 2e-3 + 2e-9 * 1.5 * N / 8, 2 * 2e-3 + 10e-3),
    ("dense", 0.0, 2e-3 + 3e-9 * 1.5 * N / 8, 2e-3)])
def test_predictions_are_the_arithmetic_of_the_manual(spec, encode, wire, decode):
    found = predict(systems.method(spec), CODEC, LINKS, N, P, copy=5e-9)
    assert (found.encode, found.wire, found.decode) == pytest.approx((encode, wire, decode))
    hidden = predict(systems.method(spec), CODEC, LINKS, N, P, hidden=1.0, copy=5e-9)
    assert hidden.total == pytest.approx(encode + decode)


@pytest.mark.mpi
@pytest.mark.parametrize("faster, choice", [(1.2, "dense"), (2.0, "onebit")])
def test_dense_wins_unless_another_is_much_faster(faster, choice, comm, monkeypatch):
    """In shared memory a compressed method that is only predicted to be a bit faster is not."""
    whole = 4e-9 * N  # seconds of a dense exchange, all of them in the codec
    costs = {"dense": whole, "onebit": whole / faster}
    monkeypatch.setattr(advice, "measure_links", lambda comm: dict.fromkeys(LINKS, Link(0.0, 0.0)))
    monkeypatch.setattr(advice, "measure_codec", lambda method, comm: Codec(
        0.0, costs[method.name] / N / (1 if method.name == "dense" else comm.size), 1.0))
    found = advise(comm, N, ("dense", "onebit"))
    expected = "dense" if comm.size == 1 else choice
    assert systems.method(found.choice).name == expected
    assert ("nothing to exchange" if comm.size == 1 else "ms") in found.reason


def test_one_rank_has_no_links_to_predict_from(comm):
    """What a call takes grows with its size also where nobody receives a byte."""
    links = advice.measure_links(comm)
    assert {link.per_byte for link in links.values()} == {0.0}
    with pytest.raises(SpecError, match="launch/run -n 2"):
        advise(comm, N, ("onebit",), ranks=4)


def test_plan_on_one_rank_says_nothing_of_others(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(advice, "SAMPLE", 1 << 14)
    path = tmp_path / "plan.json"
    assert cli.main(["plan", "--gradient", "1e6", "--methods", "onebit", "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "P=" not in printed and "Gbit/s" not in printed
    assert "nothing to exchange" in printed and "launch/run -n 2 -m mpicomp plan" in printed
    assert json.loads(path.read_text())["ranks"] == 1


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
