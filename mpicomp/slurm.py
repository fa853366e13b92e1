"""Writes Slurm batch scripts for a training that saves on a signal and resumes when restarted.

`script` writes one for any command. jobs/train.sbatch does the same for launch/train.py, with the
launcher chosen by a variable; a test compares the parts that both have.
"""

import re
import shlex
from collections.abc import Iterable, Sequence
from typing import Any

from mpicomp.errors import LaunchError

SRUN = "srun --mpi={} --kill-on-bad-exit=0 --wait=30 --cpu-bind=cores"
LAUNCHERS = {
    "pmix": SRUN.format("pmix"),
    "pmi2": SRUN.format("pmi2"),
    "mpirun": 'mpirun -n "$SLURM_NTASKS" --map-by "slot:PE=$SLURM_CPUS_PER_TASK" --bind-to core'}

TRAPS = """\
# USR1 comes before the time limit, to this shell alone: the ranks must hear of it through their
# launcher, save after the same step, and end with status 75. TERM comes to the ranks as well.
asked='' ranks=''    # both may come before there are ranks
pass_on() { echo "USR1: passed on to the ranks"; kill -USR1 "$ranks"; }
trap 'asked=USR1; [ -z "$ranks" ] || pass_on' USR1
trap 'asked=TERM' TERM
"""

HEAD = """\
#!/usr/bin/env bash
# Made by: {made_by}
{directives}
set -uo pipefail

{traps}{setup}
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK    # since Slurm 22.05 srun does not inherit it
export OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK
launch=({launch})
command=({command})
finished={finished}

"""

END = """\
echo "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)), on $SLURM_JOB_NODELIST"
[ -z "$finished" ] || rm -f "$finished"
# A job that is preempted with a grace time: its ranks get TERM, and this shell gets nothing.
preempted() { [[ $(scontrol show job "$SLURM_JOB_ID") =~ ' PreemptTime='[0-9] ]]; }
case $asked in      # heard already: there is no time left to begin
    USR1) status=138 ;;
    TERM) status=143 ;;
    *)  "${launch[@]}" "${command[@]}" &
        ranks=$!
        [ "$asked" != USR1 ] || pass_on
        while kill -0 "$ranks" 2>/dev/null; do wait "$ranks"; done  # a signal ends wait, not them
        wait "$ranks"
        status=$? ;;
esac
# 138: they did not listen yet. Where they never do, that must come to an end.
killed_by_usr1() {
    [ "$asked" = USR1 ] && [ "$status" -eq 138 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 10 ]
}

# mpirun has been seen to end with 0 after it lost a node: a file that the ranks leave when all is
# done is surer than the status, which is all that counts where none is named.
if [ -e "$finished" ] || { [ -z "$finished" ] && [ "$status" -eq 0 ]; }; then
    echo "done"
elif [ "$asked" = TERM ]; then
    echo "ended by Slurm, status $status; what it requeues goes on from the newest checkpoint"
    exit "$status"
elif [ "$status" -eq 75 ] || killed_by_usr1 || preempted; then
    echo "status $status; requeued, to go on from the newest checkpoint"
    scontrol requeue "$SLURM_JOB_ID"
else
    echo "failed: status $status${finished:+, and there is no $finished}; see above" >&2
    echo "to go on from the newest checkpoint: scontrol requeue $SLURM_JOB_ID" >&2
    exit $((status ? status : 1))
fi
"""


def launcher_for(library: str) -> str:
    """The plugin by which srun starts ranks of an MPI library, given MPI_Get_library_version.

    Raises LaunchError for an unknown library.
    """
    if "Open MPI" in library:
        return "pmix"
    if re.search("MPICH|Intel|MVAPICH", library):
        return "pmi2"
    raise LaunchError(f"cannot tell how srun starts ranks of {library.split(chr(10))[0]!r}; choose "
                      f"with --mpi {'|'.join(LAUNCHERS)} (srun --mpi=list shows what there is)")


def directives(*, name: str, nodes: int, ranks_per_node: int, cpus: int, gpus_per_node: int = 0,
               time: str, warning: int = 180, extra: Iterable[str] = ()) -> str:
    """The #SBATCH lines; `extra` has further options of sbatch, such as --partition=gpu.

    `time` is the limit in Slurm's notation; USR1 comes `warning` seconds before it.
    """
    if gpus_per_node and ranks_per_node != gpus_per_node:
        raise LaunchError(f"--gpus-per-node {gpus_per_node} --ranks-per-node {ranks_per_node}: "
                          "expected one rank for each GPU; leave out --ranks-per-node")
    if not re.fullmatch(r"\d+|(\d+-)?\d+(:\d+){0,2}", time):
        raise LaunchError(f"--time {time!r}: expected minutes, or [days-]hours:minutes:seconds")
    if 0 < _seconds(time) <= warning:
        raise LaunchError(f"--time {time} --warning {warning}: the job would be told to save when "
                          f"it starts, and be requeued for ever; expected less than the "
                          f"{_seconds(time)} seconds that it has")
    if not re.fullmatch(r"[\w.+=@-]+", name):
        raise LaunchError(f"--name {name!r}: expected letters, digits and . _ - + = @ only, for "
                          "the log is named after it")
    words = [f"--job-name={name}", f"--nodes={nodes}", f"--ntasks-per-node={ranks_per_node}",
             f"--cpus-per-task={cpus}", f"--time={time}", f"--signal=B:USR1@{warning}",
             "--requeue", "--open-mode=append", "--output=%x-%j.log"]
    if gpus_per_node:
        words[4:4] = ["--gpus-per-task=1"]
    return "\n".join(f"#SBATCH {word}" for word in (*words, *extra))


def _seconds(time):
    """Seconds of a time in Slurm's notation: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S."""
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if not dash and len(parts) < 3:
        parts.insert(0, 0)
    hours, minutes, seconds = [*parts, 0, 0][:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def script(command: Sequence[str], *, mpi: str, made_by: str = "mpicomp.slurm",
           setup: Iterable[str] = (), finished: str = "", **resources: Any) -> str:
    """The text of a batch script that runs `command` (a list of words) on every rank.

    `mpi` is a key of LAUNCHERS, `setup` has lines of shell to run first (module load ...),
    `finished` is a file that the command leaves when it is done; `resources` as for `directives`.
    The command must save and end with status 75 on SIGUSR1 and SIGTERM (mpicomp.checkpoint.Signals)
    and resume when started again. Raises LaunchError.
    """
    if not command:
        raise LaunchError("nothing to run; put your command after --, for example  "
                          "mpicomp launch --slurm -- python train.py --resume")
    if command[0] in ("mpirun", "mpiexec", "srun"):
        raise LaunchError(f"{command[0]} comes from the script itself; put only your own command "
                          "after --, for example  python train.py")
    if "\n" in "".join((*command, finished, made_by)):
        raise LaunchError("a word of the command holds a line break; put it into a script")
    return HEAD.format(
        made_by=made_by, directives=directives(**resources), traps=TRAPS,
        setup="\n".join(("", *setup)), launch=LAUNCHERS[mpi], command=shlex.join(command),
        finished=shlex.quote(finished)) + END
