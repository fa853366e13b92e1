"""Our process group gives what gloo gives: every call, in every form, for every dtype, to the bit.

gloo's group is made over the store that our group shares, so that is tried here, too.
"""

import warnings
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from mpi4py import MPI

from mpicomp import ddp

pytestmark = [pytest.mark.mpi,
              pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning"),
              pytest.mark.filterwarnings("ignore:.*You are using a Backend")]
Op = dist.ReduceOp
RANK, SIZE = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size
LAST = SIZE - 1
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32,
          torch.int8, torch.uint8, torch.bool, torch.complex64]
AGAIN = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@pytest.fixture(scope="module")
def groups():
    """(ours, gloo's), of all ranks."""
    ddp.init_process_group(MPI.COMM_WORLD, timeout=600.0)
    yield dist.group.WORLD, dist.new_group(backend="gloo", timeout=timedelta(seconds=600))
    dist.destroy_process_group()


def mine(*shape, dtype=torch.float32, rank=RANK):
    """Small whole numbers that differ by rank."""
    return (torch.arange(int(np.prod(shape))) % 5 + rank).view(shape).to(dtype)


def filled(*shape, dtype=torch.float32, count=None):
    """What results are to replace."""
    made = [torch.full(shape, 9).to(dtype) for _ in range(count or 1)]
    return made if count else made[0]


def at_root(tensors, root=LAST):
    return tensors if root == RANK else None


# Each takes a group and a dtype and returns tensors that hold the result on this rank.
CALLS = {}


def call(function):
    CALLS[function.__name__] = function


@call
def broadcast(g, d):
    x, strided = mine(2, 3, dtype=d), mine(3, 2, dtype=d).t()
    dist.broadcast(x, LAST, group=g)
    if d.is_complex or not isinstance(g, ddp.MpiGroup):  # gloo refuses strides
        strided = strided.contiguous()
    dist.broadcast(strided, 0, group=g)
    return [x, strided.contiguous()]


@call
def all_reduce(g, d):
    x = mine(2, 3, dtype=d)
    work = dist.all_reduce(x, group=g, async_op=True)
    work.wait()
    assert work.is_completed() and torch.equal(work.get_future().wait()[0].view_as(
        torch.view_as_real(x) if d.is_complex else x), torch.view_as_real(x) if d.is_complex else x)
    return x


@call
def reduce(g, d):
    x = mine(4, dtype=d)
    dist.reduce(x, LAST, group=g)
    return x if RANK == LAST else x[:0]  # elsewhere gloo leaves partial sums


@call
def all_gather(g, d):
    many = filled(2, 3, dtype=d, count=SIZE)
    dist.all_gather(many, mine(2, 3, dtype=d), group=g)
    return many


@call
def all_gather_single(g, d):
    flat, stacked = filled(2 * SIZE, 3, dtype=d), filled(SIZE, 2, 3, dtype=d)
    AGAIN(flat, mine(2, 3, dtype=d), group=g)
    # gloo refuses the stack
    AGAIN(stacked if isinstance(g, ddp.MpiGroup) else stacked.view(-1, 3), mine(2, 3, dtype=d),
          group=g)
    return [flat, stacked]


@call
def all_gather_coalesced(g, d):
    many = [[filled(2, dtype=d), filled(3, dtype=d)] for _ in range(SIZE)]
    dist.all_gather_coalesced(many, [mine(2, dtype=d), mine(3, dtype=d)], group=g)
    return sum(many, [])


@call
def all_reduce_coalesced(g, d):
    many = [mine(2, dtype=d), mine(3, dtype=d)]
    dist.all_reduce_coalesced(many, group=g)
    return many


@call
def gather(g, d):
    many = filled(3, dtype=d, count=SIZE)
    dist.gather(mine(3, dtype=d), at_root(many), LAST, group=g)
    return many


@call
def scatter(g, d):
    x = filled(3, dtype=d)
    dist.scatter(x, at_root([mine(3, dtype=d, rank=r) for r in range(SIZE)]), LAST, group=g)
    return x


@call
def reduce_scatter(g, d):
    x = filled(3, dtype=d)
    dist.reduce_scatter(x, [mine(3, dtype=d, rank=r + RANK) for r in range(SIZE)], group=g)
    return x


