"""What tests on several ranks share: gradients by decree, small trainings, and comparisons."""

from contextlib import contextmanager
from hashlib import blake2b

import numpy as np
import torch

import mpicomp

torch.set_num_threads(1)  # ranks share cores, and these models are small


def parameters(**shapes):
    """Parameters of zeros by name, as (name, parameter) pairs: parameters(w=(3, 4), b=3)."""
    return [(name, torch.nn.Parameter(torch.zeros(shape))) for name, shape in shapes.items()]


def give(named, gradients):
    """Run a backward that gives these parameters these gradients (anything a tensor is made of)."""
    loss = 0
    for (_, p), gradient in zip(named, gradients, strict=True):
        gradient = torch.as_tensor(np.asarray(gradient)).to(p.dtype).reshape(p.shape)
        loss = loss + (p * gradient).sum()
    loss.backward()


def whole_numbers(rank, step, n, most=7):
    """A gradient of small whole numbers that differs with rank, step and element."""
    return ((np.arange(n) * 5 + 3 * rank + 11 * step) % (2 * most + 1) - most).astype(np.float32)


def digest(tensors):
    """64 bits of the memory of these tensors."""
    total = blake2b(digest_size=8)
    for tensor in tensors:
        total.update(tensor.detach().float().contiguous().numpy().tobytes())
    return total.hexdigest()


def replicas_are_identical(comm, model):
    """All ranks hold the same bits."""
    digests = comm.allgather(digest(p for p in model.parameters()))
    assert len(set(digests)) == 1, digests


def outcome(comm, function):
    """What `function()` raised on every rank, as "Kind: text"; None where nothing."""
    try:
        function()
        mine = None
    except Exception as error:
        mine = f"{type(error).__name__}: {error}"
    return comm.allgather(mine)


def same_error(comm, kind, function):
    """The text of the error of this kind that `function()` raises, the same on every rank."""
    errors = outcome(comm, function)
    assert len(set(errors)) == 1, errors
    assert errors[0] and errors[0].startswith(kind.__name__ + ": "), errors[0]
    return errors[0]


@contextmanager
def impatient(reducer, seconds=0.4):
    """In this block the reducer waits for so long only. What is right comes before and after it,
    with all the time that a machine with much else to do may take."""
    pipeline = reducer.averager.link.pipeline
    patience, pipeline.timeout = pipeline.timeout, seconds
    try:
        yield
    finally:
        pipeline.timeout = patience


def network(seed=0):
    """A small model with matrices, a convolution and biases; the same on every rank."""
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Unflatten(1, (1, 4, 4)), torch.nn.Conv2d(1, 6, 3), torch.nn.Tanh(),
        torch.nn.Flatten(), torch.nn.Linear(24, 40), torch.nn.Tanh(), torch.nn.Linear(40, 3))


def examples(comm, step, count=8):
    """This rank's examples: 16 numbers, and which of three sums is largest. Anew after 4 steps."""
    generator = torch.Generator().manual_seed(1000 * (step % 4) + comm.rank)
    x = torch.randn(count, 16, generator=generator)
    return x, x.view(count, 4, 4)[:, :, :3].sum(1).argmax(1)


def one_step(model, optimizer, comm, number):
    """One step on this rank's examples of this number; the loss before it."""
    x, y = examples(comm, number)
    optimizer.zero_grad()
    loss = torch.nn.functional.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    return loss.item()


def train(spec, comm, steps=30, optimizer=None, model=None, **keywords):
    """(the model, this rank's losses) after some steps; several small buckets by default."""
    model = model or network()
    optimizer = optimizer(model.parameters()) if optimizer else \
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    keywords = {"bucket_bytes": 2000, "seed": 3, **keywords}
    reducer = mpicomp.Reducer(model.named_parameters(), spec, comm, **keywords).attach(optimizer)
    steps = range(reducer.step, reducer.step + steps)
    return model, [one_step(model, optimizer, comm, step) for step in steps]
