"""The collectives of torch.distributed, by means of MPI's broadcast, sum and messages."""

from functools import wraps

import torch
import torch.distributed as dist

from mpicomp.ddp.process_group.transfer import Call, as_bytes, from_bytes, put, room
from mpicomp.ddp.process_group.work import done


def collective(what, *names):
    """Decorator: makes a method with torch's signature from `body(self, call, *data)`.

    The method returns the handle (`done`) of what body returned.

    what   torch.distributed's name of the collective, for errors
    names  of the arguments that hold data, "a|b" if torch calls it a in one form and b in another.
           After them torch gives a root, a ReduceOp and a timedelta, or options: see `Call`
    """
    def decorate(body):
        @torch._disable_dynamo  # a compiled DDP calls these, and must not look into MPI
        @wraps(body)
        def method(self, *given, **named):
            data, given = list(given[:len(names)]), given[len(names):]
            for either in names[len(data):]:
                name = next((n for n in either.split("|") if n in named), None)
                if name is None:
                    raise TypeError(f"{what}: the argument {either!r} is missing")
                data.append(named.pop(name))
            with self.dog.collective(what):
                return done(body(self, Call(self, what, (*given, *named.values())), *data))
        return method
    return decorate


def _list(tensors):
    return [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)


def _lists(tensors):
    """A list of lists of tensors, which torch's forms for one tensor give as one list."""
    tensors = list(tensors)
    return [tensors] if tensors and isinstance(tensors[0], torch.Tensor) else tensors


def _parts(tensor, count):
    """[count, n]: the tensor's elements in equal parts; a view if possible, else a copy."""
    if tensor.numel() % count:
        raise ValueError(f"found a tensor of {tensor.numel()} elements, expected a multiple of "
                         f"the {count} ranks")
    return tensor.reshape(count, -1)


