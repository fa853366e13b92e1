"""Whether MPI takes device pointers: asked of other processes, remembered, said by the doctor."""

import json
import socket
from pathlib import Path

import numpy as np
import pytest
from shim.fake_cupy import FakeCupy

import mpicomp
from mpicomp import cli
from mpicomp.errors import DeviceError
from mpicomp.kernels.gpu import device
from mpicomp.mpi import start
from mpicomp.transport import calls, probe


@pytest.mark.mpi
@pytest.mark.parametrize("call", probe.CALLS)
def test_each_call_is_tried(call, comm):
    """On host memory it brings the right bytes; where what arrives is not what was sent, none."""
    for size in probe.SIZES:
        assert probe.right(comm, call, size, np.copy, np.asarray)
        assert not probe.right(comm, call, size, np.copy, lambda buffer: buffer ^ 1)


def test_the_calls_are_those_that_exchanges_make():
    source = Path(calls.__file__).read_text()
    made = {name for name in ("Iallgather", "Iallgatherv", "Ialltoallv", "Isend", "Iallreduce")
            if f"].{name}," in source}
    assert made - {"Iallreduce"} == set(probe.CALLS)


RIGHT = "echo host right; echo host right; "
JOBS = {
    RIGHT + "echo device right; echo device right": "yes",
    RIGHT + "echo device right; echo device wrong; exit 1": "no: wrong bytes",
    RIGHT + "echo device right; kill -11 $$": "no: signal 11",
    RIGHT + "echo '[vm] *** Process received signal 11 (Segmentation fault)' >&2; exit 139":
        "no: signal 11 (Segmentation fault)",
    RIGHT + "echo device right; echo device right; exit 3": "no: it ended without a message",
    "echo 'no slots' >&2; exit 1": "not known: the probe did not run (no slots)",
    "echo host right; echo host wrong; exit 1":
        "not known: the probe did not run (it ended without a message)",
}


@pytest.mark.parametrize("job", JOBS)
def test_the_verdict_of_a_job(job):
    assert probe.ask("Isend", ["sh", "-c", job]) == JOBS[job]


def test_a_job_without_an_end_is_ended(monkeypatch):
    monkeypatch.setattr(probe, "LIMIT", 1)
    said = probe.ask("Isend", ["sh", "-c", RIGHT + "sleep 100"])
    assert said == "no: no end after 1 s"


def test_the_job_is_no_part_of_this_one(monkeypatch):
    """What a launcher told this rank is not passed on; what the user set for MPI is."""
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "1")
    monkeypatch.setenv("PMIX_RANK", "1")
    monkeypatch.setenv("OMPI_MCA_pml", "ucx")
    job = 'test "$OMPI_COMM_WORLD_RANK$PMIX_RANK$OMPI_MCA_pml" = ucx && echo host right'
    said = probe.ask("Isend", ["sh", "-c", job + " && echo host right; exit 1"])
    assert said.startswith("no:")


def test_without_mpirun(monkeypatch):
    monkeypatch.setattr(probe, "launcher", list)
    assert probe.ask("Isend").startswith("not known: there is no mpirun")


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """The calls that a job was made for; each says yes. Verdicts are kept in a new folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(probe, "says_cuda", lambda: None)
    calls = []
    monkeypatch.setattr(probe, "ask", lambda call: calls.append(call) or "yes")
    return calls


def test_what_was_found_is_remembered(asked, monkeypatch):
    assert probe.direct() and asked == list(probe.CALLS)
    assert probe.direct() and len(asked) == len(probe.CALLS)
    key, = json.loads(probe.cache_file().read_text())
    assert key.startswith(f"{socket.gethostname()} | ") and "MPI" in key
    monkeypatch.setattr(probe, "here", lambda: "another host")
    assert probe.direct() and len(asked) == 2 * len(probe.CALLS)
    probe.cache_file().write_text("{broken")
    assert probe.direct() and len(asked) == 3 * len(probe.CALLS)


def test_where_nothing_can_be_kept_nothing_is_tried(asked, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert not probe.direct() and not asked


def test_one_call_that_fails_is_enough(asked, monkeypatch):
    monkeypatch.setattr(probe, "ask", lambda call: "yes" if call != "Ialltoallv" else "no: signal")
    assert not probe.direct() and probe.verdicts()["Iallgather"] == "yes"


def test_a_library_without_cuda_is_believed(asked, monkeypatch):
    monkeypatch.setattr(probe, "says_cuda", lambda: False)
    assert not probe.direct() and not asked


def test_this_library_says_something_or_nothing():
    assert probe.says_cuda() in (True, False, None)


def test_the_doctor_says_in_one_line_that_there_is_no_gpu(monkeypatch):
    def none(self):
        raise DeviceError("CuPy finds no GPU:\n nvidia-smi should list one")

    monkeypatch.setattr(device.Cupy, "__init__", none)
    assert cli.gpu_verdict() == ("none that can be used: CuPy finds no GPU: nvidia-smi should list "
                                 "one")


def test_the_doctor_prints_the_verdict(asked, monkeypatch):
    cupy = FakeCupy.__new__(FakeCupy)
    super(FakeCupy, cupy).__init__("cupy")
    runtime = type("Runtime", (), {"getDevice": staticmethod(lambda: 0), "getDeviceProperties":
                                   staticmethod(lambda number: {"name": b"A GPU"})})
    cupy.cuda = type("Cuda", (), {"runtime": runtime})
    monkeypatch.setattr(device, "_import_cupy", lambda: cupy)
    assert cli.gpu_verdict() == ("A GPU; MPI is given device memory: Iallgather yes, Iallgatherv "
                                 "yes, Ialltoallv yes, Isend yes")
    monkeypatch.setattr(probe, "says_cuda", lambda: False)
    assert "page-locked" in cli.gpu_verdict() and "built without CUDA" in cli.gpu_verdict()


def test_the_place_of_a_rank_on_its_node(monkeypatch):
    for variable in start._LOCAL_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    assert mpicomp.local_rank() == 0
    monkeypatch.setenv("SLURM_LOCALID", "0")  # of the batch script
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_RANK", "3")
    assert mpicomp.local_rank() == 3
