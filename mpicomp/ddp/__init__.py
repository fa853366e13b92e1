"""Gradients of DistributedDataParallel through mpicomp: a communication hook and its state.

    mpicomp.ddp.init_process_group()                  # MPI's ranks, no address, no ports
    model = torch.nn.parallel.DistributedDataParallel(net)
    state = mpicomp.ddp.HookState("onebit", named_parameters=net.named_parameters())
    model.register_comm_hook(state, mpicomp.ddp.comm_hook)

DDP decides when backward hands gradients over; from there on they go the way of Reducer: into its
own buckets, which do not change when DDP rebuilds its own after the first step, so residuals stay
with their parameters. The mean is over the ranks of the MPI communicator, whatever DDP's process
group is.
"""

import copy
import sys
from collections.abc import Iterable, Mapping
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from mpicomp import catalogue, mpi
from mpicomp.ddp.process_group import MpiGroup, init_process_group
from mpicomp.ddp.process_group.watch import Vigil
from mpicomp.errors import SpecError
from mpicomp.exchange import exchange
from mpicomp.reducer import Reducer, amp
from mpicomp.reducer.bucket import Slot
from mpicomp.reducer.lost_hooks import Nodes
from mpicomp.transport import packet
from mpicomp.transport.meter import Meter

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["HookState", "MpiGroup", "comm_hook", "init_process_group"]


