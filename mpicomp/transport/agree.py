"""Compare the ranks' configurations; if they differ, raise the same error on every rank."""

from hashlib import blake2b

import numpy as np

from mpicomp import mpi
from mpicomp.errors import MismatchError, SpecError


def digest(text: str) -> int:
    """A 64-bit hash of a text."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


def agree(comm, facts: dict, hint="every rank must be started with the same arguments",
          timeout=None) -> int:
    """Compare `facts` (name -> value or list of lines) over all ranks; returns their digest.

    Raises MismatchError on every rank, naming the first rank and fact that differ from rank 0's.
    A rank that has found an error of its own passes it as the fact "problem", so that the others do
    not wait for it; if all ranks have the same problem it is a SpecError. Raises StallError if the
    others do not come within `timeout` seconds (None: the communicator's limit).
    Collective; 16 bytes per rank if all agree.
    """
    mine = digest("\n".join(f"{name}: {value}" for name, value in facts.items()))
    timeout = mpi.limit(comm) if timeout is None else timeout
    told = np.array([mine, "problem" in facts], np.uint64)
    heard = np.zeros((comm.size, 2), np.uint64)
    mpi.wait(comm, comm.Iallgather(told, heard), timeout, "comparing configurations")
    if (heard == told).all() and "problem" not in facts:
        return mine
    everyone = mpi.allgather(comm, facts, "comparing configurations", timeout)
    problems = [theirs.get("problem") for theirs in everyone]
    if len(set(problems)) == 1 and problems[0]:
        raise SpecError(problems[0])
    for rank, problem in enumerate(problems):
        if problem:
            raise MismatchError(f"rank {rank}: {problem}")
    for rank, theirs in enumerate(everyone):
        difference = first_difference(everyone[0], theirs)
        if difference:
            raise MismatchError(f"rank {rank} and rank 0 differ in {difference}; {hint}")
    raise MismatchError(f"rank {comm.rank}: all facts agree, but the ranks' digests of them differ "
                        f"(here {mine:016x}): please report this")  # unreachable but for a bug


def first_difference(zero: dict, other: dict) -> str | None:
    """Describe the first fact in which `other` differs from rank 0's; None if none does.

    Ranks with another version of this package may have other facts, or facts of other types.
    """
    for name in [*zero, *(name for name in other if name not in zero)]:
        expected, found = zero.get(name, "nothing"), other.get(name, "nothing")
        if not (isinstance(expected, (list, tuple)) and isinstance(found, (list, tuple))):
            if found != expected:
                return f"{name}: {_in_words(found)} there, {_in_words(expected)} on rank 0"
            continue
        for i in range(max(len(expected), len(found))):
            here = expected[i] if i < len(expected) else "nothing more"
            there = found[i] if i < len(found) else "nothing more"
            if there != here:
                return f"{name} {i}: {there} there, {here} on rank 0"
    return None


def _in_words(value):
    """The value for an error message: of a list, only its length."""
    return f"a list of {len(value)}" if isinstance(value, (list, tuple)) else value
