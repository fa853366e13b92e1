"""Rows without a gradient: which methods leave them alone, and rules that do (sharp-bits.md)."""

import pytest
import torch

import mpicomp

UNUSED = slice(30, 40)  # and row 0, the padding


def moved(comm, spec, **keywords):
    """How far rows without a gradient went in a few steps of Adam, and how far the others."""
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"emb": torch.nn.Embedding(40, 8, padding_idx=0),
                                 "fc": torch.nn.Linear(8, 3)})
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    mpicomp.DistributedOptimizer(optimizer, model.named_parameters(), spec, comm, seed=1)
    before = model["emb"].weight.detach().clone()
    generator = torch.Generator().manual_seed(comm.rank)
    for _ in range(5):
        x = torch.randint(1, 30, (16,), generator=generator)
        x[:4] = 0
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model["fc"](model["emb"](x)), x % 3).backward()
        optimizer.step()
    far = (model["emb"].weight - before).abs().amax(1)
    return max(far[0], far[UNUSED].max()), far[1:30].max()


@pytest.mark.mpi
@pytest.mark.parametrize("spec", [
    "dense", "fp16", "bf16", "terngrad", "strom:tau=0.001", "dryden:proportion=4",
    "dropping:rate=0.7", "adacomp", "chunks:k=8,block=32", "topk:density=0.3",
    "randomk:density=0.5,scale=yes", "powersgd:rank=2,rate=1", "terngrad:exchange=allreduce",
    "dryden:exchange=sharded", "block:bits=4", "sign:scope=row", "qsgd",
    "rule(*emb*:terngrad; onebit)", "rule(*emb*:dropping:rate=0.7; dorefa)",
    "rule(*emb*:dense; onebit):exchange=sharded"])
def test_what_has_no_gradient_stays(comm, spec):
    still, others = moved(comm, spec)
    assert still == 0 and others > 0


@pytest.mark.mpi
@pytest.mark.parametrize("spec", ["onebit", "dorefa", "sign"])
def test_with_some_of_them_it_does_not_as_the_docs_say(comm, spec):
    still, others = moved(comm, spec)
    assert still > 0 and others > 0
