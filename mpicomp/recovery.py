"""Recovery: where a rank dies, those that are left take its last step back and go on without it.

What lasts changes only when all ranks are through with the exchange of a step, and ULFM's agreement
(MPI_Comm_agree) says so on all that are alive, the same on each. Until then parameters, optimizer
and residuals are those of the step before: to take a step back nothing has to be copied. The
question is asked when a rank's packets have arrived and answered while it decodes them.
docs/fault-tolerance.md says what survives what.

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
from mpicomp.reducer import Reducer

if TYPE_CHECKING:
    from mpi4py import MPI

T = TypeVar("T")

SPIN = 20  # looks for the others' votes without a sleep between them
HEARSAY = 1.0  # seconds after a revocation in which the library names the dead rank


class Recovery:
    """Runs the pieces of a training; where a rank has died, again on those that are left.

        recovery = mpicomp.Recovery(reducer, model)
        for step in range(steps):
            recovery.run(train, step)           # forward, backward, optimizer.step(): once, last
            if (step + 1) % 100 == 0:
                recovery.run(report, step)      # evaluation, checkpoint: may be done twice
        recovery.leave()

    reducer    an attached Reducer, which moves to fewer ranks (`Reducer.regroup`)
    model      its buffers are put back before a step is done again, as are torch's and Python's
               random numbers
    comm       what the user's code communicates on, by default COMM_WORLD
    keep       keep() -> anything, called before each piece, restore(it) before it is done again:
               whatever else a forward or backward pass changes
    regrouped  regrouped(self), on all that are left, before the piece is done again: to divide the
               data anew, and to make again what the user has made of `comm`
    least      fewer ranks than these do not go on

    `comm`, `rank` and `size` change where a rank has died: use them, and no other communicator,
    in a piece. `lost` has a dictionary for each loss: step, ranks (as numbered at the start), left,
    residuals (how many that were owed are lost), norm (of this rank's own, to judge them by),
    noticed (seconds since 1970), seconds (from then to going on).

    `active` is False, with the reason in `why`, where this MPI cannot do it or was not asked to;
    pieces are then run once, and a dead rank ends the job. Where the method cannot lose a rank
    (`Reducer.irreplaceable`), `run` raises DeadRankError on all that are left.
    """

    def __init__(self, reducer: Reducer, model: torch.nn.Module | None = None,
                 comm: "MPI.Comm | None" = None, *, keep: Callable[[], Any] | None = None,
                 restore: Callable[[Any], object] | None = None,
                 regrouped: Callable[["Recovery"], object] | None = None, least: int = 1) -> None:
        self.reducer, self.model, self.least = reducer, model, least
        self._keep, self._restore, self._regrouped = keep, restore, regrouped
        limit = reducer._pipeline.timeout
        self.comm, self._base = (mpi.communicator(comm, limit, "starting Recovery")
                                 for _ in range(2))
        self._members = list(range(self.comm.size))
        self._tracked, self.lost = [], []
        self._committed = self._late = False
        self.why = _missing()
        self.active = self.why is None
        self._votes = self.active and reducer.irreplaceable is None
        if self._votes:
            reducer._guard = self
        note = self.why or reducer.irreplaceable
        if note and self.comm.size > 1:
            reducer.stats.notes.append(f"a dead rank ends this job: {note}")
            if self.rank == 0:
                print(f"mpicomp: {reducer.stats.notes[-1]}", file=sys.stderr)

    @property
    def rank(self) -> int:
        """This rank among those that are left."""
        return self.comm.rank

    @property
    def size(self) -> int:
        """How many ranks are left."""
        return self.comm.size

    def track(self, comm: "MPI.Comm") -> "MPI.Comm":
        """Revoke this communicator, too, where a rank has died. To be made anew in `regrouped`."""
        self._tracked.append(mpi.intracommunicator(comm))
        return comm

    # ---- a piece ----

    def run(self, work: Callable[..., T], *args: Any) -> T:
        """work(*args), a piece that all ranks run; what it returned where nobody died in it.

        A piece makes one step of the optimizer, after which it does not communicate, or none, and
        then doing it twice must do no harm. Raises DeadRankError where the ranks that are left
        cannot go on.
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
        """What a forward or backward pass changes, besides gradients."""
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
        """Nothing is posted to a rank that is known to be dead."""
        if self._died():
            raise DeadRankError("a rank has died between two pieces")

    def _died(self, error=None) -> bool:
        """Does this error say that a rank has died, or is that known anyway?

        Open MPI's blocking collectives may return without an error, and without the data of a rank
        that died meanwhile: what comes of such data is no error of the user's.
        """
        failed = self._base.Get_failed()
        dead = failed.size
        failed.Free()
        return bool(mpi.dead_rank(error) or self._late or dead or self.comm.Is_revoked())

    # ---- the vote ----

    @contextmanager
    def commit(self):
        """Asked at its beginning, known at its end: are all through with the exchange?

        DeadRankError, on all that are left alike, if not.
        """
        vote = self._ask(not self._died())
        yield
        self._committed = self._answer(vote)
        if not self._committed:
            raise Undone("a rank has died before this step's packets were everywhere")

    @contextmanager
    def tail(self):
        """What follows a step that all have agreed on: a death in here concerns the next piece."""
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
        """(request, array) of an agreement: the least of all votes, the same on every rank."""
        vote = np.array([mine], np.int32)
        return self._base.Iagree(vote), vote

    def _answer(self, asked) -> bool:
        """Has everybody who is alive voted 1? That some are dead is found out elsewhere."""
        request, vote = asked
        start, looks, timeout = perf_counter(), 0, self.reducer._pipeline.timeout
        try:
            while not request.Test():
                looks += 1
                if looks > SPIN:
                    sleep(min(2e-5 * (looks - SPIN), 1e-3))
                if perf_counter() - start > timeout:
                    mpi.keep(asked)
                    raise StallError(
                        f"rank {self.rank} waited {timeout:g} s for the others to agree on step "
                        f"{self.reducer.step}: they made other pieces, or are slower than "
                        "stall_timeout allows")
        except Exception as error:
            if not mpi.dead_rank(error):
                raise
        return bool(vote[0])

    # ---- after a death ----

    def _revoke(self):
        """Nobody may go on waiting for a rank that has left."""
        for comm in [self.comm, *self._tracked, *self.reducer.communicators]:
            comm.Revoke()

    def _recover(self, error):
        """Shrink to those that are left, with everything as before the piece."""
        start, noticed = perf_counter(), time()
        self._revoke()
        reason = self.reducer.irreplaceable
        if self._committed:
            reason = ("it communicated after optimizer.step(): what follows the step must be a "
                      "piece of its own")
        if reason:
            names = self._known_dead()
            raise DeadRankError(
                f"{_ranks([self._members[r] for r in names])} died in step {self.reducer.step}, "
                f"and this piece cannot be done without: {reason}. The newest checkpoint goes on"
            ) from error
        if not isinstance(error, Undone):
            self._answer(self._ask(0))
        self._late = False
        dead = self._shrink()
        elements, norm = self._owed()
        self.lost.append(dict(step=self.reducer.step, ranks=dead, left=self.size,
                              residuals=elements * len(dead), norm=norm, noticed=noticed,
                              seconds=perf_counter() - start))
        if self.rank == 0:
            print(f"mpicomp: {_ranks(dead)} died in step {self.reducer.step}, which {self.size} "
                  f"do again{self._loss()}", file=sys.stderr, flush=True)

    def _known_dead(self):
        """The ranks of `_base` that are known to be dead.

        A rank that was woken up by another's revocation hears of the death itself a moment later,
        if it lets MPI work.
        """
        start = perf_counter()
        while True:
            with suppress(Exception):  # that there is a dead rank
                self._base.Iprobe()
            dead = self._base.Get_failed().Translate_ranks(None, self._base.Get_group()) or []
            if len(dead) or perf_counter() - start > HEARSAY:
                return dead
            sleep(1e-3)

    def _shrink(self):
        """Regroup over the ranks that are left until nobody dies meanwhile; returns who died."""
        dead = []
        while True:
            base = self._base.Shrink()
            places = self._base.Get_group().Translate_ranks(None, base.Get_group())
            here = [place >= 0 for place in places]
            dead += [m for m, alive in zip(self._members, here) if not alive]
            self._members = [m for m, alive in zip(self._members, here) if alive]
            self._base = base
            if base.size < self.least:
                raise DeadRankError(f"{_ranks(dead)} died and {base.size} are left, fewer than "
                                    f"least={self.least}. The newest checkpoint goes on")
            if self._answer(self._ask(self._regroup() and not self._died())):
                return dead

    def _regroup(self) -> bool:
        """Move everything to the ranks of `_base`; False if one of those died, too."""
        made = []
        try:
            made.append(self._base.Shrink())  # as a duplicate, but one that is always made
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
        """(how many residuals this rank has, their norm)."""
        arrays = [array for mail in self.reducer._mail
                  for kind, array in mail.persistent().items() if kind.startswith("error")]
        return (sum(a.size for a in arrays),
                float(np.sqrt(sum(float(np.dot(a, a)) for a in arrays))))

    def _loss(self):
        lost = self.lost[-1]
        return (f". Lost is what it still owed, {lost['residuals']:,} residuals; the norm of rank "
                f"0's own is {lost['norm']:.3g}" if lost["residuals"] else "")

    # ---- the end ----

    def leave(self, status: int = 0) -> None:
        """End this process with `status`, when all that are left have come here.

        Where `active`, not by way of MPI_Finalize, which may wait for the dead, nor of Python's
        atexit. Elsewhere returns at once.
        """
        if not self.active:
            return
        if self._votes:
            self._answer(self._ask(1))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


class Undone(DeadRankError):
    """All that are left know already that the piece has not been done."""


def _missing():
    """Why ULFM cannot be used, or None."""
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


def _ranks(ranks):
    """rank 1, 2"""
    return "rank " + (", ".join(map(str, sorted(ranks))) or "unknown")
