"""The Reducer decides when: it watches backward, exchanges, and leaves the mean in p.grad."""

import sys
import threading
from functools import partial



from mpicomp import catalogue
from mpicomp import kernels, mpi
from mpicomp.errors import DeviceError, NonFiniteError, SpecError
from mpicomp.mpi.watchdog import Watchdog
from mpicomp.reducer import memory
from mpicomp.reducer.backward import Backward
from mpicomp.reducer.bucket import make_buckets
from mpicomp.reducer.changes import Changes
from mpicomp.reducer.delay import Delay
from mpicomp.reducer.delivery import Delivery
from mpicomp.reducer.memory import on_place
from mpicomp.reducer.optimizer_hooks import Attachment, now_open
from mpicomp.reducer.order import Order
from mpicomp.reducer.ratio import Receipt
from mpicomp.reducer.regroup import Connection
from mpicomp.reducer.replicas import Replicas, bad_every, check_start
from mpicomp.reducer.sparse import Sparse, divide
from mpicomp.reducer.startup import agree_on_plan, bad_option, stall_seconds, trainable
from mpicomp.reducer.state import Persistence
from mpicomp.transport import packet
from mpicomp.transport.calls import Wire
from mpicomp.transport.meter import Meter
from mpicomp.transport.pipeline import Pipeline

_said = set()  # notes that this process has printed


