"""The methods' encoders in plain torch operations: what a compressor costs without own kernels.

For comparison in jobs/gpu_check.py. Each takes the gradient and the residual, both float32 of shape
[rows, columns], and returns (tensors of the packet, new residual). They send what mpicomp's
compressors send, packed as tightly as torch can; random numbers are torch's.
"""

from time import perf_counter

import numpy as np
import torch


def pack(codes, bits):
    """uint8: codes of so many bits (a divisor of 8), the first in the lowest bits."""
    each = 8 // bits
    flat = codes.flatten().to(torch.uint8)
    flat = torch.nn.functional.pad(flat, (0, -flat.numel() % each)).view(-1, each)
    shifts = torch.arange(0, 8, bits, device=flat.device, dtype=torch.uint8)
    return (flat << shifts).sum(1, dtype=torch.uint8)


def strom(grad, owed, tau=3.3):
    """A word (index << 1 | positive) for each element beyond +-tau."""
    flat = (owed + grad).flatten()
    index = (flat.abs() > tau).nonzero().flatten()
    positive = flat[index] > 0
    flat[index] -= torch.where(positive, tau, -tau)
    return [(index << 1 | positive).to(torch.int32)], flat.view_as(grad)


def dropping(grad, owed, rate=0.999, sample=100_000):
    """Indices and values of the elements beyond a quantile that is taken from a sample."""
    flat = (owed + grad).flatten()
    drawn = flat[::max(1, flat.numel() // sample)].abs()
    cut = drawn.kthvalue(max(1, int(rate * drawn.numel()))).values
    index = (flat.abs() > cut).nonzero().flatten()
    values = flat[index]
    flat[index] = 0
    return [index.to(torch.int32), values], flat.view_as(grad)


def onebit(grad, owed):
    """A bit for each element, and two means for each column: of its negative and other elements."""
    x = owed + grad
    positive = x >= 0
    count = positive.sum(0)
    upper = torch.where(positive, x, 0).sum(0) / count.clamp(min=1)
    lower = torch.where(positive, 0, x).sum(0) / (len(x) - count).clamp(min=1)
    return [pack(positive, 1), lower, upper], x - torch.where(positive, upper, lower)


def terngrad(grad, owed, clip=2.5):
    """-1, 0 or 1 times a scale, at random without bias; no feedback."""
    level = clip * grad.std(correction=0)
    x = grad.clamp(-level, level)
    scale = x.abs().max()
    codes = (torch.rand_like(x) * scale < x.abs()) * x.sign()
    return [pack(codes.to(torch.int8) & 3, 2), scale], owed


def dorefa(grad, owed, bits=4):
    """Codes of `bits` bits between -scale and scale, with noise of half a step."""
    x, most = owed + grad, 2**bits - 1
    scale = x.abs().max()
    noise = (torch.rand_like(x) - 0.5) / most
    codes = ((x / (2 * scale) + 0.5 + noise).clamp(0, 1) * most).round()
    return [pack(codes, bits), scale], x - 2 * scale * (codes / most - 0.5)


def dryden(grad, owed, proportion=64):
    """One in `proportion` of each column's elements of either sign, as the mean of its sign."""
    x = owed + grad
    sent, said = [], torch.zeros_like(x)
    for sign in (-1, 1):
        own = torch.where(x * sign > 0, x.abs(), 0)
        cut = own.topk(max(1, len(x) // (2 * proportion)), dim=0).values[-1]
        goes = (own >= cut) & (own > 0)
        mean = sign * torch.where(goes, own, 0).sum(0) / goes.sum(0).clamp(min=1)
        said = torch.where(goes, mean, said)
        sent.append(mean)
    index = said.flatten().nonzero().flatten()
    words = (index << 1 | (said.flatten()[index] > 0)).to(torch.int32)
    return [words, *sent], x - said


def adacomp(grad, owed, bin=512):
    """Elements that reach the largest of their bin once the newest gradient is added again."""
    flat = (owed + grad).flatten()
    pad = -flat.numel() % bin
    bins = torch.nn.functional.pad(flat, (0, pad)).view(-1, bin)
    ahead = torch.nn.functional.pad((owed + 2 * grad).flatten(), (0, pad)).view(-1, bin)
    most = bins.abs().amax(1, keepdim=True)
    goes = ((ahead.abs() >= most) & (bins != 0)).flatten()[:flat.numel()]
    scale = most.mean()
    index = goes.nonzero().flatten()
    positive = flat[index] > 0
    flat[index] -= torch.where(positive, scale, -scale)
    per_bin = torch.bincount(index // bin, minlength=len(bins)).to(torch.int16)
    return [(index % bin << 1 | positive).to(torch.int16), per_bin, scale], flat.view_as(grad)


CODECS = {"strom": strom, "dropping": dropping, "onebit": onebit, "terngrad": terngrad,
          "dorefa": dorefa, "dryden": dryden, "adacomp": adacomp}


def synchronize(device):
    """Wait for the GPU, if it is one."""
    if device == "cuda":
        torch.cuda.synchronize()


def timed(n, device="cuda", rounds=10) -> dict:
    """{method: {"seconds": median of an encoding, "bytes": of its packet}} for n normal numbers."""
    figures = {}
    for name, encode in CODECS.items():
        try:
            generator = torch.Generator(device).manual_seed(1)
            grad = torch.randn(1024, n // 1024, device=device, generator=generator)
            owed, taken = torch.zeros_like(grad), []
            for _ in range(rounds + 2):
                synchronize(device)
                start = perf_counter()
                packet, _ = encode(grad, owed)
                synchronize(device)
                taken.append(perf_counter() - start)
            figures[name] = {"seconds": float(np.median(taken[2:])),
                             "bytes": sum(part.nbytes for part in packet)}
            said = f"{1e3 * figures[name]['seconds']:.2f} ms, {figures[name]['bytes']:,} bytes"
        except torch.OutOfMemoryError as error:
            said = str(error).splitlines()[0]
            figures[name] = {"not run": said}
        print(f"{name:12} in torch operations: {said}", flush=True)
        if device == "cuda":
            torch.cuda.empty_cache()
    return figures
