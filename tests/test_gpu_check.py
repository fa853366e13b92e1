"""jobs/gpu_check.sh refuses where there is no GPU, and its parts work on the CPU's shim."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from shim import arrays
from shim.device import COMPILER, Shim

from mpicomp.errors import DeviceError
from mpicomp.kernels.gpu import device

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "jobs" / "gpu_check.sh"
sys.path.insert(0, str(SCRIPT.parent))

import gpu_check  # noqa: E402


def gpu_here():
    try:
        device.Cupy()
    except DeviceError:
        return False
    return True


def run(*arguments, **environment):
    return subprocess.run([str(SCRIPT), *arguments], text=True, capture_output=True, timeout=50,
                          env={"PATH": "/usr/bin:/bin", "PYTHON": sys.executable, **environment})


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
@pytest.mark.limit(120)
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
    case = {"bytes": 1000, "encode_share": 0.5, "decode_share": 0.25}
    (tmp_path / "bench.json").write_text(json.dumps(
        {"elements": 1024, "copy_bytes_per_second": 1e12, "cases": {"onebit": case}}))
    gpu_check.report(tmp_path, "A GPU", str(tmp_path / "result"))
    written = json.loads((tmp_path / "result.json").read_text())
    assert written["gpu"] == "A GPU" and written["parts"]["parity"]["verdict"] == "passed"
    assert written["parts"]["parity"]["says"] == ["all bytes and floats are equal"]
    table = (tmp_path / "result.md").read_text()
    assert "0.50" in table and "1000 GB/s" in table and "not run: no tool" in table