class Collectives(dist.ProcessGroup):
    """All collectives, under each of torch's names. They are over when they return."""

    @collective("broadcast", "tensors|tensor")
    def broadcast(self, call, tensors):
        for tensor in (tensors := _list(tensors)):
            array = as_bytes(tensor, call.what)
            call.broadcast(array)
            if call.root != self.comm.rank:
                from_bytes(array, tensor)
        return tensors

    @collective("all_reduce", "tensors|tensor")
    def allreduce(self, call, tensors):
        for tensor in (tensors := _list(tensors)):
            if tensor.is_sparse:
                self._sparse(call, tensor)
            else:
                put(call.reduce(tensor), tensor)
        return tensors

    allreduce_coalesced = allreduce

    def _sparse(self, call, tensor):
        """all_reduce of sparse tensors: every rank gets the entries of all, and sums them."""
        if call.op != dist.ReduceOp.SUM:
            raise ValueError(f"all_reduce: found {call.op} of a sparse tensor, expected SUM")
        own = tensor.detach().coalesce()
        counts = self._gather_all(call, torch.tensor([own.indices().shape[1]]))
        indices = [own.indices().new_empty(own.indices().shape[0], int(n)) for n in counts]
        values = [own.values().new_empty(int(n), *own.values().shape[1:]) for n in counts]
        self._gather_all(call, own.indices(), indices)
        self._gather_all(call, own.values(), values)
        total = torch.sparse_coo_tensor(torch.cat(indices, 1), torch.cat(values), tensor.shape,
                                        check_invariants=True)
        with torch.no_grad():
            tensor.copy_(total.coalesce())

    def _gather_all(self, call, tensor, gathered=None):
        """The tensors of all ranks in rank order, in the list `gathered` or in a new one."""
        if gathered is None:
            gathered = [torch.empty_like(tensor) for _ in range(self.comm.size)]
        self._exchange(call, dict.fromkeys(range(self.comm.size), tensor),
                       self._one_each(call, gathered))
        return gathered

    def _exchange(self, call, outgoing, incoming):
        """Send the tensors {rank: tensor}, and fill those of `incoming`."""
        arrays, known = {}, {}
        for rank, tensor in outgoing.items():  # the same tensor may go to all
            if id(tensor) not in known:
                known[id(tensor)] = as_bytes(tensor, call.what)
            arrays[rank] = known[id(tensor)]
        rooms = {rank: room(tensor, call.what) for rank, tensor in incoming.items()}
        call.exchange(arrays, rooms)
        for rank, tensor in incoming.items():
            from_bytes(rooms[rank], tensor)

    def _one_each(self, call, tensors):
        if len(tensors) != self.comm.size:
            raise ValueError(f"{call.what}: found {len(tensors)} tensors, expected one for each of "
                             f"{self.comm.size} ranks")
        return dict(enumerate(tensors))

    @collective("all_gather", "output_tensors", "input_tensors|input_tensor")
    def allgather(self, call, outputs, inputs):
        outputs = _lists(outputs)
        for gathered, tensor in zip(outputs, _list(inputs), strict=True):
            self._gather_all(call, tensor, gathered)
        return outputs

    @collective("all_gather_coalesced", "output_lists", "input_list")
    def allgather_coalesced(self, call, outputs, inputs):
        for gathered, tensor in zip(zip(*outputs, strict=True), inputs, strict=True):
            self._gather_all(call, tensor, gathered)
        return outputs

    def _gather_single(self, call, output, tensor):
        parts = _parts(output, self.comm.size)
        self._gather_all(call, tensor, list(parts))
        if parts.data_ptr() != output.data_ptr():
            put(parts, output)
        return [output]

    @collective("all_gather_single", "output|outputBuffer|output_tensor",
                "input|inputBuffer|input_tensor")
    def all_gather_single(self, call, output, tensor):
        return self._gather_single(call, output, tensor)

    _allgather_base = all_gather_single  # its name before torch 2.13

    @collective("all_gather_single", "outputs|output_lists", "inputs|input_list")
    def all_gather_single_coalesced(self, call, outputs, inputs):
        for output, tensor in zip(outputs, inputs, strict=True):
            self._gather_single(call, output, tensor)
        return outputs

    allgather_into_tensor_coalesced = all_gather_single_coalesced

    @collective("reduce", "tensors|tensor")
    def reduce(self, call, tensors):
        for tensor in (tensors := _list(tensors)):
            total = call.reduce(tensor, call.root)
            if total is not None:
                put(total, tensor)
        return tensors

    @collective("gather", "output_tensors", "input_tensors|input_tensor")
    def gather(self, call, outputs, inputs):
        tensor, = _list(inputs)
        incoming = {}
        if self.comm.rank == call.root:
            gathered, = _lists(outputs)
            incoming = self._one_each(call, gathered)
        self._exchange(call, {call.root: tensor}, incoming)
        return outputs

    @collective("scatter", "output_tensors|output_tensor", "input_tensors")
    def scatter(self, call, outputs, inputs):
        output, = _list(outputs)
        outgoing = {}
        if self.comm.rank == call.root:
            scattered, = _lists(inputs)
            outgoing = self._one_each(call, scattered)
        self._exchange(call, outgoing, {call.root: output})
        return [output]

    def _reduce_scatter(self, call, output, tensors):
        for rank, tensor in self._one_each(call, tensors).items():
            total = call.reduce(tensor, rank)
            if total is not None:
                put(total, output)

    @collective("reduce_scatter", "output_tensors|output", "input_tensors|input")
    def reduce_scatter(self, call, outputs, inputs):
        for output, tensors in zip(outputs := _list(outputs), _lists(inputs), strict=True):
            self._reduce_scatter(call, output, tensors)
        return outputs

    @collective("reduce_scatter_single", "outputTensor|output", "inputTensor|input")
    def reduce_scatter_single(self, call, output, tensor):
        self._reduce_scatter(call, output, list(_parts(tensor, self.comm.size)))
        return [output]

    _reduce_scatter_base = reduce_scatter_single

    @collective("reduce_scatter_single", "outputs|outputTensors", "inputs|inputTensors")
    def reduce_scatter_single_coalesced(self, call, outputs, inputs):
        for output, tensor in zip(outputs, inputs, strict=True):
            self._reduce_scatter(call, output, list(_parts(tensor, self.comm.size)))
        return outputs

    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced

    @collective("all_to_all", "output_tensors|output|output_tensor",
                "input_tensors|input|input_tensor")
    def alltoall(self, call, outputs, inputs):
        self._exchange(call, self._one_each(call, inputs), self._one_each(call, outputs))
        return outputs

    @collective("all_to_all_single", "output|output_tensor", "input|input_tensor",
                "output_split_sizes", "input_split_sizes")
    def all_to_all_single(self, call, output, tensor, output_sizes, input_sizes):
        """Sizes count rows of the first dimension; an empty list means equal parts."""
        parts = [list(_parts(t, self.comm.size)) if not len(sizes) else
                 list(t.split([int(n) for n in sizes]))
                 for t, sizes in ((output, output_sizes), (tensor, input_sizes))]
        self._exchange(call, self._one_each(call, parts[1]), self._one_each(call, parts[0]))
        if not len(output_sizes) and not output.is_contiguous():
            put(torch.stack(parts[0]), output)
        return [output]

    alltoall_base = all_to_all_single

    @collective("barrier")
    def barrier(self, call):
        call.wait([self.comm.Ibarrier()])
        return []
