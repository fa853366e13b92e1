"""What sharded sends does not depend on the number of ranks: 2, 4 and, in the slow lane, 8."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import ranks
import torch

import mpicomp

ROOT = Path(__file__).parent.parent
HEADER = 32
COLUMNS, ROWS = 64, 160
SPECS = {  # bytes of a column of 160 rows, and bytes of every packet besides
    "onebit:exchange=sharded": (8 + 20, 0),
    "onebit:exchange=sharded,own=raw": (8 + 20, 0),
    "dryden:exchange=sharded,own=raw,sample=exact,proportion=16": (8 + 2 * 5 * 4, 4),
    "dropping:exchange=sharded,rate=0.9,sample=exact": (16 * 8, 0),
}
PROGRAM = """
import json, sys
sys.path.insert(0, sys.argv[1])
import test_eight_ranks as here
from mpi4py import MPI

found = MPI.COMM_WORLD.gather([here.receipt(spec, MPI.COMM_WORLD) for spec in here.SPECS])
if MPI.COMM_WORLD.rank == 0:
    print(json.dumps(found))
"""


def receipt(spec, comm):
    """[bytes sent, bytes received] by this rank in one step."""
    # every column has 80 negative and 80 other elements, every rank the same ones, no two alike
    x = np.linspace(0.1, 1, ROWS * COLUMNS).astype(np.float32).reshape(ROWS, COLUMNS)
    x[::2] *= -1
    w = torch.nn.Parameter(torch.zeros(ROWS, COLUMNS))
    reducer = mpicomp.Reducer([("w", w)], spec, comm)
    (w * torch.from_numpy(x)).sum().backward()
    reducer.finish()
    return [reducer.stats.sent, reducer.stats.received]


def expected(spec, size):
    """Every column's bytes once, to its owner or from it; for each of P packets a header and what
    a packet has besides. What arrives is 2 (P - 1) / P of the columns, and 2 (P - 1) packets."""
    column, besides = SPECS[spec]
    sent = COLUMNS * column + size * (besides + HEADER)
    return [sent, 2 * (size - 1) * (COLUMNS // size * column + besides + HEADER)]


@pytest.mark.mpi(sizes=(2, 4))
@pytest.mark.parametrize("spec", SPECS)
def test_sharded_sends_the_same_with_2_and_4_ranks(spec, comm):
    assert receipt(spec, comm) == expected(spec, comm.size)


@pytest.mark.slow
def test_sharded_sends_the_same_with_8_ranks(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    job = subprocess.run(
        [sys.executable, ROOT / "launch" / "run", "--python", sys.executable, "-n", "8",
         "--timeout", str(ranks.JOB), program, ROOT / "tests"], capture_output=True, text=True)
    assert job.returncode == 0, job.stdout + job.stderr
    found = json.loads(next(line for line in job.stdout.splitlines() if line.startswith("[[")))
    assert found == [[expected(spec, 8) for spec in SPECS]] * 8
