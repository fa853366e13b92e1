"""jobs/gpu_check.sh refuses where there is no GPU, and its parts work on the CPU's shim."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import ranks
import torch
from shim import arrays
from shim.device import COMPILER, Shim

from mpicomp.compressors.registry import from_spec
from mpicomp.errors import DeviceError
from mpicomp.kernels.gpu import device
from mpicomp.layout import Layout
from mpicomp.philox import Key

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "jobs" / "gpu_check.sh"
sys.path.insert(0, str(SCRIPT.parent))

import gpu_check  # noqa: E402
import torch_codecs  # noqa: E402


def gpu_here():
    try:
        device.Cupy()
    except DeviceError:
        return False
    return True


def run(*arguments, **environment):
    outside = {"PATH": "/usr/bin:/bin", "PYTHON": sys.executable, **environment}
    return subprocess.run([str(SCRIPT), *arguments], text=True, capture_output=True, env=outside,
                          timeout=ranks.JOB)


@pytest.mark.skipif(gpu_here(), reason="there is a GPU here: run jobs/gpu_check.sh itself")
def test_it_refuses_clearly_without_a_gpu():
    before = sorted((ROOT / "jobs" / "results").iterdir())
    done = run()
    assert done.returncode == 2 and not done.stdout
    assert "there is no GPU to check on. DeviceError:" in done.stderr
    assert "pip install 'mpicomp[cuda" in done.stderr or "nvidia-smi" in done.stderr
    assert sorted((ROOT / "jobs" / "results").iterdir()) == before


def test_it_refuses_what_it_does_not_know():
    done = run("--fast")
    assert done.returncode == 2 and "unknown argument --fast" in done.stderr
    done = run(PYTHON="/nowhere/python")
    assert done.returncode == 2 and "run launch/bootstrap" in done.stderr
    assert "--largest 1e6" in run("--help").stdout


def test_the_shell_accepts_it():
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", str(SCRIPT)], check=True)


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler: the CUDA source cannot be run")
def test_parity_tells_equal_from_different(capsys, monkeypatch):
    try:
        device.use(Shim())
        assert gpu_check.parity(257) == 0
        assert "all bytes and floats are equal" in capsys.readouterr().out
        honest = Shim.host

        def off(self, array):
            values = honest(self, array)
            if values.dtype == "float32" and values.size == 33:
                values[32] += 1
            return values

        monkeypatch.setattr(Shim, "host", off)
        assert gpu_check.parity(33, specs=("onebit",)) == 1
        assert "DIFFERS onebit, 33 elements, vector: ['residual', 'sum']" in capsys.readouterr().out
    finally:
        device.use(None)
        arrays.check()


def test_the_report_holds_all_parts(tmp_path):
    (tmp_path / "parts.tsv").write_text("parity\tpassed\t12\nmemcheck\tnot run: no tool\t0\n")
    (tmp_path / "parity.log").write_text("all bytes and floats are equal\n")
    case = {"bytes": 1000, "encode_seconds": 0.005, "encode_share": 0.5, "decode_share": 0.25}
    (tmp_path / "bench.json").write_text(json.dumps(
        {"elements": 1024, "copy_bytes_per_second": 1e12, "cases": {"onebit": case}}))
    (tmp_path / "torch.json").write_text(json.dumps({"onebit": {"seconds": 0.03, "bytes": 1024}}))
    steps = {"dense": 1.0, "onebit": 4.0}
    (tmp_path / "step.json").write_text(json.dumps(
        {"ranks": 4, "parameters": 25_000_000, "cases": {
            spec: {"communication": 0.1 / ratio, "bytes": 10, "ratio": ratio}
            for spec, ratio in steps.items()}}))
    gpu_check.report(tmp_path, "A GPU", str(tmp_path / "result"))
    written = json.loads((tmp_path / "result.json").read_text())
    assert written["gpu"] == "A GPU" and written["parts"]["parity"]["verdict"] == "passed"
    assert written["parts"]["parity"]["says"] == ["all bytes and floats are equal"]
    table = (tmp_path / "result.md").read_text()
    row = next(line for line in table.splitlines() if line.startswith("onebit")).split()
    assert row == ["onebit", "1,000", "0.50", "0.8", "0.25", "0.7", "6.0", "5.0"]
    assert "4 ranks on one GPU" in table and "25.00" in table and "4.00" in table
    assert written["step"]["ranks"] == 4 and written["torch_operations"]["onebit"]["bytes"] == 1024
    assert "0.50" in table and "1000 GB/s" in table and "not run: no tool" in table


def test_a_step_is_taken_apart(capsys):
    """On the CPU and alone: the same code, another device."""
    found = gpu_check.step(1 << 16, device="cpu", rounds=2)
    assert found["ranks"] == 1 and found["parameters"] == 1 << 16
    assert set(found["cases"]) == set(gpu_check.STEPS)
    dense, onebit = found["cases"]["dense"], found["cases"]["onebit"]
    assert dense["ratio"] == 1 and dense["bytes"] > 4 * (1 << 16) > 20 * onebit["bytes"]
    assert "times less than dense" in capsys.readouterr().out


def test_torch_operations_are_timed(capsys):
    found = gpu_check.against_torch(1 << 15, device="cpu", rounds=1)
    assert set(found) == {spec.split(":")[0] for spec, _ in gpu_check.BENCH}
    assert all(case["seconds"] > 0 and case["bytes"] > 0 for case in found.values())


# what mpicomp's compressor is called that says the same
SAME = {"strom": "strom:tau=1.0", "dropping": "dropping:rate=0.99,sample=exact", "onebit": "onebit"}


@pytest.mark.parametrize("name", SAME)
def test_torch_operations_say_the_same(name):
    """The packet where it has one order, and what is then owed, as mpicomp's own compressor."""
    rows, columns = 256, 12
    layout = Layout.of([("m", (rows, columns))])
    rng = np.random.default_rng(5)
    grad, owed = (rng.standard_normal(layout.size, np.float32) for _ in range(2))
    more = {"strom": {"tau": 1.0}, "dropping": {"rate": 0.99, "sample": layout.size}, "onebit": {}}
    packet, rest = torch_codecs.CODECS[name](
        *(torch.from_numpy(a.reshape(rows, columns)) for a in (grad, owed)), **more[name])
    compressor = from_spec(SAME[name])
    room, ahead = np.zeros(compressor.capacity(layout), np.uint8), np.zeros_like(owed)
    used = compressor.encode_owed(grad, owed, room, layout, Key(), compressor.init(layout, grad),
                                  out=ahead)
    assert np.allclose(rest.numpy().reshape(-1), ahead, atol=1e-5)
    assert 0.9 < sum(part.nbytes for part in packet) / used < 1.1
    if name == "strom":
        assert packet[0].numpy().tobytes() == room[:used].tobytes()


