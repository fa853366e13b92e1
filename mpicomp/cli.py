"""The command `mpicomp`: lists methods, checks the installation, measures, launches, migrates."""

import argparse
import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import mpicomp


def main(arguments=None) -> int:
    """Run one sub-command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="mpicomp", description=mpicomp.__doc__.splitlines()[0])
    parser.add_argument("--version", action="version", version=f"mpicomp {mpicomp.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("methods", help="list the methods and their options").set_defaults(
        run=lambda _: show_methods())
    commands.add_parser("doctor", help="say what is installed, and what to type if it is not"
                        ).set_defaults(run=lambda _: doctor())
    plan = commands.add_parser("plan", help="predict every method's time here, and say what to use")
    plan.add_argument("--gradient", type=_gradient, default=25_000_000, metavar="N or FILE",
                      help="elements of the model's gradient (default: %(default)s), or one of "
                           "yours to try codecs on, written by numpy.save or numpy.savez")
    plan.add_argument("--hidden", type=float, default=0.0, metavar="S",
                      help="seconds of exchange that backward can hide (default: none)")
    plan.add_argument("--ranks", nargs="*", type=_number, default=[2, 4, 8, 16, 64], metavar="P")
    plan.add_argument("--methods", nargs="+", metavar="SPEC", default=None)
    plan.add_argument("--json", metavar="FILE", help="write the figures there")
    plan.set_defaults(run=advise)
    _launch_command(commands.add_parser(
        "launch", help="write a Slurm script for your command: mpicomp launch --slurm -- COMMAND"))
    _migrate_command(commands.add_parser(
        "migrate", help="print a DeepSpeed configuration as a program, or convert a checkpoint"))
    _bench_commands(commands.add_parser("bench", help="measure, in turn with MPI and torch"))
    options = parser.parse_args(arguments)
    options.words = sys.argv[1:] if arguments is None else list(arguments)
    try:
        return options.run(options)
    except mpicomp.MpicompError as error:
        print(f"mpicomp {options.command}: {error}", file=sys.stderr)
        return 2


def _launch_command(parser):
    parser.add_argument("--slurm", action="store_true", required=True,
                        help="the batch system (there is no other yet)")
    parser.add_argument("--mpi", choices=("pmix", "pmi2", "mpirun"),
                        help="who starts the ranks: srun with this plugin, or mpirun of Open MPI "
                             "(default: the plugin that fits the MPI library here)")
    for name, default, about in (("nodes", 2, "nodes"), ("cpus", 1, "cores for each rank"),
                                 ("gpus-per-node", 0, "GPUs, and so ranks, on each node"),
                                 ("warning", 180, "seconds before the time limit at which it is "
                                                  "told to save")):
        parser.add_argument(f"--{name}", type=_count, default=default, metavar="N",
                            help=f"{about} (default: %(default)s)")
    parser.add_argument("--ranks-per-node", type=_count, metavar="N",
                        help="default: one, or one for each GPU")
    parser.add_argument("--time", default="1:00:00", help="limit (default: %(default)s)")
    parser.add_argument("--name", default="mpicomp", help="of the job (default: %(default)s)")
    parser.add_argument("--finished", default="", metavar="FILE",
                        help="a file that your command leaves when all is done, relative to the "
                             "folder in which sbatch is typed; the script removes an older one")
    parser.add_argument("--setup", action="append", default=[], metavar="LINE",
                        help="a line of shell to go before, such as 'module load openmpi'; again "
                             "for another")
    parser.add_argument("--sbatch", action="append", default=[], metavar="OPTION",
                        help="another option for sbatch, as in --sbatch=--partition=gpu")
    parser.add_argument("-o", "--output", metavar="FILE", help="write it there, not to the screen")
    parser.add_argument("program", nargs="*", metavar="COMMAND", help="after --: what a rank runs")
    parser.set_defaults(run=launch)


def _migrate_command(parser):
    parser.add_argument("config", nargs="?", metavar="ds_config.json",
                        help="what to print as a Python program, with notes")
    parser.add_argument("--ranks", type=_number, metavar="P",
                        help="how many there will be (default: as many as it is started with)")
    parser.add_argument("--checkpoint", metavar="FILE",
                        help="TAG/mp_rank_00_model_states.pt: write its weights and its "
                             "optimizer's moments, by name, for torch.optim.AdamW")
    parser.add_argument("--groups", metavar="FILE",
                        help="JSON, a list of names or patterns for each group of the optimizer: "
                             "needed where it has several")
    parser.add_argument("-o", "--output", default="adamw.pt", metavar="FILE",
                        help="where the checkpoint goes (default: %(default)s)")
    parser.set_defaults(run=migrate)


def _count(text):
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def _number(text):
    """A whole number of at least 1, also as 25e6."""
    try:
        number = int(float(text))
    except (ValueError, OverflowError):
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} found, expected a whole number of at least 1")
    return number


def _gradient(text):
    """The number of elements of a gradient, or the name of a file that holds one."""
    return text if text.endswith((".npy", ".npz")) else _number(text)


def launch(options) -> int:
    """Write a batch script. Raises LaunchError."""
    from mpicomp import slurm

    mpi = options.mpi or slurm.launcher_for(_library())
    text = slurm.script(
        options.program, mpi=mpi, made_by=shlex.join(["mpicomp", *options.words]),
        setup=options.setup, finished=options.finished, name=options.name, nodes=options.nodes,
        ranks_per_node=options.ranks_per_node or options.gpus_per_node or 1, cpus=options.cpus,
        gpus_per_node=options.gpus_per_node, time=options.time, warning=options.warning,
        extra=options.sbatch)
    if mpi == "mpirun" and not options.finished:
        print("mpicomp launch: mpirun can end with status 0 after it lost a node; --finished FILE "
              "names a file that tells whether all is done", file=sys.stderr)
    if not options.output:
        print(text, end="")
        return 0
    try:
        Path(options.output).write_text(text)
    except OSError as error:
        raise mpicomp.LaunchError(f"{options.output}: {error.strerror}") from None
    print(f"written; type: sbatch {shlex.quote(options.output)}")
    return 0


def migrate(options) -> int:
    """Translate DeepSpeed's files. Raises SpecError or CheckpointError."""
    from mpicomp.compat import deepspeed

    if not options.config and not options.checkpoint:
        raise mpicomp.SpecError("nothing to do: type  mpicomp migrate ds_config.json  or  mpicomp "
                                "migrate --checkpoint TAG/mp_rank_00_model_states.pt")
    if options.config:
        print(deepspeed.config_file(options.config, options.ranks), end="")
    if options.checkpoint:
        for note in deepspeed.checkpoint_file(options.checkpoint, options.output, options.groups):
            print(f"# {note}")
        print(f"""\
saved = torch.load({options.output!r}, weights_only=True)
model.load_state_dict(saved["model"])
optimizer.load_state_dict(saved["optimizer"])""")
    return 0


