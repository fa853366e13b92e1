"""Connection: what of a Reducer belongs to one communicator, and how it moves to another."""

from contextlib import nullcontext

import numpy as np

from mpicomp import catalogue
from mpicomp import mpi
from mpicomp.errors import SpecError
from mpicomp.mpi.watchdog import Watchdog
from mpicomp.reducer.memory import on_place
from mpicomp.transport.agree import digest
from mpicomp.transport.calls import Calls


class Unguarded:
    """What a step does where no Recovery watches over it: nothing. See recovery.py."""

    commit = tail = staticmethod(nullcontext)


class Connection:
    """The part of the Reducer that opens exchanges, and opens them again over fewer ranks."""

    _guard = Unguarded()

    def _open(self, method):
        """The exchange of a method and its mail for every bucket."""
        exchange = self._open_exchange(method)
        return exchange, self._open_mail(exchange, method)

    def _open_exchange(self, method):
        exchange = method.open(self._wire)
        refusal = exchange.check(method.compressor)
        if refusal:
            mpi.release(self.comm)
            raise SpecError(refusal)
        return exchange

    @on_place
    def _open_mail(self, exchange, method):
        return [exchange.open(method.compressor, bucket.layout, bucket.index, bucket.flight,
                              self._plan, self.seed) for bucket in self._buckets]

    def _choose(self):
        """method="auto": measure links and codecs, and take what is predicted to be fastest."""
        from mpicomp.advice import advise

        self.advice = advise(self.comm, sum(p.numel() for _, p in self._named))
        self.method = catalogue.method(self.advice.choice)
        self._plan ^= digest(self.advice.choice)
        self.stats.notes.append(f"auto took {self.method!r}: {self.advice.reason}")

    @property
    def communicators(self) -> list:
        """All that this Reducer calls MPI on, to revoke them where a rank has died."""
        found = [*mpi.family(self.comm), *self._wire.communicators, *self._exchange.communicators]
        if self._warm:
            found += self._warm[0].communicators
        return list({id(comm): comm for comm in found}.values())

    def regroup(self, comm) -> None:
        """Go on over `comm`, whose ranks are some of the present ones, where the last step ended.

        Collective over `comm`. A step that was begun has never happened: packets under way are
        forgotten, every p.grad is None, this rank's residuals are those of the last step that was
        applied. What the ranks that are gone still owed is lost. As after load_state_dict on so
        many ranks, the second residuals of elements that others own now join the first.
        With delay=1 or an asynchronous exchange it is refused: packets under way are the past.
        """
        if refusal := self.irreplaceable:
            raise SpecError(f"regroup: {refusal}")
        mpi.keep(self._pipeline.abandon())
        limit = self._pipeline.timeout
        self.comm = mpi.communicator(comm, limit, "moving a Reducer to fewer ranks")
        order = np.array(self._order.next or self._order.now, np.int32)
        # whoever died in the first step may have told it to some only
        mpi.wait(self.comm, self.comm.Ibcast(order), limit, "agreeing on buckets")
        pipeline = self._pipeline.over(self.comm)
        self._wire = Calls(self.comm, self.stats)
        exchange = self._open_exchange(self.method)
        warm = (self._open_exchange(self._warm_method), []) if self._warm else None
        # from here on no MPI: either all of it has changed or nothing
        self._pipeline, self._exchange, self._warm = pipeline, exchange, warm
        self._order.regroup(order.tolist())
        self._watchdog = Watchdog(self)
        if self._receipt:
            self._receipt.comm = self.comm
            self._receipt.restart(self.step)
        self._finished, self._next, self._checked = False, 0, False
        self._stepped.clear()
        self._changes.reset()
        self._forget_gradients()

    @property
    def irreplaceable(self) -> str | None:
        """Why this Reducer cannot go on where a rank has died, or None."""
        if self._exchange.asynchronous:
            return (f"exchange={self.method.exchange} applies packets as they come, and nobody "
                    "knows which of a dead rank's have come where")
        if self._delay:
            return "delay=1 has a gradient under way that nobody can take back"
        if self.method.adagrad:
            return "adagrad=yes keeps the sums of squares with the owners, and nowhere else"
        return None
