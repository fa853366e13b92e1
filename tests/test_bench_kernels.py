"""`mpicomp bench kernels` measures every backend and method, and writes what it says it writes."""

import json

import numpy as np
import pytest

from mpicomp import catalogue, cli, kernels
from mpicomp.bench import kernels as bench
from mpicomp.bench import settled
from mpicomp.layout import Layout


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
    methods = {name for name in catalogue.METHODS if name not in ("auto", "rule")}
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


@pytest.mark.parametrize("shape", [(5000,), (128, 40)])
def test_codecs_are_timed_with_the_residual_that_many_steps_leave(monkeypatch, shape):
    monkeypatch.setattr(settled, "PART", 1024)
    monkeypatch.setattr(settled, "STEPS", 200)
    monkeypatch.setattr(settled, "SLOW", 200)
    layout = Layout.of([("gradient", shape)])
    compressor = catalogue.method("strom:tau=4").compressor
    grad = np.zeros(layout.size, np.float32)
    state = compressor.init(layout, grad)
    settled.settle(compressor, layout, state, np.random.default_rng(0))
    owed, = compressor.persistent(state).values()
    assert 1 < owed.std() < 4 and np.abs(owed).max() < 8  # a walk that is sent back at 4
    few = 1024 if len(shape) == 1 else 1024 // shape[0]
    owed = owed.reshape(shape)
    assert (owed[..., few:2 * few] == owed[..., :few]).all() and owed[..., :few].std() > 1