class HookState:
    """What `comm_hook` keeps between steps: a Reducer that DDP feeds.

    method            a Method or its specification; every synchronous method works
    comm              an MPI communicator; None means COMM_WORLD. A duplicate is used
    named_parameters  of the module inside of DDP. Without them parameters are called "0", "1", ...
                      in the order in which DDP first shows them, the ranks are compared in the
                      first step instead of here, and a rule(...) by name is refused
    keywords          average, bucket_bytes, seed, nonfinite and stall_timeout, as for Reducer;
                      not sparse: gradients of DDP travel dense

    bucket_bytes is that of mpicomp's buckets; choose bucket_cap_mb of DDP not larger, or backward
    is over before the first one is complete. After an error in backward (NonFiniteError with
    nonfinite="raise", MismatchError, StallError) DDP itself cannot go on.

    A copy (copy.deepcopy, pickle, also of the DDP model that it is registered with) has the
    settings and the residuals, and begins at its first step, as if made without named_parameters.
    """

    def __init__(self, method: catalogue.Method | str = "dense", comm: "MPI.Comm | None" = None, *,
                 named_parameters: Iterable[tuple[str, torch.nn.Parameter]] | None = None,
                 **keywords: Any) -> None:
        if "sparse" in keywords:
            raise SpecError(f"HookState: sparse={keywords['sparse']!r} found, which only "
                            "mpicomp.Reducer takes: leave it out, and sparse gradients of DDP are "
                            "exchanged as the dense ones that they stand for")
        self.comm, self._keywords = mpi.communicator(
            comm, keywords.get("stall_timeout"), "making a HookState"), keywords
        self.method = catalogue.method(method)
        self._begin()
        if self.method.delay or exchange(self.method.exchange).asynchronous:
            raise SpecError(f"HookState: {self.method!r} applies a gradient in another step than "
                            "the one it is of, which a hook of DDP cannot; use mpicomp.Reducer")
        if named_parameters is not None:
            self._make(named_parameters)
        elif self.method.name == "rule":
            raise SpecError("HookState: a rule needs the names of parameters; type  "
                            f"HookState({str(method)!r}, named_parameters=net.named_parameters())")

    def _begin(self):
        """As before the first step."""
        self._reducer, self._loaded, self._scaler = None, None, None
        self._shown, self._stats = [], Meter()
        self._given = []        # slots that DDP has filled in this step
        self._futures = []      # (future, DDP's buffer, its parameters) of this step
        self._standing_in = None  # the DDP that is out of examples, within its join()
        self._copied = None     # what a copy must find again
        self._frozen = []       # (name, parameter): in no bucket, neither DDP's nor ours
        self._since = None      # when this step's last bucket came, while torch may wait for us

    def _make(self, named_parameters):
        """The Reducer, with its hooks taken off and slots that DDP fills."""
        named = list(named_parameters)
        reducer = _Reducer(named, self.method, self.comm, **self._keywords)
        self._frozen = [(name, p) for name, p in named if not p.requires_grad]
        reducer._unhook()
        self._home = {}
        for bucket in reducer._buckets:
            bucket.slots = [_DdpSlot(s.name, s.parameter, s.view, s.flat) for s in bucket.slots]
            self._home |= {id(slot.parameter): (bucket, slot) for slot in bucket.slots}
        self._reducer, self.method = reducer, reducer.method
        self._vigil = Vigil(self, reducer.comm, reducer._pipeline.timeout)
        self._nodes = Nodes(reducer)
        if self._loaded is not None:
            reducer.load_state_dict(self._loaded)
        if self._scaler is not None:
            amp.follow_scale(self._slots, self._scaler)

    @property
    def _slots(self):
        return [slot for _, slot in self._home.values()]

    # ---- one step ----

    def _take(self, bucket):
        """One bucket of DDP; returns a future of its buffer, filled when the last bucket is in."""
        self._since = None
        if not self._futures:
            self._standing_in = _joined()
        self._mark_packets()
        buffer, parameters = bucket.buffer(), bucket.parameters()
        gradients = [buffer] if buffer.is_sparse else bucket.gradients()
        future = torch.futures.Future()
        self._futures.append((future, buffer, parameters))
        if self._reducer is None:
            self._shown.append(list(zip(parameters, gradients, strict=True)))
            if bucket.is_last():
                # until DDP rebuilds its buckets they hold the parameters from the last to the first
                shown = [pair for part in reversed(self._shown) for pair in part]
                self._make(zip(self._names(len(shown)), (p for p, _ in shown), strict=True))
                self._mark_packets()
                self._shown.clear()
                for p, gradient in shown:
                    self._arrive(p, gradient)
        else:
            for p, gradient in zip(parameters, gradients, strict=True):
                self._arrive(p, gradient)
        if bucket.is_last():
            self._finish()
        else:
            self._since = perf_counter()
        return future

    def _mark_packets(self):
        """Let the others know if they are not to count this rank."""
        if self._reducer is not None:
            joined = self._standing_in
            away = joined is not None and not joined._divide_by_initial_world_size
            self._reducer._mark = packet.JOINED if away else 0

    def _arrive(self, parameter, gradient):
        if id(parameter) not in self._home:
            raise SpecError(f"comm_hook: DDP hands over a parameter of shape "
                            f"{list(parameter.shape)} that HookState does not know: give it the "
                            "named_parameters() of the module that DDP wraps")
        bucket, slot = self._home[id(parameter)]
        slot.gradient = gradient
        self._given.append(slot)
        self._reducer._arrived(bucket, slot)

    def _finish(self):
        """Every bucket of DDP is in: wait for the mean, and let DDP have it."""
        skipped = self._reducer.stats.skipped
        try:
            self._reducer.finish()
        finally:
            given, futures = list(self._given), list(self._futures)
            self._given.clear()
            self._futures.clear()
        if self._reducer.stats.skipped > skipped:
            self._leave_out(given)
        for slot in given:
            slot.gradient = None
        for name, parameter in self._frozen:
            if parameter.requires_grad:
                raise SpecError(f"comm_hook: {name!r} was frozen when DDP and HookState were made, "
                                "so its gradient stays this rank's own: after unfreezing a layer "
                                "make DistributedDataParallel and HookState anew")
        for future, buffer, parameters in futures:
            if buffer.is_sparse:  # a bucket of one parameter; DDP takes what the future holds
                view = self._home[id(parameters[0])][1].view
                buffer = view.to_sparse(buffer.sparse_dim()).to(buffer.device, buffer.dtype)
            future.set_result(buffer)

    def _leave_out(self, slots):
        """A gradient was not finite somewhere: no optimizer must step on this one."""
        if self._scaler is not None:
            for slot in slots:  # the scaler looks for these, and skips and lowers its scale
                slot.view.fill_(float("nan"))
                slot.give_back()
            return

        if self._standing_in is not None:
            return  # DDP writes no p.grad on this rank, and there is no backward

        def clear():
            for slot in slots:
                slot.parameter.grad = None

        # DDP writes p.grad in a callback at the end of backward; ours comes after that one
        later = torch.autograd.Variable._execution_engine.queue_callback
        later(lambda: later(clear))

    # ---- as of a Reducer ----

    def follow(self, scaler: torch.amp.GradScaler) -> "HookState":
        """Exchange unscaled gradients under a torch.amp.GradScaler. Returns self.

        Residuals are then in true units though the scale moves, and a gradient that is not finite
        on any rank makes the scaler of every rank skip and lower its scale. Needs
        nonfinite="skip".
        """
        amp.refuse_raise(self._keywords.get("nonfinite", "raise"))
        self._scaler = scaler
        if self._copied:
            self._copied["scaler"] = False
        if self._reducer is not None:
            amp.follow_scale(self._slots, scaler)
        return self

    @property
    def stats(self) -> Meter:
        """Bytes, ratio, steps and seconds, as Reducer.stats."""
        return self._stats if self._reducer is None else self._reducer.stats

    def check_replicas(self, model: torch.nn.Module | None = None, **objects: Any) -> None:
        """As Reducer.check_replicas; give the optimizer, too: (net, optimizer=optimizer)."""
        if self._reducer is None:
            raise SpecError("check_replicas() before the first step: type  HookState(method, "
                            "named_parameters=net.named_parameters())  to compare from the start")
        self._reducer.check_replicas(model, **objects)

    def state_dict(self) -> dict[str, Any]:
        """This rank's residuals by parameter name, as Reducer.state_dict: save one a rank."""
        if self._reducer is None:
            return dict(self._loaded or {"step": 0})
        return self._reducer.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave on this rank, to the bit.

        What it gives before the first step without named_parameters says only that: nothing is
        loaded where no step was made.
        Raises MismatchError where it does not fit: here, or in the first step where
        named_parameters were not given.
        """
        unbegun = state == {"step": 0}
        if self._reducer is None:
            self._loaded = None if unbegun else dict(state)
        elif not (unbegun and self._reducer.step == 0):
            self._reducer.load_state_dict(state)


    # ---- copies ----

    def __getstate__(self):
        names = [] if self._reducer is None else [name for name, _ in self._reducer._named]
        copied = self._copied or {"names": names, "size": self.comm.size}
        scaled = copied.get("scaler") or self._scaler is not None
        return {"method": self.method, "keywords": self._keywords, "loaded": self.state_dict(),
                "copied": copied | {"scaler": scaled}}

    def __setstate__(self, kept):
        self._begin()
        self.comm, self.method, self._keywords = None, kept["method"], kept["keywords"]
        self._copied = kept["copied"]
        self.load_state_dict(kept["loaded"])

    def __deepcopy__(self, _):
        twin = type(self).__new__(type(self))
        twin.__setstate__(copy.deepcopy(self.__getstate__()))
        twin.comm = self.comm
        return twin

    def _names(self, count):
        """Of the parameters that DDP shows, in the model's order."""
        if self._copied is None:
            return map(str, range(count))
        size = mpi.load().COMM_WORLD.size if self.comm is None else self.comm.size
        found = {"ranks": size, "parameters": count}
        expected = {"ranks": self._copied["size"],
                    "parameters": len(self._copied["names"]) or count}
        if found != expected or self._copied["scaler"]:
            raise SpecError(
                f"HookState: this is a copy of one of {expected['parameters']} parameters on "
                f"{expected['ranks']} ranks, found {count} on {size}" if found != expected else
                "HookState: this is a copy of one that follows a GradScaler; call  "
                "state.follow(scaler)  on the copy, too")
        return self._copied["names"] or map(str, range(count))


