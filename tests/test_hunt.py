"""Situations from public trackers of distributed training, as laws; each test names its source.

What is trained by several ranks with `dense` is what one process trains on all examples, and with
every method replicas stay equal to the bit.
"""

import copy
import threading

import pytest
import torch
from hunting import compare, mse, net, no_sync, plain
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

pytestmark = pytest.mark.mpi
methods = pytest.mark.parametrize("method", ["dense", "onebit"])


# ---- other ways to write a step


def retain_graph(model, optimizer, x, y, _):
    """pytorch/pytorch#47260: two losses over one graph."""
    optimizer.zero_grad()
    out = model(x)
    with no_sync(optimizer):
        mse(out, y).backward(retain_graph=True)
    (0.1 * out.pow(2).mean()).backward()
    optimizer.step()


def gradient_penalty(model, optimizer, x, y, _):
    """pytorch/pytorch#47562, #63812: autograd.grad(create_graph=True) within the loss."""
    x = x.clone().requires_grad_(True)
    optimizer.zero_grad()
    out = model(x)
    slope, = torch.autograd.grad(out.sum(), x, create_graph=True)
    (mse(out, y) + (slope.pow(2).sum(1) - 1).pow(2).mean()).backward()
    optimizer.step()


def step_twice(model, optimizer, x, y, _):
    """sidhantls/ppo_lightning#2, horovod/horovod#1103: more steps than backward passes."""
    plain(model, optimizer, x, y)
    optimizer.step()


def step_on_nothing(model, optimizer, x, y, number):
    """horovod/horovod#1417: zero_grad after the step, then a step without a backward."""
    plain(model, optimizer, x, y)
    optimizer.zero_grad(set_to_none=bool(number % 2))
    optimizer.step()


def never_zeroed(model, optimizer, x, y, _):
    """Lightning-AI/pytorch-lightning#15045: gradients of earlier steps stay and add up."""
    mse(model(x), y).backward()
    optimizer.step()


def deleted(model, optimizer, x, y, _):
    """horovod/horovod#1417: gradients taken away between steps, here by del."""
    for p in model.parameters():
        del p.grad
    mse(model(x), y).backward()
    optimizer.step()


def average_swapped_in(model, optimizer, x, y, number):
    """open-mmlab/mmengine#266: averaged weights are swapped in by p.data, and out again."""
    plain(model, optimizer, x, y)
    kept = [p.data for p in model.parameters()]
    for p in model.parameters():
        p.data = p.data * 0.5
    with torch.inference_mode():
        model(x)
    for p, data in zip(model.parameters(), kept):
        p.data = data


def flattened(model, optimizer, x, y, _):
    """pytorch/pytorch#12603: parameters' memory is replaced: parts of one vector from then on."""
    plain(model, optimizer, x, y)
    vector = nn.utils.parameters_to_vector(model.parameters()).detach()
    nn.utils.vector_to_parameters(0.99 * vector, model.parameters())


def back_to_the_best(model, optimizer, x, y, number):
    """NVIDIA/Megatron-LM#6087: load_state_dict in the middle of a training."""
    if number == 1:
        model.best = copy.deepcopy(model.state_dict())
    plain(model, optimizer, x, y)
    if number == 2:
        model.load_state_dict(model.best)


def assigned(model, optimizer, x, y, _):
    """WeiChengTseng/Pytorch-PCGrad#5, pytorch/pytorch#102197: p.grad by torch.func and by hand."""
    named = {name: p.detach() for name, p in model.named_parameters()}
    found = torch.func.grad(lambda q: mse(torch.func.functional_call(model, q, (x,)), y))(named)
    for name, p in model.named_parameters():
        p.grad = found[name]
    optimizer.step()


def functional(model, optimizer, x, y, _):
    """pytorch/pytorch#102197: backward through functional_call."""
    optimizer.zero_grad()
    scaled = {name: p * 2.0 for name, p in model.named_parameters()}
    mse(torch.func.functional_call(model, scaled, (x,)), y).backward()
    optimizer.step()


def attacked(model, optimizer, x, y, _):
    """xiangking/ark-nlp#50: an adversarial example by a backward of its own (FGSM)."""
    x = x.clone().requires_grad_(True)
    with no_sync(optimizer):
        mse(model(x), y, reduction="sum").backward()
    x = (x + 0.1 * x.grad.sign()).detach()
    plain(model, optimizer, x, y)


def parts(model, optimizer, x, y, _):
    """horovod/horovod#2154: backward(inputs=...), each for one part of the model."""
    optimizer.zero_grad()
    out = model(x)
    mse(out, y).backward(inputs=list(model[2:].parameters()), retain_graph=True)
    out.pow(2).mean().backward(inputs=list(model[:2].parameters()))
    optimizer.step()


