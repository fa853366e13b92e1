"""Which packet goes to whom: one file for each exchange, and the table of them."""

from mpicomp.errors import SpecError

SYNCHRONOUS = ("allgather", "allreduce", "hierarchical", "sharded", "silent")
ASYNCHRONOUS = ("peers", "server")
EXCHANGES = SYNCHRONOUS + ASYNCHRONOUS


def exchange(name):
    """The exchange class called `name`; SpecError lists what exists."""
    if name not in EXCHANGES:
        raise SpecError(f"no exchange is called {name!r}; there are: {', '.join(EXCHANGES)}")
    from importlib import import_module

    return getattr(import_module(f"mpicomp.exchange.{name}"), name.capitalize())
