"""A Shelf for each communicator: which others were made of it, kept as an MPI attribute of it.

The shelf of a user's communicator holds its duplicates: those in use, and those that a closed
Reducer has released for the next. Each duplicate has a shelf of its own, with the communicators
made of it. So nothing has to be freed, which would be a collective call, and an MPI that has 2,048
communicators at most (MPICH) does not run out of them.
"""

import numpy as np

NUMBERED = 1024  # most duplicates of one communicator that can be used again

_keyval = None


class Shelf:
    """What is known of one communicator.

    above    the shelf of the communicator that this one was made of, or None
    number   of this duplicate of the one above, by which the ranks agree which to use; or None
    timeout  seconds that a wait on this communicator may take; None: as on the one above
    open     a call on it was given up and may still end, so nobody else may use it
    kept     {name: communicator made of this one}, to stay
    free     {number: duplicate of this one that nobody uses}
    used     numbers of all duplicates ever made of this one
    dog      of a user's communicator: the watchdog.Dog that answers for this rank, or None
    """

    def __init__(self, above=None, number=None):
        self.above, self.number, self.timeout, self.open = above, number, None, False
        self.kept, self.free, self.used, self.dog = {}, {}, set(), None

    @property
    def line(self):
        """This shelf, the one above it, and so on up to the user's communicator."""
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
    """Numbers of duplicates as a bit field, uint8[NUMBERED / 8], which MPI can AND over ranks."""
    found = np.zeros(NUMBERED, np.uint8)
    found[list(present)] = 1
    return np.packbits(found)


def numbers(array) -> list:
    """The numbers in a bit field of `bits`, ascending."""
    return np.flatnonzero(np.unpackbits(array)).tolist()


def family(comm) -> list:
    """The communicator, all that are kept with it, and all that are kept with those."""
    return [comm, *(one for kept in of(comm).kept.values() for one in family(kept))]


def _key():
    global _keyval
    if _keyval is None:
        from mpi4py import MPI

        _keyval = MPI.Comm.Create_keyval(delete_fn=_clear)
    return _keyval


def _clear(comm, _, shelf):
    """MPI calls this when the user frees a communicator: free those that no rank uses, too.

    The others stay: if one were freed on some ranks only, messages that the other ranks send on it
    could arrive in a communicator that is made later.
    """
    from mpi4py import MPI

    from mpicomp.mpi import waiting, watchdog  # which import this module

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