@call
def reduce_scatter_single(g, d):
    x = filled(2, 3, dtype=d)
    SCATTER(x, mine(2 * SIZE, 3, dtype=d), group=g)
    return x


@call
def all_to_all(g, d):
    many = filled(2, dtype=d, count=SIZE)
    dist.all_to_all(many, [mine(2, dtype=d, rank=RANK + 2 * r) for r in range(SIZE)], group=g)
    return many


@call
def all_to_all_single(g, d):
    x, cut = filled(2 * SIZE, 2, dtype=d), filled((RANK + 1) * SIZE, 2, dtype=d)
    dist.all_to_all_single(x, mine(2 * SIZE, 2, dtype=d), group=g)
    sizes = [r + 1 for r in range(SIZE)]
    dist.all_to_all_single(cut, mine(sum(sizes), 2, dtype=d), [RANK + 1] * SIZE, sizes, group=g)
    return [x, cut]


@call
def messages(g, d):
    """A ring of isend and irecv, two under way; then to rank 0, from any."""
    if SIZE == 1:
        return []
    got = filled(2, 3, dtype=d, count=3)
    right, left = (RANK + 1) % SIZE, (RANK - 1) % SIZE
    out = mine(2, 3, dtype=d), mine(2, 3, dtype=d, rank=RANK + 7)
    works = [dist.isend(x, right, group=g, tag=tag) for tag, x in enumerate(out)]
    works += [dist.irecv(got[tag], left, group=g, tag=tag) for tag in (1, 0)]
    for work in works:
        work.wait()
        assert work.is_completed()
    if RANK == LAST:
        dist.send(out[0], 0, group=g)
    elif RANK == 0:
        assert dist.recv(got[2], group=g) == LAST
    batch = [dist.P2POp(dist.irecv, got[0], left, g), dist.P2POp(dist.isend, out[1], right, g)]
    for work in dist.batch_isend_irecv(batch):
        work.wait()
    return got


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_call_gives_what_gloo_gives(dtype, groups):
    for name, function in CALLS.items():
        results = []
        for group in groups:
            try:
                found = function(group, dtype)
            except (RuntimeError, ValueError) as error:  # gloo has no such dtype
                assert group is groups[1], (name, error)
                found = None
            results.append([found] if torch.is_tensor(found) else found)
        ours, theirs = results
        assert theirs is not None or dtype in (torch.bool, torch.complex64), name
        for x, y in zip(ours, theirs, strict=True) if theirs is not None else ():
            assert x.dtype == y.dtype and torch.equal(x, y), (name, x, y)


@pytest.mark.parametrize("op", ["SUM", "AVG", "MAX", "MIN", "PRODUCT", "BAND", "BOR", "BXOR"])
def test_reductions_are_gloos(op, groups):
    for dtype in DTYPES[:8]:
        if op[0] == "B" and dtype.is_floating_point or op == "AVG" and not dtype.is_floating_point:
            continue
        results = []
        for group in groups:
            x, part = mine(7, dtype=dtype), filled(2, dtype=dtype)
            dist.all_reduce(x, getattr(Op, op), group=group)
            SCATTER(part, mine(2 * SIZE, dtype=dtype), getattr(Op, op), group=group)
            results += [x, part]
        assert torch.equal(results[0], results[2]), (dtype, results)
        assert torch.equal(results[1], results[3]), (dtype, results)


def test_what_mpi_cannot_reduce_is_named(groups):
    for op, dtype in ((Op.PREMUL_SUM, torch.int32), (Op.BOR, torch.float32)):
        with pytest.raises(ValueError, match="all_reduce: .*(MPI has SUM|MPI has no)"):
            groups[0].allreduce(mine(3, dtype=dtype), op)
    with pytest.raises(ValueError, match="layout torch.sparse_coo"):
        groups[0].broadcast(mine(3).to_sparse(), 0)


