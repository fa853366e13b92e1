"""What sharded sends does not depend on the number of ranks: one job of 8, in groups of 2, 4, 8."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEADER = 32
COLUMNS, ROWS = 64, 160
SPECS = {  # bytes of a column of 160 rows, and bytes of every packet besides
    "onebit:exchange=sharded": (8 + 20, 0),
    "onebit:exchange=sharded,own=raw": (8 + 20, 0),
    "dryden:exchange=sharded,own=raw,sample=exact,proportion=16": (8 + 2 * 5 * 4, 4),
    "dropping:exchange=sharded,rate=0.9,sample=exact": (16 * 8, 0),
}
PROGRAM = f"""
import json, sys
import numpy as np
import torch
import mpicomp
from mpi4py import MPI

world, found = MPI.COMM_WORLD, {{}}
# every column has 80 negative and 80 other elements, every rank the same ones, no two alike
x = np.linspace(0.1, 1, {ROWS * COLUMNS}).astype(np.float32).reshape({ROWS}, {COLUMNS})
x[::2] *= -1
for size in (2, 4, 8):
    comm = world.Split(world.rank // size)
    for spec in {list(SPECS)!r}:
        w = torch.nn.Parameter(torch.zeros({ROWS}, {COLUMNS}))
        reducer = mpicomp.Reducer([("w", w)], spec, comm)
        (w * torch.from_numpy(x)).sum().backward()
        reducer.finish()
        found.setdefault(spec, {{}})[size] = [reducer.stats.sent, reducer.stats.received]
everything = world.gather(found)
if world.rank == 0:
    print(json.dumps(everything))
"""


@pytest.fixture(scope="module")
def receipts(tmp_path_factory):
    """{spec: {ranks: [bytes sent, bytes received]}} from each of 8 ranks."""
    program = tmp_path_factory.mktemp("eight") / "program.py"
    program.write_text(PROGRAM)
    job = subprocess.run(
        [sys.executable, ROOT / "launch" / "run", "--python", sys.executable, "-n", "8",
         "--timeout", "150", program], capture_output=True, text=True, timeout=170)
    assert job.returncode == 0, job.stdout + job.stderr
    return json.loads(next(line for line in job.stdout.splitlines() if line.startswith("[{")))


@pytest.mark.limit(180)
@pytest.mark.parametrize("spec", SPECS)
def test_sharded_sends_the_same_with_2_4_and_8_ranks(spec, receipts):
    """Every column's bytes once, to its owner or from it; for each of P packets a header and what
    a packet has besides. What arrives is 2 (P - 1) / P of the columns, and 2 (P - 1) packets."""
    column, besides = SPECS[spec]
    for ranks in (2, 4, 8):
        sent = COLUMNS * column + ranks * (besides + HEADER)
        received = 2 * (ranks - 1) * (COLUMNS // ranks * column + besides + HEADER)
        assert [found[spec][str(ranks)] for found in receipts] == [[sent, received]] * 8