@pytest.mark.parametrize("name", ["dorefa", "dryden", "adacomp"])
def test_torch_operations_keep_what_they_do_not_say(name):
    """The residual is small against what was owed where values are sent, and nothing is lost."""
    grad = torch.from_numpy(np.random.default_rng(6).standard_normal((512, 16), np.float32))
    owed = torch.zeros_like(grad)
    _, rest = torch_codecs.CODECS[name](grad, owed)
    said = grad - rest
    assert said.any() and (said * grad).sum() > 0
    if name == "dorefa":
        assert rest.abs().max() <= 2 * grad.abs().max() / 15 * 1.01
    else:
        kinds = torch.unique((said * 1e3).round())
        assert (said.abs() > 1e-6).sum() < grad.numel() / 4 and len(kinds) <= 2 * 16 + 1


def test_torch_operations_are_unbiased_where_the_method_is():
    torch.manual_seed(0)
    grad = torch.randn(64, 8)
    total = torch.zeros_like(grad)
    for _ in range(400):
        (packed, scale), _ = torch_codecs.terngrad(grad, torch.zeros_like(grad), clip=100.0)
        codes = (packed[:, None] >> torch.arange(0, 8, 2) & 3).flatten()[:grad.numel()]
        total += scale * torch.where(codes == 3, -1.0, codes.float()).view_as(grad)
    assert (total / 400 - grad).abs().max() < 5 * scale / 400**0.5