def forms(g):
    """What torch's binding of ProcessGroup takes, and the result each time."""
    short, total = timedelta(seconds=20), sum(mine(3, rank=r) for r in range(SIZE))
    most, options = mine(3, rank=LAST), dist.AllreduceOptions()
    options.reduceOp = Op.MAX
    for given, named, right in (
            (([mine(3)],), {}, total), (([mine(3)], options), {}, most), ((mine(3),), {}, total),
            ((mine(3), Op.MAX), {}, most), (([mine(3)], Op.MAX, short), {}, most),
            ((), {"tensor": mine(3), "op": Op.MAX}, most),
            ((), {"tensors": [mine(3)], "opts": options}, most)):
        tensor = given[0] if given else next(iter(named.values()))
        yield "allreduce", given, named, tensor, right
    root = dist.BroadcastOptions()
    root.rootRank = LAST
    for given, named in ((([mine(3)], root), {}), ((mine(3), LAST), {}),
                         ((mine(3), LAST, short), {}), ((), {"tensor": mine(3), "root": LAST})):
        yield "broadcast", given, named, given[0] if given else named["tensor"], most
    everyone = [mine(3, rank=r) for r in range(SIZE)]
    for nested in False, True:
        out = filled(3, count=SIZE)
        yield ("allgather", ([out], [mine(3)]) if nested else (out, mine(3)), {}, out, everyone)
    if RANK == LAST:
        out = filled(3, count=SIZE)
        yield "gather", (out, mine(3), LAST), {}, out, everyone
    else:
        yield "gather", ([], [mine(3)], LAST), {}, [], []
    x = filled(3)
    yield "scatter", (x, everyone if RANK == LAST else [], LAST), {}, x, mine(3)
    x = filled(3)
    yield "reduce_scatter", (x, everyone, Op.MAX), {}, x, mine(3)
    x = mine(3)
    yield "reduce", (x, LAST, Op.MAX), {}, x, most if RANK == LAST else mine(3)
    out = filled(3, count=SIZE)
    yield "alltoall", (out, [mine(3)] * SIZE), {}, out, everyone
    for name in "alltoall_base", "all_to_all_single":
        x = filled(SIZE, 3)
        yield (name, (x, torch.stack([mine(3)] * SIZE), [], []), {}, x, torch.stack(everyone))
    for name in "_reduce_scatter_base", "reduce_scatter_single":
        x = filled(3)
        yield name, (x, torch.stack(everyone), dist.ReduceScatterOptions()), {}, x, SIZE * mine(3)
    for name in "reduce_scatter_tensor_coalesced", "reduce_scatter_single_coalesced":
        x = filled(3)
        yield name, ([x], [torch.stack(everyone)]), {}, x, SIZE * mine(3)
    for name in "allgather_into_tensor_coalesced", "all_gather_single_coalesced":
        x = filled(SIZE, 3)
        yield name, ([x], [mine(3)]), {}, x, torch.stack(everyone)
    for given in (), (dist.BarrierOptions(),), (short,):
        yield "barrier", given, {}, [], []


def test_every_form_of_a_call(groups):
    """By itself or in a list, with options or without: DDP, hooks and C++ use them all."""
    for name, given, named, found, right in forms(groups[0]):
        work = getattr(groups[0], name)(*given, **named)
        assert work.wait() and work.is_completed(), name
        found, right = (x if isinstance(x, list) else [x] for x in (found, right))
        assert all(map(torch.equal, found, right)) and len(found) == len(right), (name, found)
    with pytest.raises(TypeError, match="all_reduce: the argument 'tensors|tensor' is missing"):
        groups[0].allreduce()


# What torch's groups have and ours has not, or what no user calls on one.
NOT_OURS = {"BackendType", "CUSTOM", "GLOO", "MPI", "NCCL", "UCC", "UNDEFINED", "XCCL",
            "Device", "Options", "create_device", "create_default_device", "options",
            "bound_device_id", "boxed", "unbox", "get_group_store", "name", "rank", "size",
            "group_desc", "group_name", "use_pg_for_symm_mem_rendezvous",
            "setUsePgForSymmMemRendezvous", "eager_connect_single_device", "supports_coalescing",
            "supports_shrinking", "supports_splitting", "supports_tensor_alloc",
            "supports_time_estimate", "allocate_tensor", "mem_allocator", "memory_stats",
            "resume", "suspend", "shrink"}


