"""The compression ratio that a run must keep: RatioError names the bytes that cost too much."""

from collections import Counter

import numpy as np

from mpicomp.errors import RatioError


class Ratio:
    """Holds dense / sent, over all ranks together, to at least `least`.

    Judged are every `window` steps since the start, with all that was sent in them: warm-up, flush,
    dense cases of a rule. Where every packet has the same length (`fixed`), the first step after
    the warm-up is judged by itself, because all others will be like it. 16 bytes a rank are summed
    for that; they are booked under the reason "receipt", and not judged.
    """

    def __init__(self, link, settings):
        self.link, self.stats = link, link.stats
        self.least, self.window = settings.require_ratio, settings.ratio_window
        self._open(0)
        self.alone = True  # is a step by itself still to be judged?
        self.waits = False  # was the last step dense, because of what is sent later?

    def _open(self, step):
        self.first = step
        self.before = Counter(sent=self.stats.sent, dense=self.stats.dense)
        self.reasons = Counter(self.stats.reasons)

    def restart(self, step):
        """A saved state was loaded: windows are counted from its step."""
        self._open(step)
        self.alone = True

    def move(self, link, step):
        """Go on over other ranks, from this step."""
        self.link = link
        self.restart(step)

    def after(self, step, method, waits=False):
        """Judge what `step`, just exchanged, completes. RatioError on all ranks alike.

        waits  the step was dense, because of what is sent later: such steps count only in `check`
        """
        if self.waits and not waits:
            self._open(step)
        self.waits = waits
        if waits:
            return
        if self.alone and step >= method.warmup and method.compressor.fixed:
            sent, dense = self.stats.last["sent"], self.stats.last["dense"]
            self._judge(step, step, sent, dense, self.stats.last_reasons)
            self.alone = False
        if step + 1 - self.first >= self.window:
            self.check(step + 1)

    def check(self, step):
        """Judge the steps from the last judgement to before `step`, if there are any."""
        if step > self.first:
            now = self.stats
            self._judge(self.first, step - 1, now.sent - self.before["sent"],
                        now.dense - self.before["dense"], now.reasons - self.reasons)
            self._open(step)

    def _judge(self, first, last, sent, dense, reasons):
        reasons = Counter(reasons)
        mine = np.array([sent - reasons.pop("receipt", 0), dense], np.int64)
        sent, dense = map(int, self.link.sum(mine, "receipt", "adding up bytes"))
        if dense >= self.least * sent:
            return
        theirs = self.link.gather(reasons, "adding up bytes")
        everyone = sum(map(Counter, theirs), Counter())
        parts = ", ".join(f"{reason} {size:,} ({100 * size / sent:.0f} %)"
                          for reason, size in everyone.most_common() if size)
        ranks = self.link.comm.size
        steps = f"step {last}" if first == last else f"steps {first} to {last}"
        raise RatioError(
            f"require_ratio={self.least:g}, found {dense / sent:.2f} over all {ranks} "
            f"ranks in {steps}: {sent:,} bytes sent, {dense:,} as float32. Sent because of: "
            f"{parts}. Take away what costs most, or type a lower require_ratio")
