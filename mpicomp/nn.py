"""DoReFa's quantisers of weights, activations and back-flowing gradients, as torch functions.

Zhou, Wu, Ni, Zhou, Wen, Zou: DoReFa-Net, arXiv 1606.06160; where text and code differ, the
authors' code in tensorpack (examples/DoReFa-Net). Three numbers of bits (W, A, G) name a network:
(1, 2, 6) has weights of 1 bit, activations of 2 bits and gradients of 6. All is emulated in
floating point, as in that code: training is no faster, but every number has only k bits. Bits are
1 ... 16, or 32, which turns a quantiser off.

    model = mpicomp.nn.convert(model, weights=1, activations=2, gradients=6, generator=noise)
    mpicomp.DistributedOptimizer(optimizer, model.named_parameters(), method="dorefa:bits=6")

The layers and the method `dorefa` are different quantisers: G here quantises dL/d(output) of a
layer inside a rank's own backward pass; the method quantises the parameters' gradients that ranks
exchange.

The parameters stay float32; every forward pass quantises them by a function without randomness. So
replicas that start equal stay bit-identical. The noise of G acts on a rank's own gradient, before
the exchange. It should differ between ranks (equal noise would not average out): `reseed` makes it
a function of (seed, rank, step).
"""

from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from mpicomp import philox
from mpicomp.errors import SpecError

Model = TypeVar("Model", bound=torch.nn.Module)

_MOST = 16  # n = 2**16 - 1 and the noise of +-1/2 beside it fit into float32's 24 bits


# ---- functions ------------------------------------------------------------------------------


def quantize_k(x: Tensor, bits: int) -> Tensor:
    """round(n x) / n with n = 2**bits - 1, for x in [0, 1] of any shape: one of 2**bits levels.

    Rounds half to even. The gradient passes straight through. Source: `quantize` of the code.
    """
    return _Round.apply(x, 2**bits - 1) if _on(bits) else x


def weight(w: Tensor, bits: int) -> Tensor:
    """The quantised weights that a layer uses, of w's shape, from the float32 weights w.

    bits = 1:  sign(w) E|w|, where sign(0) = +1 and E is the mean over the tensor
    bits > 1:  2 quantize_k(tanh(w) / (2 max|tanh(w)|) + 1/2) - 1, so in [-1, 1] whatever w's scale

    Zero is not a level: with more than one bit it becomes +1 / (2**bits - 1), and so does a tensor
    of zeros. For 1 bit the gradient passes straight through; for more it does so for the rounding
    alone, while tanh and max are differentiated. Source: `fw` of the code.
    """
    if not _on(bits):
        return w
    if bits == 1:
        return _Sign.apply(w)
    squashed = torch.tanh(w)
    most = squashed.abs().amax()
    most = torch.where(most == 0, torch.ones_like(most), most)
    return 2 * quantize_k(squashed / (2 * most) + 0.5, bits) - 1


def activation(x: Tensor, bits: int) -> Tensor:
    """quantize_k(clip(x, 0, 1)), of x's shape; the gradient is 1 where 0 <= x <= 1, 0 elsewhere.

    It replaces a ReLU, but saturates at 1: put a normalisation before it. 32 bits give x itself,
    neither rounded nor clipped. Source: `fa` of the code, with the clip before it.
    """
    return quantize_k(x.clamp(0, 1), bits) if _on(bits) else x


def gradient(x: Tensor, bits: int, generator: torch.Generator | None = None) -> Tensor:
    """x itself, [batch, ...]; the gradient that comes back through it is quantised to `bits`.

    f_gamma^k (`quantize_gradient`), with a new sigma in each backward pass, drawn on x's device
    from `generator` or torch's own. Source: `fg` of the code, which puts it between a convolution
    and its normalisation.
    """
    return _Gradient.apply(x, bits, generator) if _on(bits) else x


