"""`mpicomp bench kernels` measures every backend and method, and writes what it says it writes."""

import json

import pytest

from mpicomp import cli, kernels, systems
from mpicomp.bench import kernels as bench


@pytest.fixture
def figures(tmp_path, capsys):
    """The JSON of a run on a small array."""
    path = tmp_path / "kernels.json"
    assert cli.main(["bench", "kernels", "--elements", "4096", "--rounds", "2",
                     "--json", str(path)]) == 0
    return json.loads(path.read_text()), capsys.readouterr().out


def test_every_backend_and_method_is_measured(figures):
    result, printed = figures
    assert set(result["backends"]) == set(kernels.backends())
    methods = {name for name in systems.METHODS if name not in ("auto", "rule")}
    for name, found in result["backends"].items():
        assert {label.split(",")[0].split(":")[0] for label in found["cases"]} == methods
        for label, case in found["cases"].items():
            for what in ("encode", f"decode {bench.PEERS}"):
                ratio = case[what]["ratio_to_memcpy"]
                assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"], (name, label, what)
            assert label in printed
    assert {"cpu", "command", "cores", "threads", "noisy"} <= set(result)


def test_the_time_of_memcpy_is_told_for_as_many_elements_as_the_case_has(monkeypatch):
    clock = iter([1.0, 3.0])
    monkeypatch.setattr(bench, "perf_counter", lambda: next(clock))
    memcpy = bench.Memcpy(100, bench.np.random.default_rng(0))
    assert memcpy.of(25)() == 0.5
    assert (memcpy.target == memcpy.source).all()
