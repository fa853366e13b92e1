"""Finds out whether this MPI takes device pointers, in jobs of its own, and keeps the result.

What a library reports may be wrong, and a wrong guess ends in a segmentation fault. So two ranks
try each kind of call that exchanges make, first on host memory and then on device memory, in a
separate job (`python -m mpicomp.transport.probe CALL`). The result is kept in the user's cache
directory, by host, library and version. A library that reports to be built without CUDA is
believed. Reductions are not tried: they always use host memory.
"""

import ctypes
import fcntl
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np

CALLS = ("Iallgather", "Iallgatherv", "Ialltoallv", "Isend")
LIMIT = 60  # seconds for one call's job
SIZES = (1, 1000, 1 << 20)  # bytes per rank: libraries send small and large messages differently
OURS = re.compile(r"OMPI_(?!MCA_|ALLOW_)|PMIX_|PRTE_|PMI_|HYDRA_|MPI_LOCAL|SLURM_")


# ---- asked by users ----------------------------------------------------------------------------


def direct() -> bool:
    """May every call of `CALLS` be given device memory? Probes those that have no kept result.

    False, too, if results cannot be kept, since every rank would then start jobs in every run.
    """
    try:
        return says_cuda() is not False and all(said == "yes" for said in verdicts().values())
    except OSError:
        return False


def verdicts() -> dict:
    """{call: "yes" or why not}, from the cache; missing ones are probed, once per host.

    Raises OSError if they cannot be kept.
    """
    file = cache_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the other ranks of this host wait, and then read
        known = _read(file)
        mine = known.setdefault(here(), {})
        missing = [call for call in CALLS if call not in mine]
        for call in missing:
            mine[call] = ask(call)
        if missing:
            aside = file.with_suffix(".new")
            aside.write_text(json.dumps(known, indent=1))
            aside.replace(file)
    return {call: mine[call] for call in CALLS}


def cache_file() -> Path:
    """The file that keeps verdicts; delete it to probe again."""
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder) / "mpicomp" / "device-pointers.json"


def _read(file) -> dict:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return {}


def here() -> str:
    """The key of kept verdicts: host, MPI library and its version."""
    from mpi4py import MPI

    library = MPI.Get_library_version().split("\0")[0].splitlines()[0].strip()
    return f"{socket.gethostname()} | {library}"


def says_cuda() -> bool | None:
    """What the library reports (MPIX_Query_cuda_support); None if it has no such function."""
    from mpi4py import MPI

    try:
        return bool(ctypes.CDLL(MPI.__file__).MPIX_Query_cuda_support())
    except (OSError, AttributeError):
        return None


# ---- a job for each call -----------------------------------------------------------------------


def ask(call, command=None) -> str:
    """The verdict of a job that tries one call on two ranks."""
    command = command or launcher()
    if not command:
        return "not known: there is no mpirun beside this Python or on PATH"
    environment = {k: v for k, v in os.environ.items() if not OURS.match(k)} | {"PATH": _path()}
    job = subprocess.Popen([*command, sys.executable, "-m", __spec__.name, call], text=True,
                           stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                           stderr=subprocess.PIPE, env=environment, start_new_session=True)
    try:
        said, complaint = job.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        os.killpg(job.pid, 9)
        said, complaint = job.communicate()
        complaint = f"no end after {LIMIT} s"
    else:
        complaint += f"\nkilled by signal {-job.returncode}" if job.returncode < 0 else ""
    lines = said.split("\n")
    if lines.count("host right") < 2:  # so the job shows nothing about device memory
        return f"not known: the probe did not run ({_last(complaint)})"
    if lines.count("device right") == 2 and job.returncode == 0:
        return "yes"
    return f"no: {'wrong bytes' if 'device wrong' in lines else _last(complaint)}"


def _last(text):
    """The signal that ended the job, else the last line that has a word."""
    signal = re.search(r"[Ss]egmentation fault|signal \d+[^\n]*", text)
    words = [line.strip() for line in text.splitlines() if re.search(r"\w", line)]
    return signal[0] if signal else (words or ["it ended without a message"])[-1]


def launcher() -> list:
    """The command line that starts two ranks here; [] if there is no mpirun."""
    mpirun = shutil.which("mpirun", path=_path()) or shutil.which("mpiexec", path=_path())
    if not mpirun:
        return []
    version = subprocess.run([mpirun, "--version"], stdin=subprocess.DEVNULL, text=True,
                             capture_output=True, env=os.environ | {"PATH": _path()}).stdout
    words = [mpirun, "-n", "2"]
    if "Open MPI" in version:
        words += ["--oversubscribe", "--bind-to", "none"]
        words += ["--allow-run-as-root"] if os.geteuid() == 0 else []
    return words


def _path():
    """PATH with this Python's folder first, which Intel's mpirun needs."""
    return os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)])


# ---- what its ranks do -------------------------------------------------------------------------


def right(comm, call, size, there, back) -> bool:
    """Does one call deliver the right bytes?

    there(array) is a copy for MPI to use, back(buffer) a NumPy array. `size` is bytes per rank.
    """
    ranks, me = comm.size, comm.rank
    mine = np.random.default_rng(me).integers(0, 256, size * ranks, np.uint8)
    others = [np.random.default_rng(r).integers(0, 256, size * ranks, np.uint8)
              for r in range(ranks)]
    if call == "Isend":
        after, before = (me + 1) % ranks, (me - 1) % ranks
        send, receive = there(mine), there(np.zeros_like(mine))
        requests = [comm.Irecv(receive, before), comm.Isend(send, after)]
        expected = others[before]
    elif call == "Ialltoallv":
        lengths = [size] * ranks
        send, receive = there(mine), there(np.zeros_like(mine))
        requests = [comm.Ialltoallv([send, lengths], [receive, lengths])]
        expected = np.concatenate([o[me * size:][:size] for o in others])
    else:
        send, receive = there(mine[:size]), there(np.zeros_like(mine))
        whole = [receive, [size] * ranks] if call == "Iallgatherv" else receive
        requests = [getattr(comm, call)(send, whole)]
        expected = np.concatenate([o[:size] for o in others])
    for request in requests:
        request.Wait()
    return bool((back(receive) == expected).all())


def main(call) -> int:
    """One rank of the job: tries host memory, then the GPU's; returns how many were wrong."""
    from mpicomp.kernels.gpu.device import Cupy
    from mpicomp.mpi.start import local_rank

    cupy = Cupy().cupy
    cupy.cuda.Device(local_rank() % cupy.cuda.runtime.getDeviceCount()).use()
    from mpi4py import MPI

    def there(array):
        moved = cupy.asarray(array)
        cupy.cuda.get_current_stream().synchronize()
        return moved

    comm, wrong = MPI.COMM_WORLD, 0
    for name, to, back in (("host", np.copy, np.asarray), ("device", there, cupy.asnumpy)):
        fine = all([right(comm, call, size, to, back) for size in SIZES])
        print(f"{name} {'right' if fine else 'wrong'}", flush=True)
        wrong += not fine
    return wrong


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