def quantize_gradient(dr: Tensor, bits: int, sigma: Tensor) -> Tensor:
    """f_gamma^k(dr), [batch, ...]: 2 m (quantize_k(dr / (2 m) + 1/2 + sigma / n) - 1/2).

    m is the largest magnitude of each sample, over all axes but the first; n = 2**bits - 1; sigma
    has dr's shape and is uniform in [-1/2, 1/2). The levels are m (2 q - n) / n, q = 0 ... n, and
    the expectation is dr. Computed in at least float32, with the operations of the method `dorefa`
    in their order. A sample of zeros stays zero; where a sample holds NaN or Inf, what comes out is
    not finite either. Source: the paper's f_gamma^k, `grad_fg` of the code.
    """
    wide = dr.to(torch.promote_types(dr.dtype, torch.float32))
    axes = tuple(range(1, dr.dim()))
    most = wide.abs().amax(axes, keepdim=True) if axes else wide.abs()
    n = 2**bits - 1
    scaled = wide / torch.where(most == 0, torch.ones_like(most), most)
    codes = (scaled * (n / 2) + n / 2 + sigma).round().clamp(0, n)
    return ((2 * codes - n) / n * most).to(dr.dtype)


def reseed(generator: torch.Generator, seed: int, rank: int, step: int) -> torch.Generator:
    """Make the noise of a step a function of (seed, rank, step); returns the generator.

    Call it before each forward pass: a resumed training then has the same noise, and every rank its
    own. The seed comes from Philox, with a counter that no compressor uses.
    """
    counter = philox.MASK32, philox.MASK32, step & philox.MASK32, rank & philox.MASK32
    key = seed & philox.MASK32, seed >> 32 & philox.MASK32
    high, low, *_ = philox.block(counter, key)
    return generator.manual_seed(int(high) >> 1 << 32 | int(low))


# ---- modules --------------------------------------------------------------------------------


