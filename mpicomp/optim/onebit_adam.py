"""1-bit Adam: AdamW on dense gradients at first; then v stands still, and the momentum is sent."""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim.optimizer import ParamsT

from mpicomp.errors import SpecError
from mpicomp.optim.freeze import Freeze
from mpicomp.optim.momentum import Momentum
from mpicomp.reducer.optimizer_hooks import reducers_of

ADAMW_ONLY = ("amsgrad", "maximize", "foreach", "capturable", "differentiable", "fused",
              "decoupled_weight_decay")  # options of its groups that have no meaning here
MOMENTS = ("exp_avg", "exp_avg_sq")


class OneBitAdam(torch.optim.Optimizer):
    """AdamW for compressed exchange: v is frozen after a dense start, then the momentum is sent.

    params        parameters, or groups of them with options of their own, as of torch.optim.AdamW
    lr            the learning rate; schedulers change it as they do AdamW's
    betas         decay of the momentum and, until the freeze, of v
    eps           added to the root of v
    weight_decay  decoupled, as AdamW's: not in the momentum
    freeze        "auto", or the number of steps after which v is frozen; 0: a state of AdamW is
                  loaded, and v is frozen as it is there
    freeze_from   auto: not before so many steps; the end of the learning rate's warm-up
    freeze_by     auto: after so many steps in any case; None: no limit

    It needs a Reducer: mpicomp.DistributedOptimizer(OneBitAdam(...), named_parameters, method).
    Until the freeze gradients are exchanged dense and steps are those of AdamW(foreach=False), to
    the bit. At the freeze the bias of both moments is corrected, once. From then on every rank
    sends b1 * m + (1 - b1) * gradient by the Reducer's method, p.grad is the mean of these, which
    becomes m, and p -= lr * (m / (sqrt(v) + eps) + weight_decay * p). Residuals are in units of the
    momentum. An element whose v is 0, which never had a gradient, moves by weight decay only. The
    moments of 16-bit parameters are float32: in float16 the square of a small gradient would be 0.

    auto: every D = 1 / (1 - b2) steps the sum over v, its bias corrected, is compared with that of
    D steps before; v is frozen where it is at least 0.96 of it. v is the same on all ranks, so no
    message is needed.

    Raises SpecError for arguments out of range, and in step() where no Reducer is attached.

    Source: Tang et al., 1-bit Adam, ICML 2021, arXiv 2102.02888; what differs is in
    docs/optimizers.md.
    """

    def __init__(self, params: ParamsT, lr: float = 1e-3,
                 betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
                 weight_decay: float = 1e-2, *, freeze: int | str = "auto", freeze_from: int = 0,
                 freeze_by: int | None = None) -> None:
        self.rule = Freeze(freeze, freeze_from, freeze_by)
        self.sends, self._dead = Momentum(self), {}
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay,
                                      frozen_at=None, v_before=None))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As of torch's optimizers; SpecError once v is frozen, since the new one would have none.
        """
        if any(group["frozen_at"] is not None for group in self.param_groups):
            raise SpecError("add_param_group: v is frozen, and that of new parameters would be 0: "
                            "give them an optimizer of their own")
        super().add_param_group(param_group)
        _check(self.param_groups[-1])

    # ---- a step ----

    @property
    def frozen(self) -> bool:
        """Is v frozen, and the momentum sent?"""
        return self.param_groups[0]["frozen_at"] is not None

    @property
    def steps(self) -> int:
        """How many steps were made: the most of any parameter."""
        return int(max((state["step"].item() for state in self.state.values()), default=0))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step, as of torch's optimizers; returns what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._refuse_what_cannot_be()
        move = _frozen_step if self.frozen else _adamw_step
        moved = False
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    move(p, p.grad, self._state_of(p), group)
                    moved = True
        if moved and not self.frozen:
            self._look()
        return loss

    def _refuse_what_cannot_be(self):
        if not self._reducers:
            raise SpecError(
                f"step() of {type(self).__name__} without a Reducer, which exchanges what it "
                "needs: type  mpicomp.DistributedOptimizer(optimizer, model.named_parameters(), "
                "method='onebit'), also in one process")
        if self.rule.freeze == 0 and not self.state:
            raise SpecError("freeze=0 found, but no state: type  optimizer.load_state_dict(state of"
                            " AdamW), or freeze='auto', or the number of steps of the dense start")

    @property
    def _reducers(self):
        """The Reducers that exchange what this optimizer has sent."""
        return [reducer for reducer in reducers_of(self) if reducer.averager.sends is not None]

    def _state_of(self, p):
        state = self.state[p]
        if not state:
            state["step"] = torch.tensor(0.0)
            for key in MOMENTS:
                state[key] = torch.zeros_like(p, dtype=_dtype(p),
                                              memory_format=torch.preserve_format)
        return state

    # ---- the freeze ----

    def _look(self):
        """After a dense step: is v to be frozen?"""
        steps, first = self.steps, self.param_groups[0]
        horizon = max(round(1 / (1 - group["betas"][1])) for group in self.param_groups)
        if self.rule.at_once(steps):
            self._freeze(steps)
            self.sends.settle()
        elif self.rule.freeze == "auto" and steps % horizon == 0:
            before, now = first["v_before"], self._sum_of_v()
            for group in self.param_groups:
                group["v_before"] = now
            if self.rule.steady(steps, before, now):
                self._freeze(steps)
                self.sends.settle()

    def _sum_of_v(self):
        total = 0.0
        for group in self.param_groups:
            for state in (self.state[p] for p in group["params"] if p in self.state):
                _, second = _corrections(state, group)
                total += float(state["exp_avg_sq"].sum(dtype=torch.float64)) / second
        return total

    @torch.no_grad()
    def _freeze(self, steps):
        """v stands still from now on; the bias of both moments is corrected, once."""
        dead = size = 0
        for group in self.param_groups:
            for p in group["params"]:
                if not p.requires_grad and p not in self.state:
                    continue  # it is not trained
                state = self._state_of(p)
                if state["step"]:  # not in place: a state that was loaded may be another's, too
                    first, second = _corrections(state, group)
                    state["exp_avg"] = state["exp_avg"] / first
                    state["exp_avg_sq"] = state["exp_avg_sq"] / second
                dead += p.numel() - int(torch.count_nonzero(state["exp_avg_sq"]))
                size += p.numel()
            group["frozen_at"] = steps
        self._dead.clear()
        for reducer in self._reducers:
            reducer.averager.say(
                f"{type(self).__name__}: v is frozen after step {steps}, and the momentum is sent "
                f"from now on; {dead:,} of {size:,} elements had no gradient, and are left out")

    @property
    def beta1_of(self) -> dict[torch.Tensor, float]:
        """{parameter: its b1} of all parameters."""
        return {p: group["betas"][0] for group in self.param_groups for p in group["params"]}

    def dead_of(self, p: torch.Tensor) -> torch.Tensor | None:
        """Which elements of a parameter have a frozen v of 0: a mask, None where none has."""
        if p not in self.state:
            return torch.ones_like(p, dtype=torch.bool)
        if p not in self._dead:
            dead = self.state[p]["exp_avg_sq"] == 0
            self._dead[p] = dead if bool(dead.any()) else None
        return self._dead[p]

    # ---- state ----

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state of this class, to the bit, or from one of torch.optim.AdamW.

        A state of AdamW goes on dense until the freeze, or has v frozen at once where `freeze` says
        so: freeze=0, or no more steps than it has made. To be called on all ranks, each with the
        state of the same step; in a run that goes on, reducer.load_state_dict as well. Where it
        leaves v frozen on some ranks only, the next step() raises MismatchError on all.

        Raises SpecError, with nothing changed, for another optimizer's state, for options of AdamW
        that are not here (amsgrad, maximize) or out of range; MismatchError between backward() and
        step().
        """
        _refuse_others(state_dict)
        for reducer in self._reducers:
            reducer.averager.require_no_step("load_state_dict of the optimizer")
        super().load_state_dict(state_dict)
        self._load_moments(state_dict)
        if self.state and not self.frozen and self.rule.at_once(self.steps):
            self._freeze(self.steps)

    def _load_moments(self, saved):
        """Torch has made those of 16-bit parameters 16 bits, too."""
        loaded = (p for group in self.param_groups for p in group["params"])
        for number, p in zip((k for group in saved["param_groups"] for k in group["params"]),
                             loaded):
            for key in MOMENTS if number in saved["state"] and _dtype(p) != p.dtype else ():
                self.state[p][key] = saved["state"][number][key].to(p.device, _dtype(p), copy=True)

    def adamw_state_dict(self) -> dict[str, Any]:
        """A state that torch.optim.AdamW loads, to go on from here dense; its tensors are copies.

        After the freeze: the momentum and what ranks still owe of it, and v, both with the bias
        that AdamW corrects. Collective then: to be called on all ranks, between two steps.
        """
        packed, owed = self.state_dict(), {}
        if self.frozen:
            self._refuse_what_cannot_be()
            for reducer in self._reducers:
                owed |= {slot.parameter: torch.from_numpy(array).view(slot.view.shape)
                         for slot, array in reducer.averager.mean_owed().items()}
        parameters = [(p, group) for group in self.param_groups for p in group["params"]]
        for number, (p, group) in enumerate(parameters):
            if p not in self.state:
                continue
            if self.frozen:
                packed["state"][number] = self._biased(p, group, owed.get(p))
            else:
                packed["state"][number] = {key: t.clone() for key, t in self.state[p].items()}
        template = torch.optim.AdamW([torch.zeros(1)]).param_groups[0]
        for group in packed["param_groups"]:
            for key in ("frozen_at", "v_before"):
                del group[key]
            group |= {key: value for key, value in template.items() if key not in group}
        return packed

    @torch.no_grad()
    def _biased(self, p, group, owed):
        """The state of a parameter as AdamW would have it, before it corrects the bias."""
        state, dead = self.state[p], self.dead_of(p)
        first, second = _corrections(state, group) if state["step"] else (0.0, 0.0)
        momentum = state["exp_avg"].clone()
        if owed is not None:  # it is in a Reducer
            momentum += owed.to(momentum)
        if dead is not None:
            momentum.masked_fill_(dead, 0.0)
        return {"step": state["step"].clone(), "exp_avg": momentum * first,
                "exp_avg_sq": state["exp_avg_sq"] * second}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "rule": self.rule}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._dead = {}
        vars(self).setdefault("sends", Momentum(self))
        for group in self.param_groups:
            for key in ADAMW_ONLY:
                group.pop(key, None)
            group.setdefault("frozen_at", None)
            group.setdefault("v_before", None)
            _check(group)


