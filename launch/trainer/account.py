"""What a training has sent and how long it took, since step 0 and since the last log line."""
from __future__ import annotations

import collections


class Account:
    """The bytes, seconds and losses of this rank; a resumed training goes on with the old ones.

    seconds   of all steps so far
    times     seconds of each step of this process
    tally     sums since the last log line: loss, targets, steps, seconds, bytes sent
    """

    def __init__(self, reducer):
        self.reducer, self.seconds, self.times = reducer, 0.0, []
        self._sent = 0  # bytes when the last step ended
        self.earlier = dict(sent=0, dense=0, reasons={})
        self.tally = dict(loss=0.0, targets=0, steps=0, seconds=0.0, sent=0)

    def resume(self, seconds, bytes_sent, tally):
        """Go on with what a checkpoint holds."""
        self.seconds, self.earlier, self.tally = seconds, bytes_sent, tally

    def add(self, loss, targets, seconds):
        """Count a step: its summed loss over so many targets, and how long it took."""
        self.times.append(seconds)
        self.seconds += seconds
        before, self._sent = self._sent, self.reducer.stats.sent
        for key, value in dict(loss=loss, targets=targets, steps=1, seconds=seconds,
                               sent=self._sent - before).items():
            self.tally[key] += value

    def clear(self):
        """Begin a new log line."""
        self.tally = dict.fromkeys(self.tally, 0)

    def bytes(self):
        """Bytes since step 0: sent by this rank, what dense float32 would be, and by reason."""
        stats = self.reducer.stats
        reasons = collections.Counter(self.earlier.get("reasons", {}))
        reasons.update(stats.reasons)
        return dict(sent=self.earlier["sent"] + stats.sent,
                    dense=self.earlier["dense"] + stats.dense, reasons=dict(reasons))

    def ratio(self):
        """How many times fewer bytes than dense float32."""
        counted = self.bytes()
        return counted["dense"] / max(1, counted["sent"])
