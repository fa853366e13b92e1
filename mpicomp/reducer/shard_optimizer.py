"""The optimizer of one shard of the parameters: the user's own kind, over the pieces it owns."""

import torch

from mpicomp.errors import SpecError

WHOLE_TENSORS = ("LBFGS", "Adafactor", "Muon", "SparseAdam")  # not one element at a time


class ShardOptimizer:
    """Does to the elements from `first` to before `last` of a bucket what the user's would do.

    values     float32[last - first], these elements of the parameters; `step` moves them
    gradient   float32[last - first], where `step` finds the gradient
    optimizers  the attached ones. For each there is another of its class, whose parameters are
               vectors: pieces of `values`. Options such as lr are read from the user's at each
               step, so that schedules work. State (momenta, step counts) is the shard's own.

    Raises SpecError for optimizers that look at whole tensors, for parameters that are not float32
    and for those that no optimizer has.
    """

    def __init__(self, bucket, first, last, optimizers, values, gradient):
        self._check(bucket, optimizers)
        self._own = []  # (name, piece, its elements of the flat parameter, parameter)
        values, gradient = torch.from_numpy(values), torch.from_numpy(gradient)
        for slot, segment in zip(bucket.slots, bucket.layout.segments):
            a, b = max(first, segment.start), min(last, segment.stop)
            if a < b:
                piece = values[a - first:b - first]
                piece.grad = gradient[a - first:b - first]
                place = slice(a - segment.start, b - segment.start)
                self._own.append((slot.name, piece, place, slot.parameter))
        pieces = {id(parameter): piece for _, piece, _, parameter in self._own}
        self._pairs = []  # (ours, the user's)
        for optimizer in optimizers:
            groups = [{**group, "params": [pieces[id(p)] for p in group["params"]
                                           if id(p) in pieces]} for group in optimizer.param_groups]
            if any(group["params"] for group in groups):
                self._pairs.append((type(optimizer)(groups), optimizer))

    def _check(self, bucket, optimizers):
        if not optimizers:
            raise SpecError("exchange=server needs an attached optimizer, whose kind and options "
                            "the owners of the parameters use: reducer.attach(optimizer), or "
                            "mpicomp.DistributedOptimizer(...)")
        for optimizer in optimizers:
            if type(optimizer).__name__ in WHOLE_TENSORS:
                raise SpecError(f"exchange=server cuts parameters anywhere, and "
                                f"{type(optimizer).__name__} does not treat each element by "
                                "itself: use SGD, Adam or another that does")
        known = {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
        for slot in bucket.slots:
            if id(slot.parameter) not in known:
                raise SpecError(f"no attached optimizer has the parameter {slot.name!r}, which "
                                "exchange=server must be able to move")
            if slot.parameter.dtype != torch.float32:
                raise SpecError(f"exchange=server moves float32 parameters only, {slot.name!r} is "
                                f"{slot.parameter.dtype}")

    @torch.no_grad()
    def read(self):
        """Take these elements over from the parameters as they are now."""
        for _, piece, place, parameter in self._own:
            piece.copy_(parameter.detach().reshape(-1)[place])

    def step(self):
        """Apply what stands in `gradient`, with the options that the user's optimizer has now."""
        for ours, users in self._pairs:
            for group, source in zip(ours.param_groups, users.param_groups):
                group.update((key, value) for key, value in source.items() if key != "params")
            ours.step()

    @property
    def pieces(self):
        """[[name, first, last]] of the elements of each parameter that lie in this shard."""
        return [[name, place.start, place.stop] for name, _, place, _ in self._own]

    def state_dict(self) -> dict:
        """{"pieces": ..., "optimizers": [the state of each]}, in copies."""
        return {"pieces": self.pieces,
                "optimizers": [_copy(ours.state_dict()) for ours, _ in self._pairs]}

    def load_state_dict(self, state):
        """Go on from there; the pieces must be the same."""
        for (ours, _), saved in zip(self._pairs, state["optimizers"]):
            ours.load_state_dict(saved)


def _copy(value):
    """Nested dictionaries and lists with all tensors copied."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, (list, tuple)) else value
