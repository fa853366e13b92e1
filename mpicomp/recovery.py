"""Recovery: when a rank dies, the survivors undo the interrupted step and go on without it.

Parameters, optimizer and residuals change only after all live ranks have agreed, by ULFM's
MPI_Comm_agree, that the exchange of the step is complete everywhere. Until then they are those of
the step before, so undoing a step copies nothing. A rank starts the agreement when its packets have
arrived and decodes them meanwhile. docs/fault-tolerance.md lists which exchange survives what.

Source: Bland, Bouteiller, Herault, Bosilca, Dongarra, "Post-failure recovery of MPI communication
capability", IJHPCA 2013; MPI_Comm_revoke, _shrink, _agree as in Open MPI 5 (mpirun --with-ft ulfm).
"""

import os
import random
import sys
from collections.abc import Callable
from contextlib import contextmanager, suppress
from time import perf_counter, sleep, time
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from mpicomp import mpi
from mpicomp.errors import DeadRankError, StallError
from mpicomp.local import LocalUpdates
from mpicomp.mpi import ranks_text
from mpicomp.reducer import Reducer

T = TypeVar("T")

if TYPE_CHECKING:
    from mpi4py import MPI

SPIN = 20  # polls for the others' votes without a sleep between them
HEARSAY = 1.0  # seconds that the library may take to name the dead rank after a revocation


