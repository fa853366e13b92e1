"""What this package keeps with a communicator, as an attribute of it that MPI itself carries.

A communicator of the user's has a shelf with the duplicates that were made of it: those that are in
use, and those that a closed Reducer has left for the next. Each duplicate has a shelf of its own,
with the communicators that were made of it in turn. So nothing needs to be freed, which all ranks
would have to do together, and an MPI with 2,048 communicators (MPICH) does not run out of them.
"""

import numpy as np

from mpicomp.mpi import watchdog

NUMBERED = 1024  # duplicates of one communicator at a time that can be used again

_keyval = None


class Shelf:
    """Of one communicator.

    above    the shelf of the communicator that it was made of, or None
    number   among the duplicates of that one, by which ranks agree on one; None if it has none
    timeout  seconds that a wait on this communicator may take; None: as long as on the one above
    open     a call was given up and may yet end: nobody else may use it
    kept     {name: communicator made of this one, which stays}
    free     {number: duplicate of this one that nobody uses}
    used     numbers of all duplicates that were ever made
    dog      of a communicator of the user's: answers where this rank is, see watchdog.py
    """

    def __init__(self, above=None, number=None):
        self.above, self.number, self.timeout, self.open = above, number, None, False
        self.kept, self.free, self.used, self.dog = {}, {}, set(), None

    @property
    def line(self):
        """This shelf and all above it."""
        shelf = self
        while shelf is not None:
            yield shelf
            shelf = shelf.above


def of(comm) -> Shelf:
    """The shelf of a communicator; an empty one where it had none."""
    shelf = comm.Get_attr(_key())
    if shelf is None:
        put(comm, shelf := Shelf())
    return shelf


def put(comm, shelf):
    """Give a communicator this shelf."""
    comm.Set_attr(_key(), shelf)


def bits(present) -> np.ndarray:
    """Numbers of duplicates as an array of bits, for an agreement."""
    found = np.zeros(NUMBERED, np.uint8)
    found[list(present)] = 1
    return np.packbits(found)


def numbers(array) -> list:
    """What `bits` made bits of, ascending."""
    return np.flatnonzero(np.unpackbits(array)).tolist()


def family(comm) -> list:
    """The communicator and all that is kept with it, and with those."""
    return [comm, *(one for kept in of(comm).kept.values() for one in family(kept))]


def _key():
    global _keyval
    if _keyval is None:
        from mpi4py import MPI

        _keyval = MPI.Comm.Create_keyval(delete_fn=_clear)
    return _keyval


def _clear(comm, _, shelf):
    """The user frees a communicator, on all ranks: what nobody uses on any of them goes with it.

    The rest stays: a communicator that is freed on some ranks only would let messages of the others
    come out in one that is made later.
    """
    from mpi4py import MPI

    from mpicomp.mpi import waiting

    if comm in (MPI.COMM_WORLD, MPI.COMM_SELF):  # MPI ends
        return
    mine = bits(shelf.free)
    common, dog = mine.copy(), shelf.kept.get("dog")
    if dog is not None:
        try:
            waiting.wait(dog, dog.Iallreduce(mine, common, MPI.BAND), waiting.limit(dog),
                         "freeing a communicator")
        except Exception:
            return
    for one in [*(shelf.free[n] for n in numbers(common)), *shelf.kept.values()]:
        watchdog.forget(one)
        one.Free()
    shelf.kept, shelf.free, shelf.dog = {}, {}, None