def test_all_that_gloo_has_is_here_or_is_refused_by_name(groups):
    there = {name for kind in (dist.ProcessGroup, dist.ProcessGroupGloo) for name in dir(kind)
             if not name.startswith("_")} | {"_allgather_base", "_reduce_scatter_base",
                                             "_start_coalescing", "_end_coalescing"}
    ours = ddp.MpiGroup.__mro__[:ddp.MpiGroup.__mro__.index(dist.ProcessGroup)]
    assert there - NOT_OURS <= set().union(*map(vars, ours)), "torch has a call that is not here"
    for name in "split_group", "merge_remote_group", "_start_coalescing", "_end_coalescing":
        with pytest.raises(NotImplementedError, match=f"has no {name}: "):
            getattr(groups[0], name)()


def test_objects(groups):
    everyone = [{"rank": r, "text": "x" * r} for r in range(SIZE)]
    for group in groups:
        found = [None] * SIZE
        dist.all_gather_object(found, everyone[RANK], group=group)
        assert found == everyone
        found = at_root([None] * SIZE)
        dist.gather_object(everyone[RANK], found, LAST, group=group)
        assert found == at_root(everyone)
        found = [None]
        dist.scatter_object_list(found, at_root(everyone), LAST, group=group)
        assert found == [everyone[RANK]]
        found = [everyone[RANK]]
        dist.broadcast_object_list(found, LAST, group=group)
        assert found == [everyone[LAST]]
        if SIZE > 1 and RANK in (0, LAST):
            found = [everyone[RANK]]
            if RANK:
                dist.send_object_list(found, 0, group=group)
            else:
                dist.recv_object_list(found, LAST, group=group)
            assert found == [everyone[LAST]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_sparse_tensors_are_summed(dtype, groups):
    def given(rank):
        rows = torch.tensor([[rank, 2 * SIZE, rank, 1]])
        return torch.sparse_coo_tensor(rows, mine(4, 2, dtype=dtype, rank=rank),
                                       (2 * SIZE + 1, 2), check_invariants=True)

    right = sum(given(r).to_dense() for r in range(SIZE))
    for group in groups[:2 - (dtype == torch.bfloat16)]:  # of which gloo knows nothing
        x = given(RANK)
        dist.all_reduce(x, group=group)
        assert x.is_sparse and torch.equal(x.to_dense(), right)
    with pytest.raises(ValueError, match="of a sparse tensor, expected SUM"):
        dist.all_reduce(given(RANK), Op.MAX)


def test_functional_collectives_and_a_device_mesh(groups):
    """torch's compiler and DTensor find a group by its name, and call it from C++."""
    mesh = dist.init_device_mesh("cpu", (SIZE,), mesh_dim_names=("all",))
    everyone = [mine(2, rank=r) for r in range(SIZE)]
    for group in (*groups, mesh.get_group("all")):
        assert dist.distributed_c10d._resolve_process_group(group.group_name) is not None
        x = functional.all_reduce(mine(2), "sum", group)
        assert torch.equal(x, sum(everyone))
        x = functional.all_gather_tensor(mine(2), 0, group)
        assert torch.equal(x, torch.cat(everyone))
        x = functional.reduce_scatter_tensor(torch.cat(everyone), "sum", 0, group)
        assert torch.equal(x, SIZE * mine(2))
        x = functional.all_to_all_single(torch.cat([mine(2)] * SIZE), None, None, group)
        assert torch.equal(x, torch.cat(everyone))
        assert torch.equal(functional.broadcast(mine(2), LAST, group), everyone[LAST])


def test_groups_of_some_ranks(groups):
    """Ours, also one inside of another, and gloo's where rank 0 is not in it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for ranks in (range(SIZE)[SIZE // 2:], range(SIZE)[:1], range(SIZE)):
            for backend in None, "gloo":
                part = dist.new_group(list(ranks), backend=backend)
                if RANK not in ranks:
                    continue
                x = torch.ones(1)
                dist.all_reduce(x, group=part)
                assert x == len(ranks) == dist.get_world_size(part)
                dist.destroy_process_group(part)