class Conv2d(torch.nn.Conv2d):
    """torch's Conv2d with `weights` bits per weight, `gradients` per element of dL/d(output).

    Takes [batch, channels, height, width]. The bias, if any, is not quantised. Initialisation,
    names and state_dict are those of torch.nn.Conv2d.
    """

    def __init__(self, *args: Any, weights: int = 1, gradients: int = 32,
                 generator: torch.Generator | None = None, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        _take(self, weights, gradients, generator)

    def forward(self, x: Tensor) -> Tensor:
        y = self._conv_forward(x, weight(self.weight, self.weight_bits), self.bias)
        return gradient(y, self.gradient_bits, self.generator)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {_bits(self)}"


class Linear(torch.nn.Linear):
    """torch's Linear with `weights` bits per weight, `gradients` per element of dL/d(output).

    Takes [batch, ..., features]. The bias, if any, is not quantised. Initialisation, names and
    state_dict are those of torch.nn.Linear.
    """

    def __init__(self, *args: Any, weights: int = 1, gradients: int = 32,
                 generator: torch.Generator | None = None, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        _take(self, weights, gradients, generator)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.linear(x, weight(self.weight, self.weight_bits), self.bias)
        return gradient(y, self.gradient_bits, self.generator)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {_bits(self)}"


class Activation(torch.nn.Module):
    """`activation` as a layer, to replace a ReLU."""

    def __init__(self, bits: int = 2) -> None:
        super().__init__()
        _on(bits)
        self.bits = bits

    def forward(self, x: Tensor) -> Tensor:
        return activation(x, self.bits)

    def extra_repr(self) -> str:
        return f"bits={self.bits}"


class Gradient(torch.nn.Module):
    """`gradient` as a layer: the identity, whose backward pass quantises.

    For layers other than Conv2d and Linear, which have it built in (`gradients=`).
    """

    def __init__(self, bits: int = 6, generator: torch.Generator | None = None) -> None:
        super().__init__()
        _on(bits)
        self.bits, self.generator = bits, generator

    def forward(self, x: Tensor) -> Tensor:
        return gradient(x, self.bits, self.generator)

    def extra_repr(self) -> str:
        return f"bits={self.bits}"


def convert(model: Model, weights: int = 1, activations: int = 2, gradients: int = 6,
            skip_first_last: bool = True, generator: torch.Generator | None = None) -> Model:
    """Turn a model into a (weights, activations, gradients) network, in place; returns it.

    Every torch.nn.Conv2d and Linear becomes the class of that name here, every ReLU an Activation;
    parameters, their names, the state_dict and the optimizer's references do not change. With
    skip_first_last, the first and the last layer stay as they are, and so does the ReLU before the
    last, as in the paper; the order is that of model.modules(). `generator` draws the noise of all
    gradients and must be on the model's device; see `reseed`.

    An Activation saturates at 1: the model should normalise before it, and per sample (GroupNorm)
    rather than by BatchNorm, whose running statistics differ between ranks.

    Raises SpecError if bits are out of range or nothing would be quantised: no layer between the
    first and the last, or no ReLU module (`functional.relu` in a forward method cannot be seen).
    """
    plain = [m for m in model.modules() if type(m) in _QUANTISED]
    layers = [m for m in plain if type(m) is not torch.nn.ReLU]
    skipped = set(layers[:1] + layers[-1:]) if skip_first_last else set()
    if len(skipped) > 1:
        skipped.update(plain[plain.index(layers[-2]) + 1:plain.index(layers[-1])])
    chosen = [m for m in plain if m not in skipped]
    rectifiers = [m for m in chosen if type(m) is torch.nn.ReLU]
    if (_on(weights) or _on(gradients)) and len(chosen) == len(rectifiers):
        raise SpecError(f"expected a Conv2d or Linear to quantise, found {len(layers)} in all, the "
                        "first and the last excepted; give skip_first_last=False")
    if _on(activations) and not rectifiers:
        raise SpecError("expected a torch.nn.ReLU module to turn into an Activation, found none "
                        "before the last layer; use modules instead of functional.relu, or give "
                        "activations=32")
    for module in chosen:
        # Changing the class keeps the object, to which the model and hooks refer.
        if type(module) is not torch.nn.ReLU:
            module.__class__ = _QUANTISED[type(module)]
            _take(module, weights, gradients, generator)
        elif activations != 32:
            module.__class__, module.bits = Activation, activations
    return model


_QUANTISED = {torch.nn.Conv2d: Conv2d, torch.nn.Linear: Linear, torch.nn.ReLU: Activation}


# ---- what they are made of ------------------------------------------------------------------


def _on(bits):
    """Whether this number of bits quantises at all; SpecError if it is out of range."""
    if bits == 32:
        return False
    if isinstance(bits, int) and 1 <= bits <= _MOST:
        return True
    raise SpecError(f"bits={bits!r}: expected 1 ... {_MOST}, or 32 for no quantisation")


def _take(layer, weights, gradients, generator):
    """Set a layer's bits and generator."""
    for bits in weights, gradients:
        _on(bits)
    layer.weight_bits, layer.gradient_bits, layer.generator = weights, gradients, generator


def _bits(layer):
    return f"weights={layer.weight_bits}, gradients={layer.gradient_bits}"


class _Round(torch.autograd.Function):
    """round(n x) / n; straight through."""

    @staticmethod
    def forward(ctx, x, n):
        return (x * n).round() / n

    @staticmethod
    def backward(ctx, dy):
        return dy, None


class _Sign(torch.autograd.Function):
    """sign(w) E|w|; straight through."""

    @staticmethod
    def forward(ctx, w):
        mean = w.abs().mean()
        return torch.where(w >= 0, mean, -mean)

    @staticmethod
    def backward(ctx, dy):
        return dy


class _Gradient(torch.autograd.Function):
    """The identity, with f_gamma^k in the backward pass."""

    @staticmethod
    def forward(ctx, x, bits, generator):
        ctx.bits, ctx.generator = bits, generator
        return x.view_as(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dr):
        wide = torch.promote_types(dr.dtype, torch.float32)
        sigma = torch.rand(dr.shape, generator=ctx.generator, device=dr.device, dtype=wide) - 0.5
        return quantize_gradient(dr, ctx.bits, sigma), None, None
