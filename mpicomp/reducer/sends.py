"""Sends: what ranks exchange in place of gradients, where an optimizer chooses it."""

from abc import ABC, abstractmethod


class Sends(ABC):
    """What a Reducer asks of an optimizer that has something else than gradients exchanged.

    Such an optimizer has an attribute `sends`, an object of this kind, which DistributedOptimizer
    gives to the Reducer; for all others that is None, and nothing is asked. Both steps work on
    whole buckets, one after the other as gradients arrive: what is sent overlaps with backward().

    dense  is the next step exchanged dense, with gradients as they are? The same on all ranks: it
           changes in `settle` only
    facts  a text that must be the same on all ranks when the Reducer is made
    place  a text that must be the same on all ranks in every step: headers carry its digest
    note   what to say where a Reducer begins with dense steps
    """

    dense = False
    facts: str
    place = ""
    note = ""

    @abstractmethod
    def settle(self):
        """All ranks have compared their optimizers, or have made one step: choose `dense` anew."""

    @abstractmethod
    def problem(self) -> str | None:
        """Why the step that has begun cannot be made, with what to type, or None."""

    @abstractmethod
    def refusal(self, method, settings, rows) -> str | None:
        """Why it cannot be exchanged so, and what to type, or None."""

    @abstractmethod
    def load(self, bucket):
        """All gradients stand in the slots of a bucket: put what is sent in their place.

        May be called for a step that is then given up: what is kept must not change by it.
        """

    @abstractmethod
    def unload(self, bucket):
        """The mean of what was sent stands in the slots: put what p.grad is to be in its place."""