def comm_hook(state: HookState, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """For DistributedDataParallel.register_comm_hook(state, comm_hook)."""
    if not isinstance(state, HookState):
        raise SpecError(f"comm_hook: found a state of type {type(state).__name__}, expected a "
                        "HookState; type  model.register_comm_hook(mpicomp.ddp.HookState(\"onebit"
                        "\", named_parameters=net.named_parameters()), mpicomp.ddp.comm_hook)")
    return state._take(bucket)


def _joined():
    """The DDP that this rank stands in for, out of examples within its join(), or None.

    torch tells a hook nothing of it, and then calls it outside of any backward.
    """
    frame = sys._getframe()
    while frame is not None and frame.f_code.co_name != "_match_all_reduce_for_bwd_pass":
        frame = frame.f_back
    return frame and frame.f_locals.get("self")


class _Reducer(Reducer):
    """One whose mean leaves out ranks that have joined with divide_by_initial_world_size=False."""

    @property
    def _weight(self):
        _, mails = self._lane
        away = max(len(mail.flagged(packet.JOINED)) if mail.headers else 0 for mail in mails)
        if away and self.method.exchange == "hierarchical":
            raise SpecError("model.join(divide_by_initial_world_size=False): with exchange="
                            "hierarchical nobody knows how many ranks of another node have "
                            "joined; leave the argument out, or take another exchange")
        return 1.0 / (self.comm.size - away) if self.average else 1.0


class _DdpSlot(Slot):
    """A slot that takes from DDP's bucket and gives back to it; p.grad is DDP's affair."""

    gradient = None

    def fill(self, finish=None, absent=False):
        self.bring(self.gradient)  # None where DDP leaves this parameter out

    def give_back(self):
        if self.scale != 1.0:
            self.view.mul_(self.scale)
        if self.gradient is not None and not self.gradient.is_sparse:
            self.gradient.copy_(self.view)
