"""The engine of every averager: one step after the other, without hooks and without torch."""

import math
import sys
import threading
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np

from mpicomp import catalogue, kernels, mpi
from mpicomp.averager import memory
from mpicomp.averager.buckets import Buckets
from mpicomp.averager.link import Link
from mpicomp.averager.memory import in_memory, uncompiled
from mpicomp.averager.modes import Delayed, Peers, Synchronous
from mpicomp.averager.ratio import Ratio
from mpicomp.averager.startup import agree_on_plan
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


class Engine:
    """Arrays in, their mean out: what an Averager and the gradients of a Reducer have in common.

    named     (name, array) pairs that go into buckets
    problem   what is wrong on this rank, an exception or None: it is raised on all ranks
    slot      makes what an array's place in a bucket is: slot(name, array, bucket, segment)
    rows      pairs whose gradients travel beside the buckets: see reducer/sparse.py
    facts     what else all ranks must agree on

    Collective. All the memory that will be needed is taken here.
    """

    stats: Meter
    step: int
    sends = None  # what is sent in place of the arrays: see reducer/sends.py

    def __init__(self, comm, named, method, settings, problem, slot, rows=(), **facts):
        self.settings, self.stats, self.step = settings, Meter(), 0
        try:
            where = method and memory.of([*named, *rows], method.exchange)
        except (SpecError, DeviceError) as error:
            problem = problem or error
        plan = agree_on_plan(comm, method, [*named, *rows], problem, **facts)
        self.named, self.advice = named, None
        self.method = method.of([name for name, _ in named])
        if method.name == "auto":
            plan = self._choose(comm, plan)
        self.link = Link(comm, self.method, settings, self.stats, where,
                         dense=bool(self.method.warmup or self.sends))
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
        if self.dense:
            self.stats.notes.append(self.sends.note)
        for note in self.stats.notes:
            self._print(note)

    def say(self, note):
        """Add a note to the stats; rank 0 prints it, once in a program."""
        self.stats.notes.append(note)
        self._print(note)

    def _print(self, note):
        if self.comm.rank == 0 and note not in _said:
            _said.add(note)
            print(f"mpicomp: {note}", file=sys.stderr)

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

    @property
    def dense(self) -> bool:
        """Is this step exchanged dense, because of what is to be sent later?"""
        return self.sends is not None and self.sends.dense

    def _warm(self, step):
        return self.dense or step < self.method.warmup

    def exchange_of(self, step):
        """The exchange of a step: dense during the warm-up."""
        return self.link.warm if self._warm(step) else self.link.exchange

    @property
    def exchange(self):
        """The exchange of this step."""
        return self.exchange_of(self.step)

    def codec(self, bucket, step=None):
        """The codec of a bucket in a step, this one by default."""
        step = self.step if step is None else step
        return bucket.warm if self._warm(step) else bucket.codec

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

    def place(self) -> str:
        """What else all ranks must agree on in this step."""
        return ""

    def mark_step(self):
        """As a step begins: have its headers say what is frozen, and if the last was taken back.

        In an asynchronous exchange ranks are in other steps, and do not compare it.
        """
        now = self.current
        if not now.marked:
            now.marked = True
            taken_back = "the last step was taken back" * now.taken_back
            self.buckets.mark(self.frozen(), taken_back + self.place(),
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
        if self.sends and not self.dense:
            self.sends.load(bucket)
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

    def poll(self) -> None:
        """Move on what is under way; does not wait."""
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

    def launch_rest(self, bring_absent):
        """Send the buckets that are left.

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

    def complete(self, bring_absent) -> bool:
        """`launch_rest`, and finish the step; was anything handed out?"""
        self.launch_rest(bring_absent)
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
        self.buckets.release()

    def end_step(self, skipped):
        """Count the step, and do what comes after some."""
        self.step += 1
        self.stats.step(4 * self.elements, skipped)
        with self.guard.tail():
            self.after_step()

    def after_step(self):
        """Collective: judge the ratio, and agree on the order of buckets after the first step."""
        if self.ratio:
            self.ratio.after(self.step - 1, self.method, self.dense)
        if self.buckets.order.noting and self.buckets.agree(stays=self.mode.late):
            if self.method.adagrad:  # its owners change, so all must take part: at once
                self.commit()
                self.buckets.share()
                self.buckets.apply()

    def check_ratio(self) -> None:
        """At the end of a run: hold the steps since the last judgement to require_ratio, too."""
        if self.ratio:
            self.ratio.check(self.step)

    # ---- between two steps ----

    @in_memory
    def deliver_into_buckets(self) -> list | None:
        """Hand out what is under way; the buckets that have some of it, None if nothing was."""
        if not self.mode.late:
            return None
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
        gone = self.mode.owed_is_gone(self.owed)
        for bucket in () if gone else self.buckets:
            total = self.link.sum(staging.fetched(self.owed(bucket)), "flush",
                                  "adding up what all ranks owe")
            total *= np.float32(self.share)
            if self.mode.asynchronous:
                total += bucket.grad
            bucket.grad[...] = staging.fitting(total, bucket.grad)
        self.current.finished, self.current.outcome = True, "flushed"
        return not gone

    def owed(self, bucket):
        """The sum of this rank's residuals of a bucket, which become zero."""
        owed, total = bucket.codec.persistent(), self._all_owed(bucket)
        zeros = kernels.of(bucket.grad).zeros
        left = {kind: zeros(bucket.layout.size) if kind.startswith("error") else array
                for kind, array in owed.items()}
        for slot, s in zip(bucket.slots, bucket.layout.segments):
            if slot.frozen and owed:  # what it is owed waits
                left["error"] = left["error"].copy()
                left["error"][s.slice] = total[s.slice]
                total[s.slice] = 0
        bucket.codec.restore(left)
        return total

    def _all_owed(self, bucket):
        """The sum of this rank's residuals of a bucket, first and second."""
        total = kernels.of(bucket.grad).zeros(bucket.layout.size)
        for kind, array in bucket.codec.persistent().items():
            if kind.startswith("error"):
                total += array
        return total

    @in_memory
    def mean_owed(self) -> dict:
        """{slot: float32 array}: the mean over ranks of what they owe; nothing changes. Collective.
        """
        self.require_no_step("mean_owed")
        found = {}
        for bucket in self.buckets:
            total = self.link.sum(staging.fetched(self._all_owed(bucket)), "flush",
                                  "adding up what all ranks owe")
            total *= np.float32(self.share)
            found |= {slot: total[s.slice]
                      for slot, s in zip(bucket.slots, bucket.layout.segments)}
        return found

    def require_no_step(self, what):
        """MismatchError where arrays have come that no step has used."""
        self.commit()  # what was handed out counts as applied
        if not self.current.finished:
            self.buckets.require_no_step(self.comm.rank, what)

    def require_settled(self, what):
        """MismatchError unless nothing is under way."""
        self.commit()
        self.mode.require_settled(what)

    @uncompiled
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

    @uncompiled
    @in_memory
    def state_dict(self) -> dict[str, Any]:
        """{"step": int, "error/<name>": array}: what this rank owes, in the units of its arrays.

        Also "error2/<name>" where a second residual is kept, and "order" where buckets were made
        anew after the first step, and with powersgd "basis/<name>". Arrays are NumPy's, float32.
        Raises MismatchError where packets are under way: call `deliver` first.
        """
        self.require_settled("state_dict()")
        return {"step": self.step, **self.buckets.order.state(), **self.buckets.residuals(),
                **self.mode.state()}

    @uncompiled
    @in_memory
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave on this rank: the same packets follow, to the bit.

        To be called on all ranks. Raises MismatchError, with nothing changed, if names or shapes
        do not fit, or in the middle of a step.
        """
        self.require_no_step("load_state_dict")
        now = self.state_dict()
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
        self.mode.restore(state)
        self.buckets.restore(state)
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
