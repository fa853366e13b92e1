"""What of a Reducer outlives the program: residuals by parameter, step, order of buckets."""

import numpy as np
import torch

from mpicomp.errors import MismatchError
from mpicomp.names import known_as
from mpicomp.reducer.memory import on_place
from mpicomp.transport import staging


class Persistence:
    """The part of the Reducer that is saved, loaded and reported."""

    def report(self) -> str:
        """What the exchange took a step, by stage; with method="auto" beside what was predicted."""
        from mpicomp.advice import report

        return report(self.method, self.stats, self.advice)

    @on_place
    def named(self) -> dict:
        """{parameter name: how many of its elements this rank's last packet made non-zero}.

        What a sparse method sends, by layer. Costs a decode; only for exchange=allgather.
        """
        counts = {}
        for bucket, mail in zip(self._buckets, self._mail):
            said = staging.fetched(mail.own(self.step - 1, self.comm.rank))
            counts |= {s.name: int(np.count_nonzero(said[s.slice])) for s in bucket.layout.segments}
        return counts

    @on_place
    def state_dict(self) -> dict:
        """{"step": int, "error/<name>": tensor}: this rank's residuals, in gradient units.

        "order" is there, too, where buckets were made anew after the first step: a tensor of the
        parameters' numbers.

        Raises MismatchError where packets are under way: call `deliver` first.
        """
        self._require_settled("state_dict()")
        state = {"step": self.step, **self._order.state()}
        for bucket, mail in zip(self._buckets, self._mail):
            for kind, array in mail.persistent().items():
                array = staging.fetched(array)
                for segment in bucket.layout.segments:
                    flat = torch.from_numpy(array[segment.slice].copy())
                    state[f"{kind}/{segment.name}"] = flat.view(segment.shape)
        return state | self._shard_state()

    @on_place
    def load_state_dict(self, state) -> None:
        """Go on from what `state_dict` gave on this rank: the same packets follow, to the bit.

        To be called on all ranks: the next exchange first compares step, buckets and parameters.
        Raises MismatchError, with nothing changed, if names or shapes do not fit this model, or
        between backward() and step().
        """
        self._require_no_step("load_state_dict")
        now = self.state_dict()
        state = dict(zip(known_as(state, now), state.values()))  # saved with or without wrappers
        odd = sorted((set(now) ^ set(state)) - {"order"})
        if odd:
            raise MismatchError(
                f"rank {self.comm.rank}: the saved state {'lacks' if odd[0] in now else 'has'} "
                f"{odd[0]!r}, which this model with method {self.method!r} "
                f"{'needs' if odd[0] in now else 'does not know'}")
        for key, tensor in now.items():
            if key not in ("step", "order", "shard") and state[key].shape != tensor.shape:
                raise MismatchError(f"rank {self.comm.rank}: saved {key!r} has shape "
                                    f"{list(state[key].shape)}, expected {list(tensor.shape)}")
        if objection := self._order.objection(state):
            raise MismatchError(f"rank {self.comm.rank}: {objection}")
        self._order.restore(state)
        self._restore_shard(state.get("shard"))
        for bucket, mail in zip(self._buckets, self._mail):
            arrays = mail.persistent()
            for kind in arrays:
                arrays[kind] = np.concatenate([
                    state[f"{kind}/{s.name}"].reshape(-1).float().cpu().numpy()
                    for s in bucket.layout.segments])
            mail.restore(arrays)
        self.step, self._checked = int(state["step"]), False
        self._exchange.restart(max(self.step, self.method.warmup))
        if self._receipt:
            self._receipt.restart(self.step)
