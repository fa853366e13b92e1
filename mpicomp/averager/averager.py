"""The Averager: what every exchange of a step goes through, without hooks and without torch."""

import math
import sys
import threading
from contextlib import nullcontext

import numpy as np

from mpicomp import catalogue, kernels, mpi
from mpicomp.averager import memory
from mpicomp.averager.buckets import Buckets
from mpicomp.averager.link import Link
from mpicomp.averager.memory import in_memory
from mpicomp.averager.modes import Delayed, Peers, Synchronous
from mpicomp.averager.ratio import Ratio
from mpicomp.averager.settings import Settings
from mpicomp.averager.slot import ArraySlot
from mpicomp.averager.startup import agree_on_plan, averageable
from mpicomp.averager.step import Step
from mpicomp.errors import DeviceError, MismatchError, NonFiniteError, SpecError
from mpicomp.names import known_as
from mpicomp.transport import packet, staging
from mpicomp.transport.agree import digest
from mpicomp.transport.meter import Meter

_said = set()  # notes that this process has printed


class Unguarded:
    """What a step does where no Recovery watches over it: nothing. See recovery.py."""

    commit = tail = staticmethod(nullcontext)


class Averager:
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

    def __init__(self, named_arrays, method, comm=None, *, average=True, bucket_bytes=25 << 20,
                 seed=0, nonfinite="raise", stall_timeout=None, require_ratio=None,
                 ratio_window=100, progress="auto"):
        comm = mpi.communicator(comm, stall_timeout, "starting an Averager")
        settings = Settings(bool(average), bucket_bytes, seed, nonfinite,
                            mpi.stall_seconds(stall_timeout), require_ratio, ratio_window, progress)
        named, problem = averageable(named_arrays)
        method, unknown = resolved(method)
        if method is not None and method.owns:
            unknown = SpecError(f"an Averager has no parameters that exchange={method.exchange} "
                                "could move: take another exchange, or a Reducer with an attached "
                                "optimizer")
        self._start(comm, named, method, settings, problem or unknown or settings.problem(),
                    **settings.facts)

    def _start(self, comm, named, method, settings, problem, slot=ArraySlot, rows=(), **facts):
        """Agree with all ranks, and take all the memory that will be needed. Collective.

        slot  makes what an array's place in a bucket is: slot(name, array, bucket, segment)
        rows  pairs whose gradients travel beside the buckets: see reducer/sparse.py
        """
        self.settings, self.stats, self.step = settings, Meter(), 0
        try:
            where = method and memory.of(named, method.exchange)
        except (SpecError, DeviceError) as error:
            problem = problem or error
        plan = agree_on_plan(comm, method, [*named, *rows], problem, **facts)
        self.named, self.advice = named, None
        self.method = method.of([name for name, _ in named])
        if method.name == "auto":
            plan = self._choose(comm, plan)
        self.link = Link(comm, self.method, settings, self.stats, where)
        # owners have one shard of all parameters each
        size = math.inf if self.method.owns else settings.bucket_bytes
        self.buckets = Buckets(named, size, where, slot, plan)
        self.mode = self._mode()
        self.buckets.open(self.link)
        self.link.exchange.restart(self.method.warmup)
        self.ratio = settings.require_ratio and Ratio(self.link, settings)
        self.guard = Unguarded()
        self.link.watch(self)
        self._say_notes()
        self.closed, self.checked, self.lock = False, True, threading.RLock()
        self.current = Step()

    def _mode(self):
        if self.method.delay:
            return Delayed(self)
        return Peers(self) if self.link.exchange.asynchronous else Synchronous(self)

    def _choose(self, comm, plan):
        """method="auto": measure links and codecs, and take what is predicted to be fastest."""
        from mpicomp.advice import advise

        self.advice = advise(comm, sum(int(np.prod(a.shape)) for _, a in self.named))
        self.method = catalogue.method(self.advice.choice)
        self.stats.notes.append(f"auto took {self.method!r}: {self.advice.reason}")
        return plan ^ digest(self.advice.choice)

    def _say_notes(self):
        """Name what is slower or larger than asked for, once in a program."""
        self.stats.notes += filter(None, (kernels.note(), self.link.pipeline.note,
                                          self.memory.note))
        if self.method.warmup:
            self.stats.notes.append(f"{self.method.name}: the first {self.method.warmup} steps are "
                                    "exchanged dense (warmup)")
        for note in self.stats.notes:
            if self.comm.rank == 0 and note not in _said:
                _said.add(note)
                print(f"mpicomp: {note}", file=sys.stderr)

    # ---- for users ----

    def average(self, arrays, weight=None) -> bool:
        """Replace these arrays by their mean over ranks (average=False: their sum), in place.

        arrays  {name: array}, with names that the Averager was made with; those that are left out
                count as zero. All ranks must call this equally often
        weight  this rank's share, 0 or more, given on all ranks or on none: the mean is
                sum(weight * array) / sum(weight), the sum is sum(weight * array). A rank with
                weight 0 takes part and gives nothing, and what it owes waits

        Returns whether the arrays were replaced: not in a step that is skipped, nor where all
        weights are 0, nor in the first step of delay=1. Raises NonFiniteError, MismatchError or
        StallError, on all ranks alike.
        """
        factor = self._factor(weight)
        if factor is None:
            return False
        if factor == 0.0:
            self._hold()
        for name, array in arrays.items():
            self.start(name, array, factor)
        return self.finish()

    def start(self, name, array, factor=1.0):
        """Begin to exchange one array; `finish` replaces it, and it must not change until then.

        Arrays may come in any order. A bucket is on its way when all of its arrays are here.
        """
        if name not in self.buckets.names:
            raise SpecError(f"{name!r} found, expected one of the arrays that this Averager was "
                            f"made with: {', '.join(self.buckets.names)}")
        with self.lock, self.memory.here():
            self.begin()
            bucket, slot = self.buckets.names[name]
            if slot.ready:
                raise MismatchError(f"rank {self.comm.rank}: {name!r} was given twice in step "
                                    f"{self.step}: call finish() between the two")
            self.mark_step()
            self.buckets.note(name)
            slot.fill(array, factor)
            bucket.arrived(slot)
            self.launch_ready()
            self.poll()

    def finish(self) -> bool:
        """Wait until every array of this step is the mean; returns whether it was replaced."""
        with self.lock, self.memory.here():
            if self.current.finished or self.closed:
                return False
            self.prepare()
            return self.complete(_absent)

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

    # ---- one step ----

    @property
    def comm(self):
        """The communicator: a private duplicate."""
        return self.link.comm

    @property
    def memory(self):
        """Where the buckets lie: see memory.py."""
        return self.link.memory

    @property
    def share(self) -> float:
        """What the sum over all ranks is multiplied by."""
        return 1.0 / self.comm.size if self.settings.average else 1.0

    weight = share  # the same for this step, of which some ranks may have no part: see ddp

    def exchange_of(self, step):
        """The exchange of a step: dense during the warm-up."""
        return self.link.warm if step < self.method.warmup else self.link.exchange

    @property
    def exchange(self):
        """The exchange of this step."""
        return self.exchange_of(self.step)

    def codec(self, bucket, step=None):
        """The codec of a bucket in a step, this one by default."""
        step = self.step if step is None else step
        return bucket.warm if step < self.method.warmup else bucket.codec

    def full(self, step=None) -> list:
        """The buckets of which any rank had something."""
        return [bucket for bucket in self.buckets if self.codec(bucket, step).given]

    def begin(self):
        """A new step begins, where the last one is finished."""
        if self.current.finished:
            self.current.begin()
            self.buckets.apply()
            for bucket in self.buckets:
                bucket.reset()

    def frozen(self) -> tuple:
        """The names of the arrays that are to stand still in this step."""
        return ()

    def mark_step(self):
        """As a step begins: have its headers say what is frozen, and if the last was taken back.

        In an asynchronous exchange ranks are in other steps, and do not compare it.
        """
        now = self.current
        if not now.marked:
            now.marked = True
            self.buckets.mark(self.frozen(), "the last step was taken back" * now.taken_back,
                              compare=not self.mode.asynchronous)
            now.taken_back = False

    extra_flags = 0  # that all packets of this rank carry

    def launch(self, bucket, touched):
        """Send a complete bucket on its way; `touched`: this rank has something in it."""
        self.mode.begin()
        self.mark_step()
        self.mode.launch(bucket)
        if bad := bucket.first_bad():
            self.current.bad[bucket.index] = bad
        flags = ((packet.NONFINITE if self.current.bad else 0) | (0 if touched else packet.EMPTY)
                 | self.extra_flags)
        exchange = self.exchange
        self.stats.reason = self.method.name if exchange is self.link.exchange else "warm-up"
        generator = exchange.run(self.codec(bucket), self.step, flags)
        self.current.next += 1
        self.link.pipeline.launch(f"bucket {bucket.index} in step {self.step}", generator)

    def launch_ready(self):
        """Send what is complete; not before ranks are known to agree, which waits for `finish`.

        A comparison in here would wait for ranks that are in another Averager's finish. The last
        bucket waits for `finish`, too: its header tells whether the step is given up.
        """
        while (self.checked and self.current.next < len(self.buckets) - 1
               and not self.buckets[self.current.next].missing):
            self.launch(self.buckets[self.current.next], touched=True)

    def poll(self):
        """Move on what is under way."""
        if self.current.next or self.mode.late:
            with self.stats.stage("post"):
                self.link.pipeline.poll()
                self.link.exchange.poll()

    def prepare(self):
        """Before a step's last buckets are sent: what is under way lands, ranks are compared."""
        self.mark_step()
        self.mode.land()
        self.compare()

    def compare(self):
        """Before anything of the first step is sent: do all ranks agree?"""
        if not self.checked:
            self.check_start()
            self.checked = True

    def check_start(self):
        """Headers compare step and plan; there is nothing else to compare."""

    def complete(self, bring_absent) -> bool:
        """Send the buckets that are left and finish the step; was anything handed out?

        bring_absent  called with each slot that is not ready: fills it, and returns whether this
                      rank has something there
        """
        for bucket in self.buckets[self.current.next:]:
            touched = bucket.touched
            for slot in bucket.slots:
                if not slot.ready:
                    touched |= bring_absent(slot)
                    bucket.arrived(slot)
            self.launch(bucket, touched)
        return self.mode.finish()

    def finish_rows(self) -> bool:
        """Exchange what travels beside the buckets; True if it is not finite."""
        return False

    def apply_rows(self):
        """Hand out what travels beside the buckets."""

    commits_at_once = True  # is a step applied as soon as it is handed out?

    def commit(self):
        """What was handed out is applied: what was sent is the past for the residuals."""
        applied, self.current.applied = self.current.applied, []
        for bucket, step in applied:
            self.commit_bucket(bucket, step)

    def commit_bucket(self, bucket, step):
        """The same for one bucket. What was sent about frozen arrays is owed again."""
        codec = self.codec(bucket, step)
        codec.commit()
        frozen = [s for s in bucket.layout.segments if s.name in self.buckets.frozen]
        owed = codec.persistent() if frozen else {}
        if "error" in owed:
            share = 1.0 / (self.weight * self.exchange_of(step).holders)
            for s in frozen:
                owed["error"][s.slice] += bucket.flight[s.slice] * share
            codec.restore(owed)

    def skip(self, overflow=None):
        """A gradient or their sum is not finite, or was given up: nobody applies this step."""
        self.clear_outputs()
        try:
            if overflow and self.settings.nonfinite == "raise":
                raise overflow
            self.current.outcome = self.tell()
        except (NonFiniteError, SpecError):
            self.begin()
            raise

    def clear_outputs(self):
        """Nothing is handed out in this step."""
        self.buckets.clear()

    def tell(self, step=None):
        """Raise on all ranks what any of them found, or return: such a step is skipped.

        With an asynchronous exchange only this rank is concerned: it says nothing in this step.
        """
        step = self.step if step is None else step
        alone = self.exchange_of(step).asynchronous
        bad, self.current.bad = self.current.bad, {}
        found = [{}] * self.comm.rank + [bad]
        if not alone:
            with self.guard.tail():
                found = mpi.allgather(self.comm, bad, "telling what is wrong with gradients")
        for rank, theirs in enumerate(found):
            if "problem" in theirs:
                raise SpecError(f"rank {rank}: {theirs['problem']}")
        names = [[] if "given up" in theirs else list(theirs.values()) for theirs in found]
        where = "; ".join(f"rank {k}: {', '.join(n)}" for k, n in enumerate(names) if n)
        if where and self.settings.nonfinite == "raise":
            self.step += alone  # the others have heard of this step
            raise NonFiniteError(f"step {step}: the gradient holds NaN or Inf ({where}). The "
                                 "residuals are as before this step; nonfinite='skip' goes on")
        return "skipped" if where else "given up"

    @property
    def elements(self) -> int:
        """How many floats a step exchanges."""
        return sum(bucket.layout.size for bucket in self.buckets)

    def release(self):
        """What `average` has kept out of a step with weight 0 is owed again."""
        for bucket in self.buckets:
            bucket.release()

    def end_step(self, skipped):
        """Count the step, and do what comes after some."""
        self.step += 1
        self.stats.step(4 * self.elements, skipped)
        with self.guard.tail():
            self.after_step()

    def after_step(self):
        """Collective: judge the ratio, and agree on the order of buckets after the first step."""
        if self.ratio:
            self.ratio.after(self.step - 1, self.method)
        self.buckets.agree(stays=self.mode.late, share=self.method.adagrad)

    def check_ratio(self):
        """At the end of a run: hold the steps since the last judgement to require_ratio, too."""
        if self.ratio:
            self.ratio.check(self.step)

    # ---- between two steps ----

    def deliver(self) -> dict:
        """Return {name: float32 array}: everything that any rank has sent and nobody has got yet.

        Collective, for exchange=peers and delay=1: call it between two steps, before results are
        compared or saved, and before a rank ends. {} where nothing was under way.
        """
        return self._values() if self.deliver_into_buckets() else {}

    def flush(self) -> dict:
        """Return {name: float32 array}: the mean (or sum) of what all ranks owe, which is zero now.

        Collective, between two steps: afterwards all that was given has been handed out (Dryden et
        al. 2016 do so at the end of each epoch). Uncompressed.
        """
        self.flush_into_buckets()
        return self._values()

    def _values(self):
        return {name: staging.fetched(slot.flat).copy().reshape(slot.shape)
                for name, (_, slot) in self.buckets.names.items()}

    @in_memory
    def deliver_into_buckets(self) -> bool:
        """Put what is under way into the buckets, and hand it out; True if there was something."""
        if not self.mode.late:
            return False
        self.require_no_step("deliver")
        return self.mode.deliver()

    @in_memory
    def flush_into_buckets(self) -> bool:
        """Put what all ranks owe into the buckets; False where the mode has applied it itself."""
        self.require_no_step("flush")
        if self.method.adagrad:
            raise SpecError("flush: with adagrad=yes the second residual is no gradient, and "
                            "cannot be added to the first")
        self.mark_step()
        self.mode.flush()
        self.current.finished, self.current.outcome = True, "flushed"
        if self.mode.owed_is_gone(self.owed):
            return False
        for bucket in self.buckets:
            total = self.link.sum(staging.fetched(self.owed(bucket)), "flush",
                                  "adding up what all ranks owe")
            total *= np.float32(self.share)
            if self.mode.asynchronous:
                total += bucket.grad
            bucket.grad[...] = staging.fitting(total, bucket.grad)
        return True

    def owed(self, bucket):
        """The sum of this rank's residuals of a bucket, which become zero."""
        owed = bucket.codec.persistent()
        zeros = kernels.of(bucket.grad).zeros
        total = zeros(bucket.layout.size)
        for array in owed.values():
            total += array
        left = dict.fromkeys(owed, zeros(bucket.layout.size))
        for slot, s in zip(bucket.slots, bucket.layout.segments):
            if slot.frozen and owed:  # what it is owed waits
                left["error"] = left["error"].copy()
                left["error"][s.slice] = total[s.slice]
                total[s.slice] = 0
        bucket.codec.restore(left)
        return total

    def require_no_step(self, what):
        """MismatchError where arrays have come that no step has used."""
        self.commit()  # what was handed out counts as applied
        if not self.current.finished:
            self.buckets.require_no_step(self.comm.rank, what)

    def require_settled(self, what):
        """MismatchError unless nothing is under way."""
        self.commit()
        self.mode.require_settled(what)

    @in_memory
    def sent_by_array(self) -> dict:
        """{name: how many of its elements this rank's last packet made non-zero}.

        What a sparse method sends, by array. Costs a decode; only for exchange=allgather.
        """
        counts = {}
        for bucket in self.buckets:
            said = staging.fetched(bucket.codec.own(self.step - 1, self.comm.rank))
            counts |= {s.name: int(np.count_nonzero(said[s.slice]))
                       for s in bucket.layout.segments}
        return counts

    # ---- state ----

    @in_memory
    def state_dict(self) -> dict:
        """{"step": int, "error/<name>": array}: what this rank owes, in the units of its arrays.

        Also "error2/<name>" where a second residual is kept, and "order" where buckets were made
        anew after the first step. Arrays are NumPy's, float32. Raises MismatchError where packets
        are under way: call `deliver` first.
        """
        self.require_settled("state_dict()")
        return {"step": self.step, **self.buckets.order.state(), **self.buckets.residuals(),
                **self.mode.state()}

    @in_memory
    def load_state_dict(self, state) -> None:
        """Go on from what `state_dict` gave on this rank: the same packets follow, to the bit.

        To be called on all ranks. Raises MismatchError, with nothing changed, if names or shapes
        do not fit, or in the middle of a step.
        """
        self.require_no_step("load_state_dict")
        now = Averager.state_dict(self)
        state = dict(zip(known_as(state, now), state.values()))  # saved with or without wrappers
        odd = sorted((set(now) ^ set(state)) - {"order"})
        if odd:
            raise MismatchError(
                f"rank {self.comm.rank}: the saved state {'lacks' if odd[0] in now else 'has'} "
                f"{odd[0]!r}, which this model with method {self.method!r} "
                f"{'needs' if odd[0] in now else 'does not know'}")
        for key, array in now.items():
            if key not in ("step", "order", "shard") and tuple(state[key].shape) != array.shape:
                raise MismatchError(f"rank {self.comm.rank}: saved {key!r} has shape "
                                    f"{list(state[key].shape)}, expected {list(array.shape)}")
        if objection := self.buckets.order.objection(state):
            raise MismatchError(f"rank {self.comm.rank}: {objection}")
        self.buckets.restore(state)
        self.mode.restore(state)
        self.step, self.checked = int(state["step"]), False
        self.link.exchange.restart(max(self.step, self.method.warmup))
        if self.ratio:
            self.ratio.restart(self.step)

    # ---- ranks that die, and the end ----

    @property
    def irreplaceable(self) -> str | None:
        """Why this Averager cannot go on where a rank has died, or None."""
        if self.method.adagrad:
            return "adagrad=yes keeps the sums of squares with the owners, and nowhere else"
        return self.mode.irreplaceable

    def regroup(self, comm) -> None:
        """Go on over `comm`, whose ranks are some of the present ones, where the last step ended.

        Collective over `comm`. A step that was begun has never happened: packets under way are
        forgotten, and this rank's residuals are those of the last step that was applied. What the
        ranks that are gone still owed is lost. As after load_state_dict on so many ranks, the
        second residuals of elements that others own now join the first. With delay=1 or an
        asynchronous exchange it is refused: packets under way are the past.
        """
        if refusal := self.irreplaceable:
            raise SpecError(f"regroup: {refusal}")
        mpi.keep(self.link.pipeline.abandon())
        comm = mpi.communicator(comm, self.link.timeout, "moving a Reducer to fewer ranks")
        order = np.array(self.buckets.order.coming, np.int32)
        # whoever died in the first step may have told it to some only
        mpi.wait(comm, comm.Ibcast(order), self.link.timeout, "agreeing on buckets")
        link = self.link.over(comm, self.settings)
        # from here on no MPI: either all of it has changed or nothing
        self.link = link
        self.buckets.regroup(link, order.tolist(), first=self.step == 0)
        link.watch(self)
        if self.ratio:
            self.ratio.move(link, self.step)
        self.checked, self.current = False, Step()
        self.clear_outputs()

    def close(self) -> None:
        """Do nothing from now on; a later Averager may have the communicator.

        With an asynchronous exchange call `deliver` first: others may need this rank's answers.
        """
        if self.closed:
            return
        self.link.exchange.rest()
        self.closed = True
        if self.link.pipeline.busy:
            mpi.keep(self.link.pipeline.abandon(), self.buckets)
        elif self.link.exchange.settled:
            mpi.release(self.comm)


def resolved(method):
    """(the Method that a specification names, None), or (None, what is wrong with it)."""
    try:
        return catalogue.method(method), None
    except SpecError as error:
        return None, error


def _absent(slot) -> bool:
    slot.absent()
    return False
