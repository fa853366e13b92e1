"""Where the gradient of a parameter lies in a bucket, and how it comes in and goes out.

The gradient of a float32 parameter lives in its bucket (averager/memory.py): after the hook's one
copy, p.grad is a view of it, and Pending until the exchange is over (pending.py). Float16 and
bfloat16 are widened by that same copy, and what arrives is rounded once, so everything between is
float32. Gradients from elsewhere are copied in and out.
"""

import numpy as np
import torch

from mpicomp import kernels
from mpicomp.averager.slot import Slot, refuse_overflow
from mpicomp.reducer.pending import Pending, plain

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class GradientSlot(Slot):
    """One parameter's place in a bucket: `view` with the parameter's shape, `flat` without.

    view   the bucket's own torch tensor, which nobody else holds
    shown  another one in the same memory: p.grad, which users may change or move elsewhere
    scale  what p.grad is multiplied by outside of the bucket: a loss scale, see amp.py
    frozen no gradient is handed out, since the parameter needed none when this step began
    became what `changed` has returned last
    """

    scale, became = 1.0, None

    def __init__(self, name, parameter, bucket, segment, owner=None):
        super().__init__(name, bucket.grad[segment.slice])
        self.parameter, self.view = parameter, bucket.view(segment)
        self.owner = owner  # whose gradients those are that come from here: see `owner_of`
        self._address, self._kind, self._at = self.view.data_ptr(), kind(parameter), ()
        self._shown = self._pending = self._handed = self._own = None
        self._version = 0

    @property
    def _on_host(self):
        return isinstance(self.flat, np.ndarray)

    def follow(self, old):
        self.scale = old.scale

    @property
    def direct(self) -> bool:
        """May p.grad be a view of the bucket? Not where the parameter's elements lie otherwise.

        torch's fused optimizers walk through memory, whatever the strides.
        """
        self._meet()
        return self._like and self.parameter.is_contiguous()

    @property
    def changed(self) -> str | None:
        """What the parameter has become since the bucket was made, in words, or None."""
        self._meet()
        return self.became

    def _meet(self):
        """Look at the parameter where it is not the one of before: it costs microseconds."""
        p = self.parameter
        if (p.data_ptr(), p.dtype, p.numel()) == self._at:
            return
        self._at = p.data_ptr(), p.dtype, p.numel()
        self._like = p.dtype == grad_dtype(p) == torch.float32 and p.device == self.view.device
        self.became = became(p, self._kind)

    @property
    def shown(self):
        """The tensor that is p.grad, in the bucket's memory: made anew where it lies elsewhere.

        m.double(), m.share_memory() or p.grad.data = x move the object that they find.
        """
        if self._shown is None or not self._is_here(self._shown):
            # one with a storage and a version of its own
            mine = torch.from_numpy(self.flat) if self._on_host else self.view.data
            self._shown, self._pending = mine.view(self.view.shape), None
            self._shown.owner = self.owner
        return self._shown

    def _is_here(self, tensor) -> bool:
        """Does this tensor lie where the bucket has this gradient?"""
        if tensor is self._shown:
            return tensor.data_ptr() == self._address and tensor.dtype == torch.float32
        return (tensor.layout is torch.strided and tensor.data_ptr() == self._address
                and tensor.dtype == torch.float32 and tensor.shape == self.view.shape
                and tensor.is_contiguous())

    # ---- in ----

    def fill(self, finish=None, absent=False):
        """Bring the parameter's gradient into the bucket; zeros where there is none.

        With `finish`, p.grad is Pending from now on, and waits for the exchange by finish(). With
        `absent` it is no gradient of this step.
        """
        if absent:
            self.bring(None)
            return
        direct = self.direct
        gradient = None if self.became else plain(self.parameter.grad)
        if direct or not finish:  # else `settle` brings it, after all hooks
            self.bring(gradient)
        if gradient is not None and direct:
            gradient = self.shown
        if finish:
            self._hand_out(gradient, finish)
        else:
            self.parameter.grad = gradient

    def bring(self, gradient):
        """Copy a gradient to its place, in true units, and look for what is not finite."""
        if gradient is None:
            self.view.zero_()
        elif self._on_host and self.scale == 1.0 and _side_by_side(gradient, self.view):
            one_pass = kernels.of(self.flat).copy_finite
            self.fine = one_pass(gradient.detach().numpy().reshape(-1), self.flat)
            return
        elif not self._is_here(gradient):
            self.view.copy_((gradient.to_dense() if gradient.is_sparse else gradient).detach())
        if self.scale != 1.0:
            self.view.mul_(1.0 / self.scale)
        self._look(gradient is None)

    def _look(self, surely=False):
        """Is all of it finite?"""
        self.fine = (surely or kernels.of(self.flat).finite(self.flat)) if self._on_host else None

    def _hand_out(self, gradient, finish):
        self._own, self._version = gradient, None if gradient is None else gradient._version
        if gradient is not None and not gradient.is_sparse:  # those cannot be Pending
            if gradient is not self._shown:
                gradient.owner = self.owner
                gradient = Pending.of(gradient, finish)
            else:
                if self._pending is None:
                    self._pending = Pending.of(gradient, finish)
                gradient = self._pending
            self.parameter.grad = gradient
        self._handed = gradient

    def settle(self, finish) -> bool:
        """All hooks of the parameter are through: take in what they changed.

        False where there is no gradient any more.
        """
        if self.became or (self._own is not None and self._own is self._shown
                           and self.untouched):
            return True
        direct = self.direct
        now = plain(self.parameter.grad)
        if now is None:
            return False
        if self._is_here(now):
            self._look()
        elif direct:
            self.view.copy_(now.detach())  # made from p.grad, so in true units
            self._look()
        else:
            self.bring(now)
        self._hand_out(self.shown if direct else now, finish)
        return True

    @property
    def untouched(self) -> bool:
        """Is p.grad as `fill` has left it? (While it is Pending nobody changes it unseen.)"""
        return (self.parameter.grad is self._handed
                and (self._own is None or self._own._version == self._version))

    @property
    def shows(self) -> bool:
        """Is p.grad at least in the bucket's memory?"""
        now = plain(self.parameter.grad)
        return now is not None and self._is_here(now)

    def refuse_overflow(self, step):
        """NonFiniteError unless the parameter's dtype can hold what stands in the bucket."""
        refuse_overflow(self, step, torch.finfo(self.parameter.dtype).max, self.parameter.dtype)

    # ---- out ----

    def give_back(self, scaled=True):
        """Make p.grad what now stands in the bucket, times the loss scale where `scaled`; None for
        a parameter that is frozen now."""
        if self.frozen:
            self.clear()
            return
        if scaled and self.scale != 1.0:
            self.view.mul_(self.scale)
        self._handed = self._own = None
        if self.direct:
            self.parameter.grad = self.shown
            return
        own = plain(self.parameter.grad)
        if own is None or own.is_sparse or self._is_here(own):
            own = torch.empty_like(self.parameter, dtype=grad_dtype(self.parameter)).detach()
            self.parameter.grad = own.copy_(self.view)
        else:
            own.detach().copy_(self.view)
            self.parameter.grad = own

    def clear(self):
        """There is no gradient."""
        self.parameter.grad = self._handed = self._own = None

    def move(self):
        """Add what now stands in the bucket to the parameter itself; there is no gradient left."""
        with torch.no_grad():
            self.parameter += self.view.to(self.parameter.device)
        self.clear()


def owner_of(gradient):
    """The `owner` of the slot that has made this p.grad what it is, or None."""
    return getattr(plain(gradient), "owner", None)


def kind(parameter):
    """What of a parameter must stay as it was when its place in a bucket was made."""
    return parameter.dtype, parameter.device, parameter.shape


def became(parameter, agreed) -> str | None:
    """What a parameter was and is, where it is no longer of the `kind` that ranks agreed on."""
    if kind(parameter) == agreed:
        return None
    before, now = (f"{dtype} on {device}, shape {list(shape)}"
                   for dtype, device, shape in (agreed, kind(parameter)))
    return f"was {before}, when the Reducer was made, and is {now}, now"


def grad_dtype(parameter) -> torch.dtype:
    """Of its gradient: torch 2.10 and newer let it be another one than its own."""
    return getattr(parameter, "grad_dtype", None) or parameter.dtype


def _side_by_side(gradient, view):
    """Is this another dense float32 CPU array whose elements lie as those of `view` do?"""
    return (gradient.dtype == torch.float32 and not gradient.is_sparse
            and gradient.device.type == "cpu" and gradient.is_contiguous()
            and gradient.data_ptr() != view.data_ptr())
