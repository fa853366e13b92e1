"""Where the step stands that has begun, or was finished last."""


class Step:
    """Of one averager.

    finished    is the exchange over? The next array then begins another step
    next        the bucket to send next: in their order, on every rank
    marked      do headers say already what is frozen in this step?
    bad         what is wrong on this rank: {number of a bucket: name of an array with NaN or Inf,
                "problem": what all ranks are to raise, "given up": True}
    applied     (bucket, step) pairs that were handed out, and that no optimizer has stepped on
    taken_back  was the step before handed out, and applied by nobody?
    outcome     how the last step or flush ended: "skipped", "given up", "flushed", or None
    """

    def __init__(self):
        self.finished, self.next, self.marked = False, 0, False
        self.bad, self.applied, self.taken_back, self.outcome = {}, [], False, None

    def begin(self):
        """Another step begins."""
        self.finished, self.next, self.marked = False, 0, False
        self.taken_back |= bool(self.applied)
        self.applied = []