def _dtype(p):
    """Of the moments of a parameter."""
    return torch.float32 if p.dtype in (torch.float16, torch.bfloat16) else p.dtype


def _corrections(state, group) -> tuple[float, float]:
    """What AdamW divides momentum and v by, which began at 0."""
    steps = state["step"].item()
    return tuple(1 - beta**steps for beta in group["betas"])


def _adamw_step(p, gradient, state, group):
    """That of torch.optim.AdamW(foreach=False), in the same operations."""
    (b1, b2), lr, m, v = group["betas"], group["lr"], state["exp_avg"], state["exp_avg_sq"]
    gradient = gradient.to(m.dtype)
    state["step"] += 1
    if group["weight_decay"]:
        p.mul_(1 - lr * group["weight_decay"])
    m.lerp_(gradient, 1 - b1)
    v.mul_(b2).addcmul_(gradient, gradient, value=1 - b2)
    first, second = _corrections(state, group)
    p.addcdiv_(m, (v.sqrt() / second**0.5).add_(group["eps"]), value=-lr / first)


def _frozen_step(p, momentum, state, group):
    """The mean momentum has arrived, and v stands still."""
    state["step"] += 1
    state["exp_avg"].copy_(momentum)
    if group["weight_decay"]:
        p.mul_(1 - group["lr"] * group["weight_decay"])
    p.addcdiv_(state["exp_avg"], state["exp_avg_sq"].sqrt().add_(group["eps"]),
               value=-group["lr"])


