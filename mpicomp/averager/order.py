"""The order of arrays in buckets: at first that of registration, then that in which they complete.

Arrays are registered in one order and complete in another; a bucket that waits for an array that
comes late holds up all behind it. So the first step notes in which order arrays complete, as
torch's DistributedDataParallel does; rank 0's order is taken by all, and where it cuts other
buckets than the reverse order of registration, buckets are made anew before the second step.
Residuals are kept by name, so nothing that is owed is lost.
"""

import numpy as np


class Order:
    """Of the (name, array) pairs of one averager, as numbers of their registration.

    registered  the reverse order of registration, since backward ends with the first parameters
    now         that of the buckets
    next        that of the buckets to be made before the next step, or None
    noting      is the order of this step to be noted?
    """

    def __init__(self, named):
        self._named = list(named)
        self._number = {name: i for i, (name, _) in enumerate(self._named)}
        self.registered = list(reversed(range(len(self._named))))
        self.now, self.next = self.registered, None
        self.restart(noting=True)

    def restart(self, noting):
        """Note the order of the next step, or do not."""
        self.noting, self._seen, self.next = noting, [], None

    def note(self, name):
        """An array is complete."""
        if self.noting:
            self._seen.append(self._number[name])

    @property
    def seen(self) -> list:
        """The order that was noted; what never completed comes last."""
        seen = dict.fromkeys(self._seen)
        return [*seen, *(i for i in self.now if i not in seen)]

    def arranged(self, order) -> list:
        """The (name, array) pairs in an order."""
        return [self._named[i] for i in order]

    @property
    def coming(self) -> list:
        """The order that the next step has."""
        return self.next or self.now

    def state(self) -> dict:
        """{"order": int64[arrays]}, or nothing where buckets are as they were first made."""
        return {} if self.coming == self.registered else {"order": np.array(self.coming)}

    def saved(self, state) -> list:
        """The order of a saved state."""
        return [int(i) for i in state["order"]] if "order" in state else self.registered

    def objection(self, state) -> str | None:
        """Why a saved state's order does not fit these arrays, or None."""
        if "order" in state and sorted(map(int, state["order"])) != sorted(self.registered):
            return (f"saved 'order' has {len(state['order'])} parameters, expected each of "
                    f"{len(self.registered)} once")
