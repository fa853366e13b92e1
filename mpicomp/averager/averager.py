"""mpicomp.Averager: named arrays in, their mean over the ranks out."""

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mpicomp import mpi
from mpicomp.averager.engine import Engine, resolved
from mpicomp.averager.memory import in_memory, uncompiled
from mpicomp.averager.settings import Settings
from mpicomp.averager.slot import ArraySlot
from mpicomp.averager.startup import averageable
from mpicomp.catalogue import Method
from mpicomp.errors import MismatchError, SpecError
from mpicomp.transport import staging

if TYPE_CHECKING:
    from mpi4py import MPI


class Averager(Engine):
    """Replaces arrays by their mean over ranks, exchanged as `method` says, with its residuals.

    named_arrays   (name, array) pairs or {name: array}: torch tensors, or arrays of NumPy or CuPy,
                   of float32, float16 or (torch) bfloat16. Names, shapes and dtypes are fixed from
                   now on; values are not looked at
    method         a Method or its specification, such as "onebit" or "strom:tau=0.01"; not
                   exchange=server, whose owners need an optimizer
    comm           an MPI communicator; None means COMM_WORLD. A duplicate is used
    average        True: the mean over ranks. False: the sum
    bucket_bytes   arrays travel in pieces of about so many bytes of float32
    seed           of the stochastic methods; ranks and steps draw different numbers from it
    nonfinite      "raise": a NaN or Inf on any rank raises NonFiniteError on all of them.
                   "skip": all ranks leave their arrays as they are, residuals unchanged
    stall_timeout  seconds without progress after which a wait raises StallError; None means the
                   environment variable MPICOMP_STALL_TIMEOUT, or 600
    require_ratio  RatioError on all ranks where dense / sent stays below this number
    ratio_window   it is judged after every so many steps, and by check_ratio()
    progress       who moves exchanges on between `start` and `finish`: "poll", "thread" or "auto"

    Every rank must make one with the same arguments; MismatchError names the first difference on
    all ranks otherwise. Averagers on other communicators, or made one after the other on the same,
    do not disturb each other.

        averager = mpicomp.Averager({"w": w}, "onebit")
        averager.average({"w": w})          # w is the mean over the ranks now
    """

    def __init__(self, named_arrays: Mapping[str, Any] | Iterable[tuple[str, Any]],
                 method: Method | str, comm: "MPI.Comm | None" = None, *, average: bool = True,
                 bucket_bytes: int = 25 << 20, seed: int = 0, nonfinite: str = "raise",
                 stall_timeout: float | None = None, require_ratio: float | None = None,
                 ratio_window: int = 100, progress: str = "auto") -> None:
        comm = mpi.communicator(comm, stall_timeout, "starting an Averager")
        settings = Settings(bool(average), bucket_bytes, seed, nonfinite,
                            mpi.stall_seconds(stall_timeout), require_ratio, ratio_window, progress)
        named, problem = averageable(named_arrays)
        method, unknown = resolved(method)
        if method is not None and method.owns:
            unknown = SpecError(f"an Averager has no parameters that exchange={method.exchange} "
                                "could move: take another exchange, or a Reducer with an attached "
                                "optimizer")
        super().__init__(comm, named, method, settings,
                         problem or unknown or settings.problem(), ArraySlot, **settings.facts)

    # ---- one step ----

    @uncompiled
    def average(self, arrays: Mapping[str, Any], weight: float | None = None) -> bool:
        """Replace these arrays by their mean over ranks (average=False: their sum), in place.

        arrays  {name: array} or (name, array) pairs, with names that the Averager was made with;
                those that are left out count as zero, but with delay=1 and exchange=peers none
                may be left out. All ranks must call this equally often
        weight  this rank's share, 0 or more, given on all ranks or on none: the mean is
                sum(weight * array) / sum(weight), the sum is sum(weight * array). A rank with
                weight 0 takes part and gives nothing, and what it owes waits

        Returns whether the arrays were replaced: not in a step that is skipped, nor where all
        weights are 0, nor in the first step of delay=1. Raises NonFiniteError, MismatchError or
        StallError, on all ranks alike.
        """
        return self._take(arrays, weight) and self._end()

    @uncompiled
    def send(self, arrays: Mapping[str, Any], weight: float | None = None) -> bool:
        """Begin to exchange these arrays, as `average` does, and come back at once.

        Everything of this step is on its way then; `finish` waits and replaces the arrays, which
        must not change until then. What is under way moves on while `poll` is called, or by itself
        with progress="thread". Returns whether there is anything to wait for: not where all weights
        are 0. With a `weight` this call waits for those of the other ranks.
        """
        taken = self._take(arrays, weight)
        if taken:
            self._send()
        return taken

    @uncompiled
    def start(self, name: str, array: Any) -> None:
        """Begin to exchange one array; `finish` replaces it, and it must not change until then.

        Arrays may come in any order. A bucket is on its way when all of its arrays are here.
        """
        self._slot(name).check(array)
        self._give(name, array)

    @uncompiled
    def finish(self) -> bool:
        """Wait until every array of this step is the mean; returns whether it was replaced."""
        return self._end()

    @in_memory
    def _take(self, arrays, weight):
        """Take in the arrays of a step, those that fit; False where nobody gives anything."""
        try:
            arrays = {str(name): array for name, array in dict(arrays).items()}
        except (TypeError, ValueError):
            raise SpecError(f"found {type(arrays).__name__}, expected {{name: array}}, or "
                            "(name, array) pairs") from None
        for name, array in arrays.items():  # before anything is done
            self._slot(name).check(array)
        factor = self._factor(weight)
        if factor is None:
            return False
        with self.lock:
            self.begin()  # also where this rank gives nothing
        if factor == 0.0:
            self._hold()
        for name, array in arrays.items():
            self._give(name, array, factor)
        return True

    @in_memory
    def _give(self, name, array, factor=1.0):
        """Take an array in that fits, times `factor`, and send what is complete."""
        with self.lock:
            self.begin()
            bucket, slot = self.buckets.names[str(name)]
            if slot.ready:
                raise MismatchError(f"rank {self.comm.rank}: {name!r} was given twice in step "
                                    f"{self.step}: call finish() between the two")
            self.mark_step()
            self.buckets.note(slot.name)
            slot.fill(array, factor)
            bucket.arrived(slot)
            self.launch_ready()
            self.poll()

    def _slot(self, name):
        """The slot of an array; SpecError where there is none, or none any more."""
        if self.closed:
            raise SpecError("this Averager is closed: make another one")
        if str(name) not in self.buckets.names:
            raise SpecError(f"{name!r} found, expected one of the arrays that this Averager was "
                            f"made with: {', '.join(self.buckets.names)}")
        return self.buckets.names[str(name)][1]

    @in_memory
    def _send(self):
        """Launch what is left of this step; finished, or closed: there is nothing."""
        with self.lock:
            if self.current.finished or self.closed:
                return
            absent = [slot.name for slot in self.buckets.slots if not slot.ready]
            if absent and self.mode.late:
                raise SpecError(f"{absent[0]!r} was not given in step {self.step}: with "
                                f"{self.method!r}, whose means come late, every array must be "
                                "given in every step (zeros where there is nothing)")
            if self.current.next < len(self.buckets):
                self.prepare()
                self.launch_rest(_absent)

    @in_memory
    def _end(self):
        with self.lock:
            if self.current.finished or self.closed:
                return False
            self._send()
            return self.mode.finish()

    def _factor(self, weight):
        """What this rank's arrays are multiplied by; None where nobody gives anything."""
        if weight is None:
            return 1.0
        weights = self.link.gather(weight, "adding up the ranks' weights")
        for rank, found in enumerate(weights):
            if not isinstance(found, (int, float, np.number)) or not 0 <= found < math.inf:
                raise SpecError(f"rank {rank}: weight={found!r} found, expected a finite number, "
                                "at least 0")
        if not sum(weights):
            return None
        return float(weight) / (sum(weights) * self.share if self.settings.average else 1.0)

    @in_memory
    def _hold(self):
        """Keep what this rank owes out of this step."""
        self.begin()
        self.mode.land()
        for bucket in self.buckets:
            bucket.hold()

    # ---- between two steps ----

    @uncompiled
    def deliver(self) -> dict[str, NDArray[np.float32]]:
        """Return {name: float32 array}: everything that any rank has sent and nobody has got yet.

        Collective, for exchange=peers and delay=1: call it between two steps, before results are
        compared or saved, and before a rank ends. {} where nothing was under way.
        """
        found = self.deliver_into_buckets() or []
        return self._values(slot for bucket in found for slot in bucket.slots)

    @uncompiled
    def flush(self) -> dict[str, NDArray[np.float32]]:
        """Return {name: float32 array}: the mean (or sum) of what all ranks owe, which is zero now.

        Collective, between two steps: afterwards all that was given has been handed out (Dryden et
        al. 2016 do so at the end of each epoch). Uncompressed.
        """
        self.flush_into_buckets()
        return self._values(self.buckets.slots)

    @in_memory
    def _values(self, slots):
        return {slot.name: staging.fetched(slot.flat).copy().reshape(slot.shape) for slot in slots}

    def clear_outputs(self):
        """Nothing is handed out; in an asynchronous exchange what others have sent still is."""
        if not self.exchange.asynchronous:
            super().clear_outputs()

    def __reduce__(self):
        raise SpecError("an Averager cannot be copied or pickled, since it belongs to the ranks of "
                        "its communicator: make another one, and give it state_dict()")


def _absent(slot) -> bool:
    slot.absent()
    return False