class Recovery:
    """Runs the pieces of a training, and repeats a piece on the survivors if a rank dies in it.

        recovery = mpicomp.Recovery(reducer, model)
        for step in range(steps):
            recovery.run(train, step)   # forward, backward, optimizer.step(): once, last
            if (step + 1) % 100 == 0:
                recovery.run(report, step)  # evaluation, checkpoint: may be done twice
        recovery.leave()

    reducer    an attached Reducer, or LocalUpdates; it is moved to fewer ranks by its `regroup`
    model      its buffers, and torch's and Python's random states, are restored before a piece is
               repeated
    comm       the communicator of the user's code, by default COMM_WORLD
    keep       keep() is called before each piece, and restore(its result) before a piece is
               repeated: for whatever else a forward or backward pass changes
    regrouped  regrouped(self) is called on all survivors before a piece is repeated: to divide the
               data among them, and to rebuild what was made from `comm`
    least      the least number of survivors that go on

    `comm`, `rank` and `size` change when a rank has died: in a piece use them, and no other
    communicator. `lost` has a dictionary for each loss: step, ranks (as numbered at the start),
    left (survivors), residuals (the number of elements lost), norm (of this rank's own residuals,
    as a measure), noticed (seconds since 1970), seconds (from then until training goes on).

    `active` is False, with the reason in `why`, if this MPI cannot recover or was not started to;
    pieces are then run once, and a dead rank ends the job. If the method cannot lose a rank
    (`Reducer.irreplaceable`), `run` raises DeadRankError on all survivors.
    """

    def __init__(self, reducer: Reducer | LocalUpdates, model: torch.nn.Module | None = None,
                 comm: "MPI.Comm | None" = None, *, keep: Callable[[], Any] | None = None,
                 restore: Callable[[Any], object] | None = None,
                 regrouped: Callable[["Recovery"], object] | None = None, least: int = 1) -> None:
        self.reducer, self.model, self.least = reducer, model, least
        self._keep, self._restore, self._regrouped = keep, restore, regrouped
        limit = reducer.averagers[0].link.timeout
        self.comm, self._base = (mpi.communicator(comm, limit, "starting Recovery")
                                 for _ in range(2))
        self._members = list(range(self.comm.size))
        self._tracked, self.lost = [], []
        self._committed = self._late = False
        self.why = _missing()
        self._votes = self.active and reducer.irreplaceable is None
        for averager in reducer.averagers if self._votes else ():
            averager.guard = self
        note = self.why or reducer.irreplaceable
        if note and self.comm.size > 1:
            note = f"a dead rank ends this job: {note}"
            reducer.averagers[0].stats.notes.append(note)
            if self.rank == 0:
                print(f"mpicomp: {note}", file=sys.stderr)

    @property
    def active(self) -> bool:
        """Does this job survive a dead rank?"""
        return self.why is None

    @property
    def _step(self):
        """The step, or round, that is being made."""
        return self.reducer.averagers[0].step

    @property
    def rank(self) -> int:
        """The number of this rank among the survivors."""
        return self.comm.rank

    @property
    def size(self) -> int:
        """The number of survivors."""
        return self.comm.size

    def track(self, comm: "MPI.Comm") -> "MPI.Comm":
        """Revoke this communicator, too, when a rank has died; `regrouped` must replace it."""
        self._tracked.append(mpi.intracommunicator(comm))
        return comm

    # ---- a piece ----

    def run(self, work: Callable[..., T], *args: Any) -> T:
        """Run work(*args) on all ranks until no rank dies in it; returns its result.

        A piece ends with one optimizer step, after which it does not communicate; or it makes no
        step, and then must be safe to run twice. Raises DeadRankError if the survivors cannot go
        on.
        """
        if not self.active:
            return work(*args)
        while True:
            before, self._committed = self._snapshot(), False
            try:
                self._look()
                result = work(*args)
                if self._votes and not self._committed:
                    self._vote()
                return result
            except Exception as error:
                if not self._died(error):
                    raise
                self._recover(error)
                self._put_back(before)

    def _snapshot(self):
        """A copy of what a forward or backward pass changes, besides gradients."""
        buffers = [] if self.model is None else [b.clone() for b in self.model.buffers()]
        device = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
        return (buffers, torch.get_rng_state(), device, random.getstate(),
                self._keep() if self._keep else None)

    @torch.no_grad()
    def _put_back(self, before):
        buffers, state, device, numbers, kept = before
        for buffer, value in zip(self.model.buffers() if self.model else (), buffers):
            buffer.copy_(value)
        torch.set_rng_state(state)
        if device is not None:
            torch.cuda.set_rng_state_all(device)
        random.setstate(numbers)
        if self._restore:
            self._restore(kept)

    def _look(self):
        """DeadRankError if a rank is known to be dead, so that nothing is posted to it."""
        if self._died():
            raise DeadRankError("a rank has died between two pieces")

    def _died(self, error=None) -> bool:
        """Is this error due to a dead rank, or is one known?

        Open MPI's blocking collectives may return without an error and without the data of a rank
        that died meanwhile, so any exception counts as a death if a rank is known to be dead.
        """
        failed = self._base.Get_failed()
        dead = failed.size
        failed.Free()
        return bool(mpi.dead_rank(error) or self._late or dead or self.comm.Is_revoked())

    # ---- the vote ----

    @contextmanager
    def commit(self):
        """Vote on entry, learn the result on exit: have all ranks completed the exchange?

        If not, raises DeadRankError, on all survivors alike.
        """
        vote = self._ask(not self._died())
        yield
        self._committed = self._answer(vote)
        if not self._committed:
            raise Undone("a rank has died before this step's packets were everywhere")

    @contextmanager
    def tail(self):
        """Block for work after an agreed step: a death in it is handled in the next piece."""
        try:
            yield
        except Exception as error:
            if not self._died(error):
                raise
            self._late = True
            self._revoke()

    def _vote(self):
        if not self._answer(self._ask(not self._died())):
            raise Undone("a rank has died in this piece")

    def _ask(self, mine):
        """Start an agreement; (request, array), which becomes the minimum of all votes."""
        vote = np.array([mine], np.int32)
        return self._base.Iagree(vote), vote

    def _answer(self, asked) -> bool:
        """Did all live ranks vote 1? StallError after the Reducer's timeout."""
        request, vote = asked
        start, looks, timeout = perf_counter(), 0, self.reducer.averagers[0].link.timeout
        try:
            while not request.Test():
                looks += 1
                if looks > SPIN:
                    sleep(min(2e-5 * (looks - SPIN), 1e-3))
                if perf_counter() - start > timeout:
                    mpi.keep(asked)
                    raise StallError(
                        f"rank {self.rank} waited {timeout:g} s for the others to agree on step "
                        f"{self._step}: they made other pieces, or are slower than "
                        "stall_timeout allows")
        except Exception as error:
            if not mpi.dead_rank(error):
                raise
        return bool(vote[0])

    # ---- after a death ----

    def _revoke(self):
        """Revoke all communicators, so that no rank waits for the dead one."""
        for comm in [self.comm, *self._tracked, *self.reducer.communicators]:
            comm.Revoke()

    def _recover(self, error):
        """Shrink to the survivors; DeadRankError if the piece cannot be repeated."""
        start, noticed = perf_counter(), time()
        self._revoke()
        reason = self.reducer.irreplaceable
        if self._committed:
            reason = ("it communicated after optimizer.step(): what follows the step must be a "
                      "piece of its own")
        if reason:
            names = self._known_dead()
            raise DeadRankError(
                f"{ranks_text(self._members[r] for r in names)} died in step {self._step} "
                f"and this piece cannot be repeated without it: {reason}. Restart from the newest "
                "checkpoint.") from error
        if not isinstance(error, Undone):
            self._answer(self._ask(0))
        self._late = False
        dead = self._shrink()
        elements, norm = self._owed()
        self.lost.append(dict(step=self._step, ranks=dead, left=self.size,
                              residuals=elements * len(dead), norm=norm, noticed=noticed,
                              seconds=perf_counter() - start))
        if self.rank == 0:
            print(f"mpicomp: {ranks_text(dead)} died in step {self._step}, which "
                  f"{self.size} do again{self._loss()}", file=sys.stderr, flush=True)

    def _known_dead(self):
        """The ranks of `_base` that are known to be dead.

        A rank that met another's revocation learns of the death itself a moment later, if it calls
        MPI.
        """
        start = perf_counter()
        while True:
            with suppress(Exception):  # which reports the death
                self._base.Iprobe()
            dead = self._base.Get_failed().Translate_ranks(None, self._base.Get_group()) or []
            if len(dead) or perf_counter() - start > HEARSAY:
                return dead
            sleep(1e-3)

    def _shrink(self):
        """Regroup over the survivors until no rank dies meanwhile; returns the dead ranks."""
        dead = []
        while True:
            base = self._base.Shrink()
            places = self._base.Get_group().Translate_ranks(None, base.Get_group())
            here = [place >= 0 for place in places]
            dead += [m for m, alive in zip(self._members, here) if not alive]
            self._members = [m for m, alive in zip(self._members, here) if alive]
            self._base = base
            if base.size < self.least:
                raise DeadRankError(f"{ranks_text(dead)} died and {base.size} are left, fewer than "
                                    f"least={self.least}. Restart from the newest checkpoint.")
            if self._answer(self._ask(self._regroup() and not self._died())):
                return dead

    def _regroup(self) -> bool:
        """Move everything to the ranks of `_base`; False if one of those died, too."""
        made = []
        try:
            made.append(self._base.Shrink())  # a duplicate that is made even if a rank is dead
            self.comm, self._tracked = made[0], []
            if self.size < self._base.size:
                return False
            self.reducer.regroup(self.comm)
            if self._regrouped:
                self._regrouped(self)
            return True
        except Exception as error:
            if not self._died(error):
                raise
            for comm in [*made, *self._tracked, *self.reducer.communicators]:
                comm.Revoke()
            return False

    def _owed(self):
        """(number of elements, norm) of this rank's residuals."""
        arrays = [array for averager in self.reducer.averagers
                  for codec in averager.buckets.codecs
                  for kind, array in codec.persistent().items() if kind.startswith("error")]
        return (sum(a.size for a in arrays),
                float(np.sqrt(sum(float(np.dot(a, a)) for a in arrays))))

    def _loss(self):
        lost = self.lost[-1]
        return (f". Lost is what it still owed, {lost['residuals']:,} residuals; the norm of rank "
                f"0's own is {lost['norm']:.3g}" if lost["residuals"] else "")

    # ---- the end ----

    def leave(self, status: int = 0) -> None:
        """End this process with `status` when all survivors have called this.

        Skips MPI_Finalize, which may wait for the dead, and Python's atexit. Returns at once if not
        `active`.
        """
        if not self.active:
            return
        if self._votes:
            self._answer(self._ask(1))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


class Undone(DeadRankError):
    """All survivors already know that the piece failed."""


def _missing():
    """The reason why ULFM cannot be used, or None."""
    MPI = mpi.load()
    if MPI.COMM_WORLD.size == 1:
        return "this is the only rank"
    if MPI.ERR_PROC_FAILED == MPI.ERR_UNKNOWN or not hasattr(MPI.Comm, "Iagree"):
        return ("this MPI library, or mpi4py, has no ULFM: use Open MPI 5 and mpi4py 4, and "
                "launch/run --with-ft")
    if os.environ.get("OMPI_MCA_mpi_ft_enable", "0").lower() in ("0", "false", "no"):
        return ("mpirun was not asked to survive one: start with  launch/run --with-ft  or  mpirun "
                "--with-ft ulfm")
    return None