def _check(group):
    """SpecError unless the options of a group are in range; numbers become Python's own."""
    for name in ("lr", "eps", "weight_decay"):
        group[name] = float(group[name])
        if not 0 <= group[name] < float("inf"):
            raise SpecError(f"{name}={group[name]:g} found, expected a finite number, at least 0")
    group["betas"] = tuple(map(float, group["betas"]))
    if len(group["betas"]) != 2 or not all(0 <= beta < 1 for beta in group["betas"]):
        raise SpecError(f"betas={group['betas']} found, expected two numbers from 0 to below 1")


def _refuse_others(state: dict[str, Any]) -> None:
    """SpecError unless this is a state of OneBitAdam or of AdamW that can go on here."""
    for one in state["state"].values():
        if missing := {"step", "exp_avg", "exp_avg_sq"} - one.keys():
            raise SpecError(f"load_state_dict: a state without {sorted(missing)[0]!r} found, "
                            "expected one of OneBitAdam or torch.optim.AdamW")
    for group in state["param_groups"]:
        missing = {"lr", "betas", "eps", "weight_decay"} - group.keys()
        if missing or not group.keys() & {"frozen_at", "amsgrad"}:
            raise SpecError("load_state_dict: a group with the options "
                            f"{sorted(group.keys() - {'params'})} found, expected those of "
                            "OneBitAdam or torch.optim.AdamW")
        _check(dict(group))
        for key in ("amsgrad", "maximize"):
            if group.get(key):
                raise SpecError(f"load_state_dict: {key}=True found, which OneBitAdam has not")
        if group.get("weight_decay") and not group.get("decoupled_weight_decay", True):
            raise SpecError("load_state_dict: the state of an Adam whose weight decay is part of "
                            "the gradient found, expected that of AdamW, or weight_decay=0")
