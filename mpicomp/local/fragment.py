"""Fragments: parameters that are exchanged together, with the anchors that they left from."""

import re

import torch

from mpicomp.averager import Averager
from mpicomp.errors import NonFiniteError, SpecError
from mpicomp.reducer.gradients import in_torch

_NUMBERED = re.compile(r"(.*?\.)?\d+(?=\.)")


class Differences(Averager):
    """Averages how far ranks have come: anchor - parameter, by parameter name.

    parameters  {name: parameter} of these differences; where one needs no gradient it stands still
    place       where() is what headers compare in each exchange
    objection   objection() is why this rank's parameters cannot go on, or None: all ranks raise it
    """

    def __init__(self, parameters, differences, method, comm, place, objection, **options):
        self._parameters, self._place, self._objection = parameters, place, objection
        # in the order in which buckets are made: there is nothing to learn from the first exchange
        super().__init__(differences, method, comm, **options)

    def frozen(self):
        return tuple(name for name, p in self._parameters.items() if not p.requires_grad)

    def place(self):
        return self._place()

    def prepare(self):
        super().prepare()
        if text := self._objection():
            self.current.bad.setdefault("problem", text)


class Fragment:
    """Parameters of some layers: their anchors, and the differences that are exchanged.

    parameters  {name: parameter}
    anchors     {name: float32 tensor}, equal on all ranks
    differences {name: float32 tensor}: this rank's, then their mean
    averager    of the differences
    sent        the local step after which they were sent last
    due         the local step after which what was sent is applied; None: nothing is under way
    """

    def __init__(self, parameters, anchors, averager):
        self.parameters, self.anchors = parameters, anchors
        self.differences = {name: torch.zeros_like(anchor) for name, anchor in anchors.items()}
        self.averager = averager(parameters, self.differences)
        self.sent, self.due = 0, None
        self._sent_before, self._moving = 0, []  # names of what moved when it was sent
        self._arrived = None  # was there a mean? None: not known yet
        self._error = None

    @torch.no_grad()
    def send(self, step, lag, weight):
        """Begin to exchange the differences as they are after this local step."""
        for name, p in self.parameters.items():
            difference = self.differences[name]
            # from what the parameter was set to, so that a rank that stands still gives zero
            difference.copy_(self.anchors[name].to(p.dtype))
            difference.sub_(p)
        ordered = dict(reversed(self.differences.items()))
        under_way = self.averager.send(ordered, weight)
        self._arrived, self._error = None if under_way else False, None
        self._moving = [name for name, p in self.parameters.items() if p.requires_grad]
        self.sent, self._sent_before, self.due = step, self.sent, step + lag

    def land(self):
        """Wait for what is under way; the differences are the mean, if there is one."""
        if self.due is not None and self._arrived is None:
            try:
                self._arrived = self.averager.finish()
            except NonFiniteError as error:
                self._arrived, self._error = False, error
            except Exception:  # it is not under way any more, and can be sent again
                self._take_back()
                raise

    def _take_back(self):
        self.due = self._arrived = None
        self.sent = self._sent_before

    @torch.no_grad()
    def apply(self, outer, mix) -> bool:
        """Move the anchors by the mean, and the parameters to them; was there a mean?

        mix  the share of its own value that a parameter keeps
        """
        self.land()
        arrived, self.due, self._arrived = self._arrived, None, None
        if arrived:
            for name in self._moving:
                self.anchors[name].grad = self.differences[name]
            outer.step()
            for name in self._moving:
                self.anchors[name].grad = None
        for name, p in self.parameters.items():
            own = mix if arrived else 0.0
            if own:
                p.copy_(torch.lerp(self.anchors[name], p.float(), own))
            else:
                p.copy_(self.anchors[name])
        return arrived

    def take_error(self):
        """The NonFiniteError of the last exchange, or None; it is told once."""
        error, self._error = self._error, None
        return error

    @property
    def finite(self) -> bool:
        """After an exchange without a mean: were this rank's own differences finite?"""
        return all(bool(torch.isfinite(d).all()) for d in self.differences.values())

    def regroup(self, comm):
        """Go on over fewer ranks; what was under way has never been sent."""
        self.averager.regroup(comm)
        if self.due is not None:
            self._take_back()

    # ---- state

    def state(self) -> dict:
        """What of a checkpoint is this fragment's; what is under way has landed."""
        self.land()
        owed = in_torch(self.averager.state_dict())
        due = -1 if self.due is None else self.due
        error = None if self._error is None else str(self._error)
        found = {f"anchor/{name}": anchor.clone() for name, anchor in self.anchors.items()}
        found |= {f"parameter/{name}": p.detach().clone() for name, p in self.parameters.items()}
        found |= {key: value for key, value in owed.items() if key != "step"}
        if self._arrived:
            found |= {f"mean/{name}": self.differences[name].clone() for name in self._moving}
        return found | {"fragment": [owed["step"], self.sent, due, bool(self._arrived), error,
                                     self.finite]}

    @torch.no_grad()
    def restore(self, state, fragment):
        """Take over what `state` gave: `fragment` is its entry of that name."""
        step, self.sent, due, arrived, error, finite = fragment
        mine = {key: state[key] for key in self.averager.state_dict() if key != "step"}
        self.averager.load_state_dict({"step": step, **mine})
        self.due, self._arrived = (None, None) if due < 0 else (due, arrived)
        self._sent_before, self._error = self.sent, NonFiniteError(error) if error else None
        for name, anchor in self.anchors.items():
            anchor.copy_(state[f"anchor/{name}"])
            self.parameters[name].copy_(state[f"parameter/{name}"])
        self._moving = [name for name in self.anchors if f"mean/{name}" in state]
        for name, difference in self.differences.items():
            if name in self._moving:
                difference.copy_(state[f"mean/{name}"])
            else:  # what is not finite need not be known in full
                difference.fill_(0.0 if finite else float("nan"))


def layer(name) -> str:
    """The layer of a parameter: its name up to the first number (blocks.3), else its module's."""
    found = _NUMBERED.match(name)
    return found[0] if found else name.rpartition(".")[0] or name


def divided(named, count) -> list[dict]:
    """{name: parameter} of each fragment: of n, fragment i has the layers i, i + n, i + 2n ..."""
    layers = {}
    for name, p in named:
        layers.setdefault(layer(name), {})[name] = p
    if len(layers) < count:
        raise SpecError(f"fragments={count} found, expected at most {len(layers)}, the number of "
                        "layers")
    parts = [{} for _ in range(count)]
    for number, content in enumerate(layers.values()):
        parts[number % count] |= content
    return parts
