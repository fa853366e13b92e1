"""Fragments: parameters that are exchanged together, with the anchors that they left from."""

import re
from dataclasses import dataclass

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


@dataclass
class UnderWay:
    """What a fragment has sent and not applied yet.

    step     the local step after which it was sent; it is applied after the step `due`
    frozen   names of the parameters that stood still as it was sent
    sent     {name: the parameter as it was sent}, where training goes on meanwhile
    arrived  is there a mean? None: not known yet
    finite   where there is none: were this rank's own differences finite?
    """

    step: int
    due: int
    frozen: tuple
    sent: dict
    arrived: bool | None = None
    finite: bool = True


class Fragment:
    """Parameters of some layers: their anchors, and the differences that are exchanged.

    parameters  {name: parameter}
    anchors     {name: float32 tensor}, equal on all ranks
    differences {name: float32 tensor}: this rank's, then their mean
    averager    of the differences
    covered     local steps whose progress has been exchanged or given up
    under_way   an UnderWay, or None
    """

    def __init__(self, parameters, anchors, averager):
        self.parameters, self.anchors = parameters, anchors
        self.differences = {name: torch.zeros_like(anchor) for name, anchor in anchors.items()}
        self.averager = averager(parameters, self.differences)
        self.covered, self.under_way, self._error = 0, None, None

    @property
    def due(self) -> int | None:
        """The local step after which what was sent is applied; None: nothing is under way."""
        return self.under_way and self.under_way.due

    @torch.no_grad()
    def send(self, step, lag, weight):
        """Begin to exchange the differences as they are after this local step."""
        for name, p in self.parameters.items():
            difference = self.differences[name]
            # from what the parameter was set to, so that a rank that stands still gives zero
            difference.copy_(self.anchors[name].to(p.dtype))
            difference.sub_(p)
        ordered = dict(reversed(self.differences.items()))
        begun, self._error = self.averager.send(ordered, weight), None
        sent = {name: p.clone() for name, p in self.parameters.items()} if lag else {}
        self.under_way = UnderWay(step, step + lag, self.averager.buckets.frozen, sent)
        if not begun:  # all weights are 0
            self.averager.stats.skipped += 1
            self._arrive(False)

    def land(self):
        """Wait for what is under way; the differences are the mean, if there is one."""
        if self.under_way is not None and self.under_way.arrived is None:
            try:
                self._arrive(self.averager.finish())
            except NonFiniteError as error:
                self._error = error
                self._arrive(False)
            except Exception:  # it is not under way any more, and can be sent again
                self.under_way = None
                raise

    def _arrive(self, arrived):
        self.under_way.arrived = arrived
        self.under_way.finite = arrived or all(bool(torch.isfinite(d).all())
                                               for d in self.differences.values())

    @torch.no_grad()
    def apply(self, outer, now, mix=0.0, rest=False) -> bool:
        """Move the anchors by the mean, and the parameters to them, after the local step `now`.

        mix   the share of its own value that a parameter keeps
        rest  does it keep, on top, what it has moved by since it was sent?

        Without a mean parameters become the anchors. False where that is because this rank's own
        differences were not finite.
        """
        self.land()
        done, self.under_way = self.under_way, None
        if not done.arrived:
            self.covered = now
            self.reset()
            return done.finite
        moving = [name for name in self.anchors if name not in done.frozen]
        for name in moving:
            self.anchors[name].grad = self.differences[name]
        outer.step()
        for name in moving:
            self.anchors[name].grad = None
        # where parameters are the anchors nothing is left to be exchanged
        self.covered = done.step if mix or rest else now
        for name, p in self.parameters.items():
            anchor = self.anchors[name]
            if rest and done.sent:
                p.copy_(anchor + (p.float() - done.sent[name].float()))
            elif mix:
                p.copy_(torch.lerp(anchor, p.float(), mix))
            else:
                p.copy_(anchor)
        return True

    @torch.no_grad()
    def reset(self):
        """Parameters become the anchors; what is under way goes on."""
        sent = self.under_way.sent if self.under_way else {}
        for name, p in self.parameters.items():
            p.copy_(self.anchors[name])
            if name in sent:  # what has moved since is gone
                sent[name].copy_(p)

    def take_error(self):
        """The NonFiniteError of the last exchange, or None; it is told once."""
        error, self._error = self._error, None
        return error

    def regroup(self, comm):
        """Go on over fewer ranks; what was under way has never been sent."""
        self.averager.regroup(comm)
        self.under_way = None

    # ---- state

    def state(self) -> dict:
        """What of a checkpoint is this fragment's; what is under way has landed."""
        self.land()
        owed, flight = in_torch(self.averager.state_dict()), self.under_way
        found = {f"anchor/{name}": anchor.clone() for name, anchor in self.anchors.items()}
        found |= {f"parameter/{name}": p.detach().clone() for name, p in self.parameters.items()}
        found |= {key: value for key, value in owed.items() if key != "step"}
        place = {"step": owed["step"], "covered": self.covered, "under way": None,
                 "error": self._error and str(self._error)}
        if flight:
            found |= {f"sent/{name}": p.clone() for name, p in flight.sent.items()}
            if flight.arrived:
                found |= {f"mean/{name}": d.clone() for name, d in self.differences.items()}
            place["under way"] = [flight.step, flight.due, list(flight.frozen), flight.arrived,
                                  flight.finite]
        return found | {"fragment": place}

    def late(self, place) -> dict:
        """{key: tensor of that shape} of what a state has besides, where this is its "fragment"."""
        kinds = ["sent", *["mean"] * place["under way"][3]] if place["under way"] else []
        return {f"{kind}/{name}": anchor for kind in kinds for name, anchor in self.anchors.items()}

    @torch.no_grad()
    def restore(self, state, place):
        """Take over what `state` gave: `place` is its entry "fragment"."""
        mine = {key: state[key] for key in self.averager.state_dict() if key != "step"}
        self.averager.load_state_dict({"step": place["step"], **mine})
        self.covered, self.under_way = place["covered"], None
        self._error = NonFiniteError(place["error"]) if place["error"] else None
        for name, anchor in self.anchors.items():
            anchor.copy_(state[f"anchor/{name}"])
            self.parameters[name].copy_(state[f"parameter/{name}"])
        if place["under way"]:
            step, due, frozen, arrived, finite = place["under way"]
            sent = {name: torch.empty_like(p).copy_(state[f"sent/{name}"])
                    for name, p in self.parameters.items()}
            self.under_way = UnderWay(step, due, tuple(frozen), sent, arrived, finite)
            for name in self.anchors if arrived else ():
                self.differences[name].copy_(state[f"mean/{name}"])


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
