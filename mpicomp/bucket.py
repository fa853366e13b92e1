"""Buckets: parameters side by side in flat float32 arrays, in the order in which backward ends.

The gradient of a float32 parameter lives in its bucket (see place.py): after the hook's one copy,
p.grad is a view of it. Float16 and bfloat16 are widened by that same copy, and what arrives is
rounded once, so everything between is float32. Gradients from elsewhere are copied in and out.
"""

import torch

from mpicomp import kernels, place, staging
from mpicomp.errors import NonFiniteError
from mpicomp.layout import Layout

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Slot:
    """One parameter's place in a bucket: `view` with the parameter's shape, `flat` without.

    scale  what p.grad is multiplied by outside of the bucket: a loss scale, see amp.py
    ready  is this step's gradient in place?
    fine   is all of it finite? None on a GPU, where one look at a bucket costs less than many
    """

    scale = 1.0

    def __init__(self, name, parameter, view, flat):
        self.name, self.parameter, self.view, self.flat = name, parameter, view, flat
        self._same_kind = parameter.dtype == torch.float32 and parameter.device == view.device
        self.ready, self.fine = False, True
        self._on_host = not staging.is_device_array(flat)

    @property
    def direct(self) -> bool:
        """May p.grad be a view of the bucket? Not where the parameter's elements lie otherwise.

        torch's fused optimizers walk through memory, whatever the strides.
        """
        return self._same_kind and self.parameter.is_contiguous()

    def fill(self):
        """Bring the parameter's gradient into the bucket; zeros where there is none."""
        gradient = self.parameter.grad
        self.bring(gradient)
        if self.direct and gradient is not None:
            self.parameter.grad = self.view

    def bring(self, gradient):
        """Copy a gradient to its place, in true units, and look for what is not finite."""
        if gradient is None:
            self.view.zero_()
        elif self._on_host and self.scale == 1.0 and _side_by_side(gradient, self.view):
            one_pass = kernels.of(self.flat).take
            self.fine = one_pass(gradient.detach().numpy().reshape(-1), self.flat)
            return
        elif gradient is not self.view:
            self.view.copy_((gradient.to_dense() if gradient.is_sparse else gradient).detach())
        if self.scale != 1.0:
            self.view.mul_(1.0 / self.scale)
        self.fine = (gradient is None or kernels.of(self.flat).finite(self.flat)
                     if self._on_host else None)

    def refuse_overflow(self, step):
        """Raise NonFiniteError unless the parameter's dtype can hold what stands in the bucket."""
        def complain(_):
            raise NonFiniteError(
                f"step {step}: every rank's gradient is finite, but their sum for {self.name!r} is "
                f"beyond {self.parameter.dtype}: take average=True, or make the loss smaller")

        most = torch.finfo(self.parameter.dtype).max
        kernels.of(self.flat).within(self.flat, -most, most, complain)

    def give_back(self):
        """Make p.grad what now stands in the bucket."""
        if self.scale != 1.0:
            self.view.mul_(self.scale)
        if self.direct:
            self.parameter.grad = self.view
        elif self.parameter.grad is None or self.parameter.grad.is_sparse:
            self.parameter.grad = torch.empty_like(self.parameter).copy_(self.view).detach()
        else:
            self.parameter.grad.detach().copy_(self.view)

    def move(self):
        """Add what now stands in the bucket to the parameter itself; there is no gradient left."""
        with torch.no_grad():
            self.parameter += self.view.to(self.parameter.device)
        self.parameter.grad = None


class Bucket:
    """A flat float32 gradient with its layout, and the slots of its parameters.

    `flight` is the array that the exchange works on: `grad` itself, or one that delay.py puts here.
    """

    def __init__(self, index, named_parameters, where):
        self.index = index
        self.layout = Layout.of((name, p.shape) for name, p in named_parameters)
        self.grad, flat = where.bucket(self.layout.size)
        self.flight = self.grad
        self.slots = [Slot(name, p, flat[s.slice].view(p.shape), self.grad[s.slice])
                      for (name, p), s in zip(named_parameters, self.layout.segments)]
        self.reset()

    def reset(self):
        """Before the first gradient of a step."""
        self.missing, self.launched = len(self.slots), False
        for slot in self.slots:
            slot.ready = False

    @property
    def touched(self) -> bool:
        """Has any gradient of this step arrived?"""
        return self.missing < len(self.slots)

    def first_bad(self) -> str | None:
        """The first parameter whose gradient holds NaN or Inf, or None."""
        finite = kernels.of(self.grad).finite
        if any(slot.fine is None for slot in self.slots) and not finite(self.grad):
            return next(slot.name for slot in self.slots if not finite(slot.flat))
        return next((slot.name for slot in self.slots if slot.fine is False), None)


def _side_by_side(gradient, view):
    """Is this another dense float32 CPU array whose elements lie as those of `view` do?"""
    return (gradient is not view and gradient.dtype == torch.float32 and not gradient.is_sparse
            and gradient.device.type == "cpu" and gradient.is_contiguous())


def groups(named_parameters, bucket_bytes) -> list[list]:
    """Parameters in this order, cut into groups of at most `bucket_bytes` of float32 (or one)."""
    found, room = [], 0
    for name, parameter in named_parameters:
        size = 4 * parameter.numel()
        if not found or size > room:
            found.append([])
            room = bucket_bytes
        found[-1].append((name, parameter))
        room -= size
    return found


def make_buckets(named_parameters, bucket_bytes, where=place.Host()) -> list[Bucket]:
    """A bucket for each of the `groups`, in the memory of this place."""
    return [Bucket(i, group, where)
            for i, group in enumerate(groups(named_parameters, bucket_bytes))]