def _library():
    """The MPI library's version text, from a separate process that does not initialise MPI."""
    code = ("import mpi4py; mpi4py.rc.initialize = False; from mpi4py import MPI; "
            "print(MPI.Get_library_version())")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        raise mpicomp.LaunchError(
            f"no MPI library here to choose a launcher for "
            f"({(done.stderr.strip().splitlines() or ['?'])[-1]}); "
            "choose with --mpi pmix, pmi2 or mpirun")
    return done.stdout


def _bench_commands(parser):
    kinds = parser.add_subparsers(dest="kind", required=True)
    allreduce = kinds.add_parser("allreduce", help="the mean of N floats over the ranks present")
    allreduce.add_argument("--sizes", nargs="+", type=_number, metavar="N",
                           default=[10_000, 1_000_000, 25_000_000])
    step = kinds.add_parser("step", help="seconds per training step, against torch's DDP on gloo")
    step.add_argument("--model", default="cnn", choices=("cnn", "transformer", "mlp"))
    step.add_argument("--steps", type=_number, default=4, help="timed steps in each round")
    step.add_argument("--plot", metavar="FILE", help="draw the stages of a step there (matplotlib)")
    step.add_argument("--progress", nargs="+", default=["auto"], choices=("auto", "poll", "thread"),
                      metavar="WAY", help="auto, poll or thread; several: each method with each")
    step.add_argument("--no-peers", dest="peers", action="store_false", help="leave out DDP")
    codec = kinds.add_parser("kernels", help="what each codec costs, against memcpy; one process")
    codec.add_argument("--elements", type=_number, default=25_030_656, metavar="N")
    codec.add_argument("--backend", help="reference or cpu (default: all that are here)")
    codec.add_argument("--only", default="", help="methods whose name holds this")
    codec.add_argument("--rounds", type=_number, default=15, help="turns of each case")
    codec.add_argument("--json", metavar="FILE", help="write the figures there")
    codec.add_argument("--plot", metavar="FILE", help="draw the ratios there (matplotlib)")
    codec.set_defaults(run=bench, methods=())
    for kind, rounds in ((allreduce, 10), (step, 5)):
        kind.add_argument("--methods", nargs="+", metavar="SPEC",
                          default=["dense", "terngrad", "onebit", "strom:tau=3"])
        kind.add_argument("--rounds", type=_number, default=rounds, help="turns of each contender")
        kind.add_argument("--json", metavar="FILE", help="write the figures there")
        kind.set_defaults(run=bench)


