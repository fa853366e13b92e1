"""Open MPI, MPICH and Intel MPI: synchronous methods end in the same bits on all of them.

Where the other libraries are: MPICOMP_OTHER_PYTHONS=/path/python:/path/python names Pythons that
have torch and mpi4py, each with another MPI beside it. `tests/other_mpi FOLDER` makes two such
environments, prints the line to type, and needs a package index.
"""

import os
import subprocess
import sys

import digests
import pytest
from test_launch import ROOT, RUN

OTHERS = [path for path in os.environ.get("MPICOMP_OTHER_PYTHONS", "").split(":") if path]


def found(python, ranks):
    """(the library, {method: digest}) of a job of this Python's."""
    done = subprocess.run([sys.executable, RUN[1], "--python", python, "-n", str(ranks),
                           ROOT / "tests" / "digests.py"], text=True, capture_output=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    library, = [line.partition(" ")[2] for line in lines if line.startswith("library ")]
    return library, dict(line.split()[1:] for line in lines if line.startswith("digest "))


@pytest.mark.skipif(not OTHERS, reason="MPICOMP_OTHER_PYTHONS names no other MPI: tests/other_mpi")
@pytest.mark.limit(1500)
@pytest.mark.parametrize("ranks", [2, 3])
def test_every_mpi_library_ends_in_the_same_bits(ranks):
    here, expected = found(sys.executable, ranks)
    assert set(expected) == set(digests.METHODS)
    libraries = {here}
    for python in OTHERS:
        library, digest = found(python, ranks)
        libraries.add(library)
        assert digest == expected, f"{library} and {here}"
    assert len(libraries) == len(OTHERS) + 1, libraries
    print("\n".join(sorted(libraries)))
