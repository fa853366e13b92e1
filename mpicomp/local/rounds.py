"""Rounds: how many steps each rank makes alone until ranks exchange."""

from mpicomp.errors import SpecError


class Rounds:
    """Counts local steps, and knows when which fragment is sent.

    every      local steps in a round, or a function of the round's number (from 0) that gives them
    fragments  how many are sent in a round, one every `length` / `fragments` steps
    lag        steps after which what was sent is applied
    step       local steps so far; `number` rounds have ended, the last one after `began` steps
    """

    def __init__(self, every, fragments, lag):
        self.every, self.fragments, self.lag = every, fragments, lag
        self.step = self.number = self.began = 0
        self._asked = None  # (a round's number, its length)

    @property
    def length(self) -> int:
        """Local steps in the present round; SpecError if that cannot be."""
        if self._asked is None or self._asked[0] != self.number:
            length = self.every(self.number) if callable(self.every) else self.every
            self._asked = self.number, self._checked(length)
        return self._asked[1]

    def check(self):
        """SpecError unless the present round can be made."""
        return self.length

    def _checked(self, length):
        where = f"round {self.number}: every={length!r}" if callable(self.every) else \
            f"every={length!r}"
        if isinstance(length, bool) or not isinstance(length, int) or length < 1:
            raise SpecError(f"{where} found, expected a whole number of steps, at least 1, or a "
                            "function of the round's number that gives one")
        if length % self.fragments:
            raise SpecError(f"{where} found, expected a multiple of fragments={self.fragments}")
        if self.lag > length:
            raise SpecError(f"{where} with lag={self.lag} found, expected a lag of at most a "
                            "round, since a fragment is applied before it is sent again")
        return length

    @property
    def sends(self) -> int | None:
        """The number of the fragment that is sent after the last step, or None."""
        return self._sent_after(self.step - self.began)

    @property
    def sends_next(self) -> bool:
        """Is a fragment sent after the next step?"""
        return self._sent_after(self.step - self.began + 1) is not None

    def _sent_after(self, position):
        turn, rest = divmod(position, self.length // self.fragments)
        return None if rest or not turn else turn - 1

    @property
    def over(self) -> bool:
        """Has the last step ended the round?"""
        return self.step - self.began == self.length

    def end(self):
        """The next step begins another round."""
        self.number, self.began = self.number + 1, self.step

    def place(self) -> str:
        """Where this rank is, for a comparison with others."""
        return f"round {self.number}, local step {self.step}"