def bench(options) -> int:
    """Run one benchmark on the ranks present; rank 0 prints the figures and writes files."""
    for spec in options.methods:
        mpicomp.method(spec)
    from mpicomp import mpi
    from mpicomp.bench import timing

    if options.kind == "kernels":
        from mpicomp.bench import kernels

        result = kernels.run(options.elements, options.rounds, options.backend, options.only,
                             options.plot)
        if options.json:
            timing.write_json(options.json, {**timing.surroundings(), **result})
        return 0
    if options.kind == "allreduce":
        from mpicomp.bench import allreduce

        result = allreduce.run(options.methods, options.sizes, options.rounds)
    else:
        from mpicomp.bench import step

        result = step.run(options.model, options.methods, options.rounds, options.steps,
                          options.peers, options.progress)
        if options.plot and mpi.load().COMM_WORLD.rank == 0:
            from mpicomp.bench.picture import draw

            print(draw(result, options.plot), flush=True)
    if options.json and mpi.load().COMM_WORLD.rank == 0:
        timing.write_json(options.json, {**timing.surroundings(), **result})
    return 0


def advise(options) -> int:
    """Measure links and codecs on the ranks present, and print predictions."""
    from mpicomp import advice, mpi
    from mpicomp.bench import plan, timing

    result = plan.run(options.gradient, options.hidden, options.methods or advice.CANDIDATES,
                      options.ranks)
    if options.json and mpi.load().COMM_WORLD.rank == 0:
        timing.write_json(options.json, {**timing.surroundings(), **result})
    return 0


def show_methods() -> int:
    """Print the seven systems with sources, variants and options; then all other methods."""
    from mpicomp import variants

    print(variants.listing())
    return 0


def doctor() -> int:
    """Print versions and the MPI library; the exit status is 1 if training cannot start."""
    print(f"mpicomp {mpicomp.__version__}, Python {platform.python_version()}, {sys.executable}")
    print(f"from     {whence()}")
    for package in ("numpy", "torch", "mpi4py", "cupy"):
        print(f"{package:8} {_installed(package)}")
    print(f"kernels  {kernels_verdict()}")
    try:
        from mpicomp import mpi

        MPI = mpi.load()
    except mpicomp.MpicompError as error:
        print(f"MPI      {error}")
        return 1
    library = MPI.Get_library_version().split("\0")[0].splitlines()[0]
    print(f"MPI      {library}; {MPI.COMM_WORLD.size} rank(s) in this job")
    print(f"GPU      {gpu_verdict()}")
    return 0


def whence() -> str:
    """The folder of this mpicomp, and whether it hides an installed one."""
    from mpicomp import installed

    other = installed.shadowed()
    return str(installed.HERE) + (f", not the installed {other}: the working directory or "
                                  "PYTHONPATH stands before it; leave that folder if you did not "
                                  "mean this one" if other else "")


def kernels_verdict() -> str:
    """Which kernels serve host memory, and what to type if they are not the compiled ones."""
    from mpicomp import kernels

    compiled = kernels.backends().get("cpu")
    if compiled is None:
        return f"NumPy's only, 5 to 50 times slower than compiled ones {kernels.cure()}"
    return "compiled, " + ("no vector instructions", "AVX2", "AVX-512")[compiled.vectors()]


def gpu_verdict() -> str:
    """Which GPU there is, and whether MPI may be given its memory; one line."""
    from mpicomp.kernels.gpu.device import Cupy
    from mpicomp.transport import probe

    try:
        runtime = Cupy().cupy.cuda.runtime
        name = runtime.getDeviceProperties(runtime.getDevice())["name"].decode()
    except Exception as error:
        return f"none that can be used: {' '.join(str(error).split())}"
    if probe.says_cuda() is False:
        return (f"{name}; packets pass through page-locked host memory, for this MPI says that it "
                "was built without CUDA")
    try:
        said = probe.verdicts()
    except OSError as error:
        return (f"{name}; packets pass through page-locked host memory: what MPI takes cannot be "
                f"remembered ({error}); set XDG_CACHE_HOME to a folder that can be written")
    way = "MPI is given device memory" if probe.direct() else \
        "packets pass through page-locked host memory"
    return f"{name}; {way}: " + ", ".join(f"{call} {word}" for call, word in said.items())


def _installed(package):
    """The version of an installed package; CuPy's wheels have names of their own."""
    for name in (package, f"{package}-cuda13x", f"{package}-cuda12x"):
        try:
            return version(name)
        except PackageNotFoundError:
            pass
    return "not installed"