def both_at_once(model, optimizer, x, y, _):
    """cswry/OSEDiff#30: several losses, here in one autograd.backward."""
    optimizer.zero_grad()
    out = model(x)
    torch.autograd.backward([mse(out, y), out.pow(2).mean()])
    optimizer.step()


def in_a_thread(model, optimizer, x, y, _):
    """pytorch/pytorch#18333: another thread than the one that steps calls backward."""
    optimizer.zero_grad()
    thread = threading.Thread(target=mse(model(x), y).backward)
    thread.start()
    thread.join()
    optimizer.step()


def checkpointed(model, optimizer, x, y, number):
    """pytorch/pytorch#109191: activation checkpoints of both kinds, and accumulation."""
    optimizer.zero_grad()
    x = x.clone().requires_grad_(True)

    def loss():
        hidden = checkpoint(model[:2], x, use_reentrant=number % 2 == 0)
        return mse(checkpoint(model[2:], hidden, use_reentrant=number % 2 == 0), y)

    with no_sync(optimizer):
        loss().backward()
    loss().backward()
    optimizer.step()


class WritesTheGradient(torch.autograd.Function):
    """A product that adds to its weight's p.grad itself and gives autograd none."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x)
        ctx.weight = weight
        return x @ weight.t()

    @staticmethod
    def backward(ctx, slope):
        own = slope.t() @ ctx.saved_tensors[0]
        ctx.weight.grad = own if ctx.weight.grad is None else ctx.weight.grad + own
        return slope @ ctx.weight, None


def written_by_a_function(model, optimizer, x, y, _):
    """pytorch/pytorch#196312, NVIDIA/TransformerEngine#545: fused weight gradients."""
    optimizer.zero_grad()
    hidden = WritesTheGradient.apply(model[:2](x), model[2].weight) + model[2].bias
    mse(model[3:](hidden), y).backward()
    optimizer.step()


def clipped_in_two_ways(model, optimizer, x, y, _):
    """deepspeedai/DeepSpeed#742: by value and by the parameter's norm, after finish()."""
    optimizer.zero_grad()
    mse(model(x), y).backward()
    if hasattr(optimizer, "reducer"):
        optimizer.reducer.finish()
    nn.utils.clip_grad_value_(model.parameters(), 0.02)
    for p in model.parameters():
        p.grad.mul_((0.05 * p.detach().norm() / p.grad.norm().clamp(min=1e-6)).clamp(max=1))
    optimizer.step()


def pruned(model, optimizer, x, y, number):
    """neuralmagic/sparseml#429: a layer is pruned, and this made permanent, in mid-training."""
    plain(model, optimizer, x, y)
    if number == 1:
        prune.l1_unstructured(model[0], "weight", 0.5)
    if number == 2:
        prune.remove(model[0], "weight")


STEPS = (retain_graph, gradient_penalty, step_twice, step_on_nothing, never_zeroed, deleted,
         average_swapped_in, flattened, back_to_the_best, assigned, functional, attacked, parts,
         both_at_once, in_a_thread, checkpointed, written_by_a_function, clipped_in_two_ways,
         pruned)


@methods
@pytest.mark.parametrize("step", STEPS)
def test_ways_to_write_a_step(step, method, comm):
    """Each function's own docstring names the source."""
    compare(comm, step, method)


# ---- models and optimizers


def hooked():
    """pytorch/pytorch#35191: hooks of tensors give other gradients than they get."""
    model = net()
    for p in model.parameters():
        p.register_hook(lambda gradient: 2 * gradient)
    return model


def weight_norm():
    """pytorch/pytorch#61470."""
    model = net()
    parametrizations.weight_norm(model[0])
    return model


def spectral_norm():
    """pytorch/pytorch#8160: its buffers follow from the weights, alike on all ranks."""
    model = net()
    parametrizations.spectral_norm(model[0])
    return model


@methods
@pytest.mark.parametrize("make", [hooked, weight_norm, spectral_norm])
def test_kinds_of_models(make, method, comm):
    """Each function's own docstring names the source."""
    compare(comm, plain, method, make)


OPTIMIZERS = {
    "maximize": lambda ps: torch.optim.SGD(ps, lr=0.01, maximize=True),
    "foreach": lambda ps: torch.optim.Adam(ps, lr=0.01, foreach=True, amsgrad=True),
    "fused": lambda ps: torch.optim.Adam(ps, lr=0.01, fused=True),
    "tensor lr": lambda ps: torch.optim.Adam(ps, lr=torch.tensor(0.01), foreach=False),
    "Adafactor": lambda ps: torch.optim.Adafactor(ps, lr=0.01),
    "Muon": lambda ps: torch.optim.Muon([p for p in ps if p.dim() == 2], lr=0.01)}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_kinds_of_optimizers(name, comm):
    """pytorch/pytorch#88258, #90752: fused, foreach, maximize, a tensor as learning rate."""
    compare(comm, plain, optimizer=OPTIMIZERS[name], tolerance=2e-3)
