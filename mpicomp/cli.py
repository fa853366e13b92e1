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
        run=show_methods)
    commands.add_parser("doctor", help="say what is installed, and what to type if it is not"
                        ).set_defaults(run=doctor)
    return parser.parse_args(arguments).run()


def show_methods() -> int:
    """Each method, what it is, and its options with their defaults."""
    from dataclasses import fields

    from mpicomp.compressor import find
    from mpicomp.exchange import EXCHANGES

    for name, summary in mpicomp.methods().items():
        print(f"{name:10} {summary}")
        print(f"{'':10}   {mpicomp.method(name)!r}")
        for f in fields(find(name)):
            choices = f.metadata["choices"]
            print(f"{'':10}   {f.name}: {f.metadata['doc']}"
                  + (f" ({', '.join(choices)})" if choices else ""))
    print(f"\nfor all: exchange={'|'.join(EXCHANGES)}, feedback=yes|no")
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
