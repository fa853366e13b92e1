"""launch/bootstrap and launch/run where the machine is unlike the one they were written on."""

import os
import sys

import pytest
from test_launch import ROOT, RUN, finish


@pytest.fixture
def checkout(tmp_path):
    """A checkout with nothing in it but launch/bootstrap."""
    folder = tmp_path / "checkout"
    for name in ("setup.cfg", "setup.py", "pyproject.toml", "launch/constraints.txt",
                 "launch/data-requirements.txt", "mpicomp/kernels/cpu/src/cpu.cpp",
                 "mpicomp/kernels/cpu/src/sums.h"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    (folder / "launch" / "bootstrap").write_text((ROOT / "launch" / "bootstrap").read_text())
    return folder


def program(path, text):
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def bootstrap(checkout, **variables):
    return finish("bash", checkout / "launch" / "bootstrap", **variables)


def test_a_file_system_without_locks_is_said_and_is_no_end(checkout, tmp_path):
    """flock answered "No locks available", and set -e ended everything without a word."""
    program(tmp_path / "bin" / "flock", "echo 'flock: 9: No locks available' >&2; exit 71")
    code, output = bootstrap(checkout, MPICOMP_PYTHON="/no/python",
                             PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    first, second = output.splitlines()
    assert code == 1 and "no locks" in first and "one terminal" in first
    assert "needs Python 3.11 or newer, found /no/python" in second


def test_what_a_linked_venv_points_to_is_not_cleared(checkout, tmp_path):
    other = tmp_path / "somebody's"
    other.mkdir()
    (other / "work").write_text("of a year")
    (checkout / ".venv").symlink_to(other)
    code, output = bootstrap(checkout, MPICOMP_PYTHON=sys.executable)
    assert code == 1 and (other / "work").read_text() == "of a year"
    last = output.splitlines()[-1]
    assert f".venv is a symbolic link to {other}, which would be cleared" in last
    assert last.endswith(f"type: rm {checkout / '.venv'}")


@pytest.fixture
def intel(tmp_path):
    """An environment as the impi-rt wheel makes it: mpirun is a script that goes by PATH."""
    folder = tmp_path / "env" / "bin"
    folder.parent.mkdir()
    program(folder / "mpirun", 'mpiexec.hydra "$@"')
    program(folder / "mpiexec.hydra", '[ "$1" != --version ] && echo ranks: $2 on $PATH || '
                                      'echo "Intel(R) MPI Library for Linux* OS, Version 2021.18"')
    program(folder / "python", "")
    return folder


def test_intel_mpi_of_an_environment_that_is_not_activated(intel):
    run = [*RUN[:2], "--python", intel / "python", "-n", 3]
    code, output = finish(*run, "-c", "1", PATH="/usr/bin:/bin")
    assert (code, output) == (0, f"ranks: 3 on {intel}:/usr/bin:/bin\n")
    code, output = finish(*run, "--dry-run", "-c", "1", PATH="/usr/bin:/bin")
    assert code == 0 and output.startswith(f"PATH={intel}:/usr/bin:/bin {intel / 'mpirun'} -n 3 ")
    assert "-genv MPICOMP_TTY 0" in output
