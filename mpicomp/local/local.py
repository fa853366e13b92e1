"""mpicomp.LocalUpdates: local SGD, DiLoCo, SparseLoCo: steps alone, then an exchange."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch

from mpicomp import mpi
from mpicomp.averager import Averager
from mpicomp.averager.engine import resolved
from mpicomp.catalogue import Method
from mpicomp.errors import MpicompError, SpecError
from mpicomp.exchange import exchange
from mpicomp.local import outer as outer_optimizers
from mpicomp.local.fragment import Differences, Fragment, divided
from mpicomp.local.rounds import Rounds
from mpicomp.names import known_as
from mpicomp.reducer.parameters import trainable
from mpicomp.reducer.replicas import compare, facts_of_module, fingerprint, leaves
from mpicomp.transport.agree import agree
from mpicomp.transport.meter import Meter

if TYPE_CHECKING:
    from mpi4py import MPI

Named = torch.nn.Module | Iterable[tuple[str, torch.nn.Parameter]]
Outer = str | Callable[[list[torch.Tensor]], torch.optim.Optimizer]


class LocalUpdates:
    """Every rank trains alone for `every` steps; then ranks average how far they have come.

    model      a torch.nn.Module, or (name, parameter) pairs; parameters that need no gradient are
               left out. The same values on all ranks, of a module also buffers: MismatchError
               otherwise (type  mpicomp.broadcast_parameters(model)  before). Buffers stay each
               rank's own
    inner      any torch optimizer of these parameters. Its state is the rank's, and is not sent
    every      H, the local steps in a round, or a function of the round's number, from 0, that
               gives H: lambda r: 1 if r < 1000 else 4
    method     how differences travel: a Method or its specification, as of an Averager; error
               feedback as there. Not with delay=1, exchange=peers or server
    outer      what moves the anchor: "average:lr=1", "nesterov:lr=0.7,momentum=0.9",
               "heavy-ball:lr=0.7,momentum=0.9", or a function that makes a torch optimizer of a
               list of float32 tensors. It is the attribute `outer`
    comm       an MPI communicator; None means COMM_WORLD. Duplicates are used
    keep_inner False: each round begins with the state that `inner` has now
    fragments  n: parameters are divided by layer into n parts, exchanged in turn, one every H / n
               steps
    lag        what is sent after step t is applied after step t + lag, of at most H; meanwhile
               training goes on. Costs a copy of the parameters that are under way
    mix        the share of its own value that a parameter keeps where the anchor is applied
    weight     this rank's share in the mean, such as its number of examples, or a function that
               gives it, asked at each exchange; None: all are equal. Where all ranks give 0 there
               is no mean: all go back to the anchor, and stats.skipped counts it
    seed, bucket_bytes, nonfinite, stall_timeout, progress: as of an Averager

    With anchor a, equal on all ranks, and parameters p of rank i after H steps, a round ends with

        D = mean over ranks of (a - p),  a = outer(a, D),  p = a

    so D stands where a gradient would ("pseudo-gradient"). Anchors are float32 also where
    parameters have 16 bits. Where one rank's difference is not finite nothing is applied: anchor
    and residuals are as before, and all parameters of the fragment become the anchor. On the ranks
    that diverged those of all fragments do, and `inner` gets the state back that it had at the
    start; nonfinite="raise" then raises NonFiniteError on all ranks, and the next step() goes on.

    Sources: local SGD (Stich 2019), post-local SGD (Lin et al. 2020), FedOpt (Reddi et al. 2021),
    DiLoCo (Douillard et al. 2023, arXiv 2311.08105), Streaming DiLoCo (arXiv 2501.18512).

        local = mpicomp.LocalUpdates(model, torch.optim.AdamW(model.parameters()), every=20)
        for x, y in batches:
            local.inner.zero_grad()
            loss_fn(model(x), y).backward()
            local.step()
    """

    def __init__(self, model: Named, inner: torch.optim.Optimizer,
                 every: int | Callable[[int], int] = 20, method: Method | str = "dense",
                 outer: Outer = "average", comm: "MPI.Comm | None" = None, *,
                 keep_inner: bool = True, fragments: int = 1, lag: int = 0, mix: float = 0.0,
                 weight: float | Callable[[], float] | None = None, seed: int = 0,
                 bucket_bytes: int = 25 << 20, nonfinite: str = "raise",
                 stall_timeout: float | None = None, progress: str = "auto") -> None:
        self.inner, self.weight, self._mix = inner, weight, mix
        self._keep_inner, self._interrupted, self._before = keep_inner, False, 0
        self._rounds = Rounds(every, fragments, lag)
        module = isinstance(model, torch.nn.Module)
        named, problem = trainable(model.named_parameters() if module else model)
        method, unknown = resolved(method)
        self._known = {id(p) for _, p in named}
        found = {name: p.detach().to(torch.float32, copy=True) for name, p in named}
        parts = []
        try:
            for wrong in filter(None, (problem, unknown)):
                raise wrong
            self._check(method)
            parts = divided(named, fragments)
            self.outer = outer_optimizers.made(outer, list(found.values()))
            self._fresh = copy.deepcopy(inner.state_dict()["state"])
        except Exception as error:  # whatever it is, the others wait to hear of it
            problem = error
        private = mpi.communicator(comm, stall_timeout, "starting LocalUpdates")
        try:
            self._agree(private, problem)
            compare(private, lambda: facts_of_module(model) if module else [
                ("parameter", name, fingerprint(p)) for name, p in named], mpi.limit(private))
        finally:
            mpi.release(private)
        self.fragments = [
            Fragment(part, {name: found[name] for name in part},
                     lambda parameters, differences, number=number: Differences(
                         parameters, differences, method, comm, self._place,
                         self._objection, seed=(seed + number) % 2**64 if number else seed,
                         bucket_bytes=bucket_bytes, nonfinite=nonfinite,
                         stall_timeout=stall_timeout, progress=progress))
            for number, part in enumerate(parts)]

    def _check(self, method):
        """SpecError where an argument cannot be."""
        rounds = self._rounds
        for name, value, kind, fits, expected in (
                ("fragments", rounds.fragments, int, lambda v: v >= 1,
                 "a whole number, at least 1"),
                ("lag", rounds.lag, int, lambda v: v >= 0, "a whole number of steps, at least 0"),
                ("mix", self._mix, Real, lambda v: 0 <= v < 1, "a number from 0, below 1")):
            if isinstance(value, bool) or not isinstance(value, kind) or not fits(value):
                raise SpecError(f"{name}={value!r} found, expected {expected}")
        rounds.check()
        if method.delay or exchange(method.exchange).asynchronous:
            late = f"exchange={method.exchange}" if not method.delay else "delay=1"
            raise SpecError(f"{late} found: differences cannot come late by themselves; type  "
                            "lag=STEPS  to go on training while they travel")
        if not isinstance(self.inner, torch.optim.Optimizer):
            raise SpecError(f"inner: {type(self.inner).__name__} found, expected a torch optimizer")
        if text := self._objection():
            raise SpecError(text)

    def _place(self):
        """What headers compare in each exchange: this step, and the outer optimizer's options."""
        return f"{self._rounds.place()}, outer {outer_optimizers.facts(self.outer)}"

    def _objection(self):
        """Why this rank's parameters would differ from others', in words, or None."""
        if any(p.requires_grad and id(p) not in self._known
               for group in self.inner.param_groups for p in group["params"]):
            return ("the inner optimizer has a parameter that needs a gradient and that "
                    "LocalUpdates does not know, so it would differ from rank to rank: make "
                    "LocalUpdates anew after unfreezing a layer, with all parameters")
        return None

    def _agree(self, comm, problem):
        """Raise on all ranks alike if arguments differ or any rank has a problem."""
        rounds = self._rounds
        facts = {"lag": rounds.lag, "fragments": rounds.fragments, "mix": self._mix,
                 "every": "a function" if callable(rounds.every) else rounds.every,
                 "keep_inner": self._keep_inner, "weight": self.weight is not None}
        if problem is None:
            facts["outer"] = outer_optimizers.facts(self.outer)
        else:
            facts["problem"] = str(problem) if isinstance(problem, MpicompError) else \
                f"{type(problem).__name__}: {problem}"
        agree(comm, facts, "every rank must make LocalUpdates with the same arguments")

    # ---- a step

    def step(self, closure: Callable[[], Any] | None = None,
             scaler: "torch.amp.GradScaler | None" = None) -> Any:
        """Make the inner optimizer's step, and what is due after it; returns the closure's loss.

        scaler  is asked to make the step, scaler.step(inner); a step that it skips counts, since
                ranks exchange after equally many calls

        Must be called equally often on all ranks. Raises NonFiniteError (nonfinite="raise"),
        MismatchError or StallError, on all ranks alike. After an error in the exchange, such as the
        death of a rank, the next call makes no step of its own, and repeats the exchange. With a
        lag it does not repeat it: parameters stay as they are, and the next exchange of the
        fragment, or sync(), has all that has moved since the last one that arrived.
        """
        if closure and scaler:
            raise SpecError("step: a closure and a scaler found, expected one of them: a "
                            "GradScaler makes steps without closures")
        loss = None
        if not self._interrupted:
            self._rounds.check()  # before anything is done
            loss = scaler.step(self.inner) if scaler else self.inner.step(closure)
            self._rounds.step += 1
            self._interrupted = True
        now, lag = self._rounds.step, self._rounds.lag
        done = [f for f in self.fragments if f.due == now]
        for fragment in done:
            self._apply(fragment, self._mix)
        if (number := self._rounds.sends) is not None:
            fragment = self.fragments[number]
            self._send(fragment, lag)
            if not lag:
                self._apply(fragment, self._mix)
                done.append(fragment)
        for fragment in self.fragments:
            if fragment.due is not None:
                fragment.averager.poll()
        if self._rounds.over:
            self._end_round()
        self._interrupted = False
        self._tell(done)
        return loss

    def sync(self) -> None:
        """End the round now, on all ranks: every parameter is its anchor afterwards.

        What is under way is applied, and what has moved since it was sent is exchanged, without lag
        and mix: nothing is lost, also not after an error in an exchange. For the end of a training
        that does not end with a round, and before parameters are compared. Not needed to evaluate
        or save: see `anchored` and `state_dict`.
        """
        for fragment in self.fragments:
            if fragment.due is not None:
                self._apply(fragment, rest=True)
            if fragment.covered < self._rounds.step:
                self._send(fragment, 0)
                self._apply(fragment)
        if self._rounds.step > self._rounds.began:
            self._end_round()
        self._interrupted = False
        for fragment in self.fragments:
            fragment.reset()
        self._tell(self.fragments)

    def _send(self, fragment, lag):
        fragment.send(self._rounds.step, lag, self.weight() if callable(self.weight)
                      else self.weight)

    def _apply(self, fragment, mix=0.0, rest=False):
        if not fragment.apply(self.outer, self._rounds.step, mix, rest):
            # what the next forward pass reads is not finite either, nor are moments
            for each in self.fragments:
                each.reset()
            self._restart_inner()

    def _end_round(self):
        self._rounds.end()
        if not self._keep_inner:
            self._restart_inner()

    def _restart_inner(self):
        """Give the inner optimizer the state that it had at the start; learning rates stay."""
        self.inner.load_state_dict(self.inner.state_dict() | {"state": copy.deepcopy(self._fresh)})

    @staticmethod
    def _tell(fragments):
        """Raise the first error that exchanges of these fragments have left."""
        errors = [error for fragment in fragments if (error := fragment.take_error())]
        if errors:
            raise errors[0]

    @property
    def exchanges_next(self) -> bool:
        """Will the next step() communicate? For Recovery, whose pieces are these steps only."""
        return self._interrupted or self._rounds.sends_next

    @property
    def steps(self) -> int:
        """Local steps so far."""
        return self._rounds.step

    @property
    def rounds(self) -> int:
        """Rounds that have ended."""
        return self._rounds.number

    @property
    def stats(self) -> Meter:
        """Bytes and seconds so far, a Meter; `dense` is what exchanging every step would have sent.
        """
        found = Meter.total(averager.stats for averager in self.averagers)
        elements = sum(averager.elements for averager in self.averagers)
        found.dense = 4 * elements * (self._rounds.step - self._before)
        return found

    @property
    def comm(self) -> "MPI.Intracomm":
        """The communicator: a private duplicate."""
        return self.averagers[0].comm

    @property
    def averagers(self) -> list[Averager]:
        """The Averager of each fragment."""
        return [fragment.averager for fragment in self.fragments]

    # ---- anchors

    def _pairs(self):
        """(parameter, anchor) of all."""
        return [(fragment.parameters[name], anchor) for fragment in self.fragments
                for name, anchor in fragment.anchors.items()]

    @contextmanager
    def anchored(self) -> Iterator[None]:
        """In this context parameters are the anchors, equal on all ranks: to evaluate or export.

        Afterwards they are this rank's own again. Not collective; costs a copy of the parameters.
        """
        with torch.no_grad():
            own = [p.clone() for p, _ in self._pairs()]
            for p, anchor in self._pairs():
                p.copy_(anchor)
        try:
            yield
        finally:
            with torch.no_grad():
                for (p, _), kept in zip(self._pairs(), own, strict=True):
                    p.copy_(kept)

    # ---- state

    def state_dict(self) -> dict[str, Any]:
        """All that this rank needs to go on to the bit, also from the middle of a round.

        "anchor/<name>", "parameter/<name>" (this rank's own), "error/<name>" (its residuals, also
        "error2/..."), "sent/<name>" and "mean/<name>" of what has arrived and is not applied yet,
        "inner" and "outer", the optimizers' states, "optimizers", their classes, "fresh", the inner
        state that a diverged rank gets back, "step", "round" and "fragments". Not in it: the
        model's buffers, and what is the program's own, such as generators of random numbers,
        schedulers and a GradScaler. It waits for what is under way, so all ranks call it. Copies.
        Save it with checkpoint.save as each rank's own, and on another number of ranks load what
        checkpoint.repartition(states, ranks, keep="mean") gives: new rank r goes on from what
        former rank r (modulo their number) had, and what all owe is shared out.
        """
        parts = [fragment.state() for fragment in self.fragments]
        places = [part.pop("fragment") for part in parts]
        state = {"step": self._rounds.step, "round": self._rounds.number,
                 "began": self._rounds.began, "interrupted": self._interrupted,
                 "fragments": places, "inner": copy.deepcopy(self.inner.state_dict()),
                 "outer": copy.deepcopy(self.outer.state_dict()),
                 "fresh": copy.deepcopy(self._fresh),
                 "optimizers": [type(self.inner).__name__, type(self.outer).__name__]}
        for part in parts:
            state |= part
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave on this rank, to the bit; sets parameters, too.

        Collective. On all ranks, with nothing changed on any, raises MismatchError where the state
        of some does not fit in names, shapes or optimizers, or where states are not of one step and
        anchor; SpecError where all have the same state that does not fit.
        """
        now = self.state_dict()
        found = {}  # the state, by the names that are known here
        compare(self.comm, lambda: self._facts(state, now, found), self.averagers[0].link.timeout,
                {"anchor": "load the states of one checkpoint on every rank",
                 "outer": "load the states of one checkpoint on every rank"})
        self.inner.load_state_dict(copy.deepcopy(found["inner"]))  # torch takes its tensors over
        self.outer.load_state_dict(copy.deepcopy(found["outer"]))
        self._fresh = copy.deepcopy(found["fresh"])
        for fragment, place in zip(self.fragments, found["fragments"], strict=True):
            fragment.restore(found, place)
        self._rounds.step, self._rounds.number = found["step"], found["round"]
        self._rounds.began, self._interrupted = found["began"], found["interrupted"]
        self._before = self._rounds.step

    def _facts(self, state, now, found):
        """Put a state into `found` that fits this one, `now`; what all ranks must have alike."""
        late = [f"{kind}/{name}" for kind in ("sent", "mean")
                for fragment in self.fragments for name in fragment.anchors]
        state = dict(zip(known_as(state, dict.fromkeys([*now, *late])), state.values()))
        needed = {key: value for key, value in now.items() if key not in late}
        _same_names(needed, state.keys() - late)
        if len(state["fragments"]) != len(self.fragments):
            raise SpecError(f"saved with fragments={len(state['fragments'])}, this has "
                            f"{len(self.fragments)}")
        for fragment, place in zip(self.fragments, state["fragments"], strict=True):
            needed |= fragment.late(place)
        _same_names(needed, state.keys())
        for key, value in needed.items():
            if hasattr(value, "shape") and state[key].shape != value.shape:
                raise SpecError(f"saved {key!r} has shape {list(state[key].shape)}, expected "
                                f"{list(value.shape)}")
        kinds = dict(zip(("inner", "outer"), state["optimizers"], strict=True))
        for name, optimizer in (("inner", self.inner), ("outer", self.outer)):
            if text := outer_optimizers.objection(name, optimizer, kinds[name], state[name]):
                raise SpecError(text)
        found |= state
        # whether its own differences were finite is each rank's own
        places = [[place["step"], place["covered"], place["under way"] and place["under way"][:-1]]
                  for place in state["fragments"]]
        return [("step", "", f"{state['step']}, {state['round']}, {places}"),
                *(("anchor", key, fingerprint(value)) for key, value in state.items()
                  if key.startswith("anchor/")),
                *(("outer", name, fingerprint(leaf)) for name, leaf in leaves(state["outer"]))]

    # ---- ranks that die, and the end

    @property
    def communicators(self) -> list:
        """All that MPI is called on here, to revoke them where a rank has died."""
        return [comm for averager in self.averagers for comm in averager.link.communicators]

    @property
    def irreplaceable(self) -> str | None:
        """Why this cannot go on where a rank has died, or None."""
        if self._rounds.lag:
            return "lag leaves exchanges under way that not all ranks may have begun"
        return self.averagers[0].irreplaceable

    def regroup(self, comm: "MPI.Comm") -> None:
        """Go on over `comm`, whose ranks are some of the present ones, in the present round.

        Collective over `comm`. An exchange that was begun has never happened: the next step()
        makes it. Every rank keeps its own progress, and what ranks that are gone still owed, or
        had found since the last exchange, is lost. Refused with a lag.
        """
        if refusal := self.irreplaceable:
            raise SpecError(f"regroup: {refusal}")
        for fragment in self.fragments:
            fragment.regroup(comm)

    def close(self) -> None:
        """Do nothing from now on; another may have the communicator."""
        for averager in self.averagers:
            averager.close()


def _same_names(needed, found):
    """SpecError where a saved state lacks a key, or has another."""
    for key in sorted(needed.keys() ^ found):
        raise SpecError(f"the saved state {'lacks' if key in needed else 'has'} {key!r}, "
                        f"which this model {'needs' if key in needed else 'does not know'}")


def SparseLoCo(model: Named, inner: torch.optim.Optimizer, every: int = 30,
               method: Method | str = "chunks:k=64,block=4096,bits=2,decay=0.95",
               outer: Outer = "average", comm: "MPI.Comm | None" = None,
               **options: Any) -> LocalUpdates:
    """LocalUpdates with SparseLoCo's settings (arXiv 2508.15706): the largest 64 of 4,096 elements.

    Values of 2 bits, a residual that decays by 0.95 in each round in place of an outer momentum,
    and an outer step of `outer="average:lr=1"`, or less later. `options` are those of LocalUpdates.
    Differs from the paper's code: the mean is over all ranks, not over the senders of an element.
    """
    return LocalUpdates(model, inner, every, method, outer, comm, **options)
