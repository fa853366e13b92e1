"""The command `mpicomp`: what methods there are, and whether this machine is ready."""

import argparse
import platform
import sys
from importlib.metadata import PackageNotFoundError, version

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
    plan.add_argument("--gradient", type=lambda text: int(float(text)), default=25_000_000,
                      metavar="N", help="elements of the model's gradient (default: %(default)s)")
    plan.add_argument("--hidden", type=float, default=0.0, metavar="S",
                      help="seconds of exchange that backward can hide (default: none)")
    plan.add_argument("--ranks", nargs="*", type=int, default=[2, 4, 8, 16, 64], metavar="P")
    plan.add_argument("--methods", nargs="+", metavar="SPEC", default=None)
    plan.add_argument("--json", metavar="FILE", help="write the figures there")
    plan.set_defaults(run=advise)
    _bench_commands(commands.add_parser("bench", help="measure, in turn with MPI and torch"))
    options = parser.parse_args(arguments)
    try:
        return options.run(options)
    except mpicomp.MpicompError as error:
        print(f"mpicomp {options.command}: {error}", file=sys.stderr)
        return 2


def _bench_commands(parser):
    kinds = parser.add_subparsers(dest="kind", required=True)
    allreduce = kinds.add_parser("allreduce", help="the mean of N floats over the ranks present")
    allreduce.add_argument("--sizes", nargs="+", type=lambda text: int(float(text)),
                           default=[10_000, 1_000_000, 25_000_000], metavar="N")
    step = kinds.add_parser("step", help="seconds per training step, against torch's DDP on gloo")
    step.add_argument("--model", default="cnn", choices=("cnn", "transformer", "mlp"))
    step.add_argument("--steps", type=int, default=4, help="timed steps in each round")
    step.add_argument("--plot", metavar="FILE", help="draw the stages of a step there (matplotlib)")
    step.add_argument("--progress", nargs="+", default=["auto"], choices=("auto", "poll", "thread"),
                      metavar="WAY", help="auto, poll or thread; several: each method with each")
    step.add_argument("--no-peers", dest="peers", action="store_false", help="leave out DDP")
    codec = kinds.add_parser("kernels", help="what each codec costs, against memcpy; one process")
    codec.add_argument("--elements", type=lambda text: int(float(text)), default=25_030_656,
                       metavar="N")
    codec.add_argument("--backend", help="reference or cpu (default: all that are here)")
    codec.add_argument("--only", default="", help="methods whose name holds this")
    codec.add_argument("--rounds", type=int, default=15, help="turns of each case")
    codec.add_argument("--json", metavar="FILE", help="write the figures there")
    codec.add_argument("--plot", metavar="FILE", help="draw the ratios there (matplotlib)")
    codec.set_defaults(run=bench, methods=())
    for kind, rounds in ((allreduce, 10), (step, 5)):
        kind.add_argument("--methods", nargs="+", metavar="SPEC",
                          default=["dense", "terngrad", "onebit", "strom:tau=3"])
        kind.add_argument("--rounds", type=int, default=rounds, help="turns of each contender")
        kind.add_argument("--json", metavar="FILE", help="write the figures there")
        kind.set_defaults(run=bench)


def bench(options) -> int:
    """Run one benchmark on the ranks present; rank 0 prints and writes."""
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
    """Measure links and codecs on the ranks present and predict."""
    from mpicomp import advice, mpi
    from mpicomp.bench import plan, timing

    result = plan.run(options.gradient, options.hidden, options.methods or advice.CANDIDATES,
                      options.ranks)
    if options.json and mpi.load().COMM_WORLD.rank == 0:
        timing.write_json(options.json, {**timing.surroundings(), **result})
    return 0


def show_methods() -> int:
    """The seven systems with their sources, variants and options; then all other methods."""
    from mpicomp import variants

    print(variants.listing())
    return 0


def doctor() -> int:
    """Print versions and the MPI library; the exit status is 1 where training cannot start."""
    print(f"mpicomp {mpicomp.__version__}, Python {platform.python_version()}, {sys.executable}")
    for package in ("numpy", "torch", "mpi4py", "cupy"):
        print(f"{package:8} {_installed(package)}")
    try:
        from mpicomp import mpi

        MPI = mpi.load()
    except mpicomp.MpicompError as error:
        print(f"MPI      {error}")
        return 1
    library = MPI.Get_library_version().split("\0")[0].splitlines()[0]
    print(f"MPI      {library}; {MPI.COMM_WORLD.size} rank(s) in this job")
    return 0


def _installed(package):
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
