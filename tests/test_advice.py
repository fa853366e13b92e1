"""method="auto": predictions are the arithmetic of docs/planning.md; dense wins when in doubt."""

import pytest

from mpicomp import advice, systems
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
