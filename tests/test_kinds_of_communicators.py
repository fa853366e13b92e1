"""What may stand for a communicator: an MPI intracommunicator, or None. Others are named."""

import pytest
import torch
from mpi4py import MPI
from training import parameters, same_error

import mpicomp
from mpicomp import SpecError

pytestmark = pytest.mark.mpi


class ProcessGroup:
    """Stands for torch's, which every group of torch.distributed is derived from."""


class Gloo(ProcessGroup):
    pass


def freed():
    comm = MPI.COMM_SELF.Dup()
    comm.Free()
    return comm


def intercommunicator():
    """Between the first rank and the others; alone there can be none."""
    if MPI.COMM_WORLD.size == 1:
        pytest.skip("an intercommunicator needs two ranks")
    half = MPI.COMM_WORLD.Split(MPI.COMM_WORLD.rank > 0)
    return half.Create_intercomm(0, MPI.COMM_WORLD, 0 if MPI.COMM_WORLD.rank else 1)


KINDS = {
    "intercommunicator": (intercommunicator, ["an intercommunicator", "comm.Merge()"]),
    "null": (lambda: MPI.COMM_NULL, ["MPI.COMM_NULL", "Split"]),
    "freed": (freed, ["MPI.COMM_NULL", "Free"]),
    "group": (MPI.COMM_WORLD.Get_group, ["an MPI group", "MPI.COMM_WORLD.Create_group(group)"]),
    "torch group": (Gloo, ["a process group of torch.distributed", "MPI.COMM_WORLD.Split(color)"]),
    "int": (lambda: 0, ["comm=0 found, of type int"]),
    "text": (lambda: "world", ["comm='world' found, of type str"]),
    "module": (lambda: MPI, ["of type module"]),
}


def model_and_optimizer():
    model = torch.nn.Linear(2, 2)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def reducer(comm=MPI.COMM_SELF):
    return mpicomp.Reducer(parameters(w=3), "dense", comm)


ENTRIES = {
    "Reducer": reducer,
    "DistributedOptimizer": lambda comm: mpicomp.DistributedOptimizer(
        model_and_optimizer()[1], parameters(w=3), "onebit", comm),
    "broadcast_parameters": lambda comm: mpicomp.broadcast_parameters(torch.nn.Linear(2, 2), comm),
    "broadcast_optimizer_state": lambda comm: mpicomp.broadcast_optimizer_state(
        model_and_optimizer()[1], comm),
    "HookState": lambda comm: mpicomp.ddp.HookState("onebit", comm),
    "init_process_group": lambda comm: mpicomp.ddp.init_process_group(comm),
    "Recovery": lambda comm: mpicomp.Recovery(reducer(), comm=comm),
    "Recovery.track": lambda comm: mpicomp.Recovery(reducer(), comm=MPI.COMM_SELF).track(comm),
    "regroup": lambda comm: reducer().regroup(comm),
    "Signals": lambda comm: mpicomp.checkpoint.Signals(comm, ()),
    "checkpoint.save": lambda comm: mpicomp.checkpoint.save("nowhere", comm, 1, {}, {}),
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_what_is_no_communicator_is_named(entry, comm):
    """Before anything is sent: the same words on all ranks, and nobody waits."""
    for make, words in KINDS.values():
        if make is intercommunicator and comm.size == 1:
            continue
        wrong = make()
        text = same_error(comm, SpecError, lambda: ENTRIES[entry](wrong))
        assert all(word in text for word in (*words, "expected an MPI communicator")), text


def test_a_torch_group_is_known_by_its_kind():
    assert any(kind.__name__ == "ProcessGroup"
               for kind in torch.distributed.ProcessGroup.__mro__)


@pytest.mark.parametrize("make", [
    lambda: MPI.COMM_SELF, lambda: MPI.COMM_WORLD.Dup(), lambda: MPI.COMM_WORLD.Split(0, 0),
    lambda: MPI.COMM_WORLD.Create_cart([MPI.COMM_WORLD.size]),
    lambda: MPI.Intracomm(MPI.COMM_WORLD), lambda: None],
    ids=["self", "dup", "split", "cart", "own object", "none"])
def test_all_kinds_of_intracommunicators_are_taken(make):
    assert reducer(make()).comm.size in (1, MPI.COMM_WORLD.size)