class Reducer(Attachment, Backward, Connection, Delivery, Persistence, Replicas):
    """Replaces every gradient by its mean over ranks, exchanged as `method` says.

    named_parameters  (name, parameter) pairs, as model.named_parameters() gives them; those that
                      need no gradient are left out
    method            a Method or its specification, such as "onebit" or "strom:tau=0.01"
    comm              an MPI communicator; None means COMM_WORLD. A duplicate is used
    average           True: the mean over ranks. False: the sum
    bucket_bytes      gradients travel in pieces of about so many bytes of float32
    seed              of the stochastic methods; ranks and steps draw different numbers from it
    nonfinite         "raise": a NaN or Inf on any rank raises NonFiniteError on all of them.
                      "skip": all ranks leave p.grad = None in that step, residuals unchanged
    stall_timeout     seconds without progress after which a wait raises StallError; None means
                      the environment variable MPICOMP_STALL_TIMEOUT, or 600
    require_ratio     RatioError on all ranks where dense / sent stays below, see `Receipt`:
    ratio_window      judged after every so many steps, and by check_ratio()
    sparse            names of parameters whose gradients are sparse and stay so, see sparse.py
    progress          who moves exchanges on during backward: "poll", "thread" or "auto"
    check_replicas_every  call check_replicas() after every so many steps; None: only on demand

    Every rank must make one with the same arguments and the same model; MismatchError names the
    first difference on all ranks otherwise. The order of a step is in docs/design.md.
    """

    def __init__(self, named_parameters, method, comm=None, *, average=True,
                 bucket_bytes=25 << 20, seed=0, nonfinite="raise", stall_timeout=None,
                 require_ratio=None, ratio_window=100, progress="auto", sparse=(),
                 check_replicas_every=None):
        self.comm = mpi.communicator(comm, stall_timeout, "starting a Reducer")
        self.average, self.seed, self.nonfinite = bool(average), seed, nonfinite
        self.stats, self.step = Meter(), 0
        stall_timeout = stall_seconds(stall_timeout)
        named, problem = trainable(named_parameters)
        try:
            self.method = catalogue.method(method)
            problem = problem or bad_option(bucket_bytes, seed, nonfinite, stall_timeout,
                                            require_ratio, ratio_window, progress,
                                            check_replicas_every)
            problem = problem or bad_every(check_replicas_every, self.method)
            self._place = memory.of(named, self.method.exchange)
        except (SpecError, DeviceError) as error:
            self.method, problem = None, error
        named, in_rows, wrong = divide(named, sparse, self.method)
        self._plan = agree_on_plan(
            self.comm, self.method, named + in_rows, problem or wrong, sparse=list(sparse),
            seed=seed, average=average, nonfinite=nonfinite, bucket_bytes=bucket_bytes,
            stall_timeout=stall_timeout, require_ratio=require_ratio, ratio_window=ratio_window,
            check_replicas_every=check_replicas_every)
        self._check_every = check_replicas_every
        self.method = self.method.of([name for name, _ in named])
        self._named, self._rows, self.advice = named, Sparse(self, in_rows), None
        if self.method.name == "auto":
            self._choose()
        self._wire = Wire(self.comm, self.stats)
        self._pipeline = Pipeline(self.comm, stall_timeout, progress, self._place.again)
        # a server cuts parameters into one shard a rank, and a worker has one threshold for all
        whole = self.method.owns
        # backward ends with the first parameters
        self._buckets = make_buckets(named[::-1], float("inf") if whole else bucket_bytes,
                                     self._place)
        self._order, self._changes = Order(self, bucket_bytes), Changes(self)
        self._delay = Delay(self) if self.method.delay else None
        self._exchange, self._mail = self._open(self.method)
        if self._exchange.asynchronous:
            self._pipeline.only_poll()
        self._exchange.restart(self.method.warmup)
        self._warm_method = catalogue.method("dense")
        self._warm = self._open(self._warm_method) if self.method.warmup else None
        self._receipt = require_ratio and Receipt(self.comm, self.stats, require_ratio,
                                                  ratio_window, stall_timeout)
        self._say_notes()
        self._next = 0  # the bucket to launch next: plan order, on every rank
        self._finished, self._finishing, self._lock = False, False, threading.RLock()
        self._optimizers, self._stepped = [], set()
        self._given, self._closed, self._outcome = {}, False, None
        self._synchronising, self._checked = True, False
        self._watchdog = Watchdog(self)
        self._hooks = [p.register_post_accumulate_grad_hook(partial(self._on_gradient, name))
                       for name, p in named]
        self._hooks += [table.parameter.register_post_accumulate_grad_hook(
            partial(self._on_rows, table)) for table in self._rows.tables]
        now_open(self)

    # ---- setting up ----

    def _say_notes(self):
        """Name what is slower or larger than asked for, once in a program."""
        self.stats.notes += filter(None, (kernels.note(), self._pipeline.note, self._place.note))
        if self.method.warmup:
            self.stats.notes.append(f"{self.method.name}: the first {self.method.warmup} steps are "
                                    "exchanged dense (warmup)")
        for note in self.stats.notes:
            if self.comm.rank == 0 and note not in _said:
                _said.add(note)
                print(f"mpicomp: {note}", file=sys.stderr)

    # ---- one step ----

    @property
    def _weight(self):
        """Of every rank's gradient in p.grad."""
        return 1.0 / self.comm.size if self.average else 1.0

    @property
    def _lane(self):
        """(exchange, mail of every bucket) of this step: dense during the warm-up."""
        if self.step < self.method.warmup:
            return self._warm
        return self._exchange, self._mail

    _mark = 0  # a flag that all packets carry: see ddp.py

    def _launch(self, bucket, touched):
        """Send a complete bucket on its way."""
        self._resume()
        self._changes.replan()
        if self._delay:
            self._delay.launch(bucket)
        bad = bucket.first_bad()
        if bad:
            self._changes.bad[bucket.index] = bad
        flags = ((packet.NONFINITE if self._changes.bad else 0)
                 | (0 if touched else packet.EMPTY) | self._mark)
        exchange, mail = self._lane
        self.stats.reason = self.method.name if exchange is self._exchange else "warm-up"
        generator = exchange.run(mail[bucket.index], self.step, flags)
        self._next += 1
        self._pipeline.launch(f"bucket {bucket.index} in step {self.step}", generator)

    @on_place
    def finish(self):
        """Wait until every p.grad is the mean over ranks (average=False: the sum). Idempotent.

        Parameters without a gradient count as zero; a bucket that had none on any rank is left
        alone. Raises NonFiniteError, MismatchError or StallError, on all ranks alike. Where no
        optimizer is attached, a call after p.grad was zeroed, set to None or replaced is the next
        step's.
        """
        with self._lock:
            if self._closed or self._finishing or self._finished and (
                    self._optimizers or not self._begun_anew()):
                return
            if self._finished:
                self._reopen()
            self._finishing = True
            try:
                self._finish()
            finally:
                self._finishing = False

    def compare(self):
        """Before anything is sent: are all ranks at one step, with the same parameters?"""
        if not self._checked:
            check_start(self)
            self._checked = True

    def _finish(self):
        self._changes.settle(late=True)
        self._changes.replan()
        if self._delay:
            self._delay.land()
        self.compare()
        self._changes.judge()
        for bucket in self._buckets[self._next:]:
            touched = bucket.touched
            for slot in bucket.slots:
                if not slot.ready:
                    # an accumulated gradient from no_sync() counts, an absent one is zero
                    absent = self._changes.absent(slot)
                    touched |= not absent
                    self._fill(bucket, slot, absent=absent)
            self._launch(bucket, touched)
        if self._delay:
            self._delay.finish()
            return
        with self.stats.stage("wait"):
            self._pipeline.drain()
            skipped = self._rows.exchange(self._lane[0], self._changes.plan, self._weight)
        skipped |= any(mail.flagged(packet.NONFINITE) for mail in self._lane[1])
        self._finished, full, overflow = True, [], None
        with self._guard.commit():  # until its end nothing has changed that lasts
            try:
                full = [] if skipped else self._decode()
            except NonFiniteError as error:  # the sum is not finite, on all ranks alike
                skipped, overflow = True, error
        self._outcome = None
        if skipped:
            self._skip(overflow)
            if self._lane[0].asynchronous:  # what the others said counts all the same
                full = self._decode()
        self._apply(full)
        self._end_step(skipped)

    def _end_step(self, skipped):
        self.step += 1
        if not self._optimizers:
            self._remember_given()
        elements = sum(b.layout.size for b in self._buckets) + self._rows.elements
        self.stats.step(4 * elements, skipped)
        with self._guard.tail():
            if self._receipt:
                self._receipt.after(self.step - 1, self.method)
            self._order.agree()
            self._check_in_turn()

    def check_ratio(self):
        """At the end of a run: hold the steps since the last judgement to require_ratio, too."""
        if self._receipt:
            self._receipt.check(self.step)

    def _decode(self):
        """(bucket, mail) of all that any rank had a gradient for, the mean in bucket.flight."""
        exchange, mails = self._lane
        full = [(bucket, mail) for bucket, mail in zip(self._buckets, mails)
                if len(mail.flagged(packet.EMPTY)) < len(mail.headers)]
        with self.stats.stage("decode"):
            for _, mail in full:
                exchange.decode(mail, self.step, self._weight)
            if not self.average and not exchange.asynchronous:
                for bucket, _ in full:
                    for slot in bucket.slots:
                        slot.refuse_overflow(self.step)
        return full

    def _apply(self, full):
        """Hand the gradients out. What was said is the past when an optimizer steps on them."""
        for bucket, mail in full:
            for slot in bucket.slots:
                slot.move() if self._lane[0].owns else slot.give_back()
        self._rows.give_back()
        self._changes.applied = full
        if not self._optimizers or self._lane[0].asynchronous:
            self._changes.commit()

    def _skip(self, overflow=None):
        """A gradient or their sum is not finite, or was given up: nobody applies this step."""
        self._rows.clear()
        self._forget_gradients()
        try:
            if overflow and self.nonfinite == "raise":
                raise overflow
            self._outcome = self._changes.tell()
        except (NonFiniteError, SpecError):
            self._reopen()
            raise

    def discard(self):
        """Give up the step that has begun, as zero_grad() before optimizer.step() does.

        No rank then applies it, and every p.grad is None; residuals are as before it. Where one
        rank gives a step up, all do: a rank that was in step() skips it. So a rank may call this
        without the others, as long as it has not read p.grad or called `finish`, also where
        backward() or the forward pass has failed on it alone. Later, when p.grad is the mean,
        either all ranks give up or none: the next exchange raises MismatchError otherwise.
        """
        self._changes.discard()

    def _unhook(self):
        """Take all hooks off."""
        for hook in self._hooks:
            hook.remove()
        self._exchange.rest()
        self._hooks.clear()

    def close(self) -> None:
        """Take the hooks off parameters and optimizers: this Reducer does nothing from now on.

        With an asynchronous exchange call `deliver` first: others may need this rank's answers.
        """
        if self._closed:
            return
        self._unhook()
        self._closed = True
        self._detach()
        if self._pipeline.busy:
            mpi.keep(self._pipeline.abandon(), self._buckets, self._mail, self._warm)
        elif self._exchange.settled:
            mpi.release(self.comm)  # the next Reducer, or whoever asks for one, takes it over


def DistributedOptimizer(optimizer, named_parameters, method="dense", comm=None, **keywords):
    """The optimizer itself, with a Reducer attached as `optimizer.reducer`.

    `keywords` are those of Reducer. optimizer.step() then waits for the exchange and steps on the
    mean gradient.
    """
    optimizer.reducer = Reducer(named_parameters, method, comm, **keywords).attach(optimizer)
    return optimizer
