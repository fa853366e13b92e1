"""Counts the bytes handed to MPI and the seconds spent in each stage of a step."""

from collections import Counter
from contextlib import contextmanager
from threading import local
from time import perf_counter


class Meter:
    """This rank's traffic and time: totals since the Reducer was made.

    sent        bytes of the buffers handed to MPI calls, with headers, scales and lengths
    received    bytes that those calls delivered here from other ranks, or as a reduced result
    dense       bytes of the same gradients in float32: 4 per parameter and step
    ratio       dense / sent
    within      bytes of calls among the ranks of one node (hierarchical), in no other figure
    calls       bytes sent by MPI call, {"Iallgather": ..., "Iallreduce": ...}
    steps       steps that were exchanged; `skipped` of them had a gradient that was not finite
    seconds     by stage: encode, post (MPI calls and polling), wait, decode
    last        sent, received and dense of the last step
    reasons     bytes sent by reason: the method's name, "warm-up", "flush", "rule CASE" for each
                case of a rule, "receipt"; last_reasons: of the last step
    notes       every fallback to something slower or larger than asked for, and its cause
    """

    def __init__(self):
        self.sent = self.received = self.dense = self.within = self.steps = self.skipped = 0
        self.calls, self.seconds = Counter(), Counter()
        self.reasons, self.reason, self.notes = Counter(), "", []
        self.last = {"sent": 0, "received": 0, "dense": 0}
        self.last_reasons = Counter()
        self._before = (0, 0, 0), Counter()  # totals and reasons when the last step ended
        self._here = local()  # stages nest per thread

    @property
    def ratio(self) -> float:
        return self.dense / self.sent if self.sent else float("nan")

    def count(self, call, sent, received, within=False):
        """Book one MPI call."""
        if within:
            self.within += sent
            return
        self.calls[call] += sent
        self.reasons[self.reason] += sent
        self.sent += sent
        self.received += received

    def move(self, reason, size):
        """Book `size` bytes under `reason` instead of the present reason, which counts them."""
        self.reasons[reason] += size
        self.reasons[self.reason] -= size

    @contextmanager
    def stage(self, name):
        """Book the seconds of a `with` block, less those of stages nested in it."""
        here = self._here
        start, outer, here.inner = perf_counter(), getattr(here, "inner", 0.0), 0.0
        try:
            yield
        finally:
            elapsed = perf_counter() - start
            self.seconds[name] += elapsed - here.inner
            here.inner = outer + elapsed

    def step(self, dense, skipped=False):
        """End a step that exchanged gradients of `dense` bytes in float32."""
        self.steps += 1
        self.skipped += bool(skipped)
        self.dense += dense
        now, (before, reasons) = (self.sent, self.received, self.dense), self._before
        self.last = dict(zip(self.last, (n - b for n, b in zip(now, before))))
        self.last_reasons = self.reasons - reasons
        self._before = now, Counter(self.reasons)

    @classmethod
    def total(cls, meters) -> "Meter":
        """A new Meter with the sums of several, and the last step of each; notes without repeats.
        """
        found = cls()
        for meter in meters:
            for name in ("sent", "received", "dense", "within", "steps", "skipped"):
                setattr(found, name, getattr(found, name) + getattr(meter, name))
            for name in ("calls", "seconds", "reasons", "last_reasons"):
                getattr(found, name).update(getattr(meter, name))
            found.last = {key: value + meter.last[key] for key, value in found.last.items()}
            found.notes += [note for note in meter.notes if note not in found.notes]
        return found

    def __str__(self):
        seconds = ", ".join(f"{k} {v:.2f} s" for k, v in self.seconds.items())
        return (f"{self.steps} steps ({self.skipped} skipped), sent {self.sent} bytes, received "
                f"{self.received}, dense would be {self.dense}: ratio {self.ratio:.1f}; {seconds}")
