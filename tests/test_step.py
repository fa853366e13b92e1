"""A step is one transaction: loss scale, accumulation, clipping and sparse gradients around it."""

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_
from training import digest, examples, give, network, parameters, replicas_are_identical

import mpicomp
from mpicomp import MismatchError, SpecError

pytestmark = pytest.mark.mpi
SPECS = ["dense", "fp16:feedback=yes", "terngrad", "onebit", "dorefa", "strom:tau=0.02",
         "dryden:proportion=8", "dropping:rate=0.9", "adacomp", "onebit:exchange=sharded",
         "onebit:exchange=hierarchical", "onebit:warmup=2"]


class Run:
    """A training whose step can be scaled, accumulated and clipped, on all ranks or on one."""

    def __init__(self, comm, spec=None, scale=None, fused=False, enabled=True, **keywords):
        self.comm, self.model = comm, network()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9, fused=fused)
        self.scaler = scale and torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2,
                                                     enabled=enabled)
        self.scales, self.reducer = [], None
        if spec:
            self.reducer = mpicomp.Reducer(
                self.model.named_parameters(), spec, comm, bucket_bytes=2000, seed=3,
                nonfinite="skip", **keywords).attach(self.optimizer, self.scaler or None)

    def backward(self, step, sick=False, pieces=1, piece=0):
        """A piece of this rank's examples; without a reducer, of everybody's."""
        ranks = [self.comm.rank] if self.reducer else range(self.comm.size)
        parts = [examples(type("R", (), {"rank": r}), step) for r in ranks]
        x, y = (torch.cat(part).chunk(pieces)[piece] if len(ranks) == 1 else
                torch.cat([p.chunk(pieces)[piece] for p in part]) for part in zip(*parts))
        loss = cross_entropy(self.model(x), y) / pieces * (np.inf if sick else 1.0)
        (self.scaler.scale(loss) if self.scaler else loss).backward()

    def step(self, step, sick=False, pieces=1, clip=None):
        self.optimizer.zero_grad()
        for piece in range(pieces - 1):
            if self.reducer:
                with self.reducer.no_sync():
                    self.backward(step, sick, pieces, piece)
            else:
                self.backward(step, sick, pieces, piece)
        self.backward(step, sick, pieces, pieces - 1)
        if clip:
            if self.scaler:
                self.scaler.unscale_(self.optimizer)
            elif self.reducer:
                self.reducer.finish()
            clip_grad_norm_(self.model.parameters(), clip)
        if not self.scaler:
            return self.optimizer.step()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scales.append(self.scaler.get_scale())

    @property
    def everything(self):
        state = self.reducer.state_dict()
        return digest(self.model.parameters()), {
            key: value.numpy().tobytes() for key, value in state.items() if key != "step"}


@pytest.mark.parametrize("pieces, clip", [(1, None), (2, None), (1, 0.2), (2, 0.2)])
@pytest.mark.parametrize("scale", [None, 2.0**12])
def test_dense_is_one_process_with_all_examples(scale, pieces, clip, comm):
    """With accumulation, clipping of the mean and a loss scale; up to the order of sums."""
    ours, one = Run(comm, "dense", scale), Run(comm, None, scale)
    for step in range(5):
        for run in ours, one:
            run.step(step, pieces=pieces, clip=clip)
    for p, q in zip(ours.model.parameters(), one.model.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=2e-6)
    assert ours.scales == one.scales
    replicas_are_identical(comm, ours.model)


@pytest.mark.parametrize("spec", SPECS)
def test_a_loss_scale_changes_nothing(spec, comm):
    """Parameters and residuals to the bit, though the scale doubles and halves on the way.

    In step 2 one rank overflows: all skip it, keep their residuals and lower their scale.
    """
    plain, scaled = Run(comm, spec), Run(comm, spec, 2.0**10)
    odd = comm.size - 1
    for step in range(6):
        sick = step == 2
        before = scaled.everything
        scaled.step(step, sick=sick and comm.rank == odd)
        if sick:
            assert scaled.everything == before
            plain.reducer.averager.step += 1  # the same random numbers from here on
        else:
            plain.step(step)
            assert scaled.everything[0] != before[0]
    assert scaled.scales == [2.0**10, 2.0**11, 2.0**10, 2.0**10, 2.0**11, 2.0**11]
    assert scaled.everything == plain.everything
    assert scaled.reducer.stats.skipped == 1 and scaled.reducer.stats.steps == 6
    replicas_are_identical(comm, scaled.model)


def test_a_rank_without_examples_under_a_scaler(comm):
    """It only steps, and its gradient counts as zero; so after a step that was skipped."""
    run = Run(comm, "onebit", 2.0**10)
    for step in range(4):
        run.optimizer.zero_grad()
        if comm.rank == 0:
            run.backward(step, sick=step == 1)
        else:
            run.scaler.scale(torch.zeros(()))  # torch's scaler makes no step before its first scale
        run.scaler.step(run.optimizer)
        run.scaler.update()
        replicas_are_identical(comm, run.model)
    assert run.reducer.stats.steps == 4 and run.reducer.stats.skipped == 1
    assert len(set(comm.allgather(run.scaler.get_scale()))) == 1


def overflows_in(steps, run, comm, **keywords):
    """Six steps, in some of which the last rank overflows."""
    for step in range(6):
        run.step(step, sick=step in steps and comm.rank == comm.size - 1, **keywords)


@pytest.mark.parametrize("spec", ["dense:delay=1", "onebit:exchange=sharded,delay=1",
                                  "terngrad:delay=1"])
def test_a_loss_scale_changes_nothing_with_delay(spec, comm):
    """To the bit, deliver() included; a step in which nothing has landed does not lower the scale.

    What overflows in step 2 is noticed in step 3, by all ranks.
    """
    plain, scaled = Run(comm, spec), Run(comm, spec, 2.0**10)
    for run in plain, scaled:
        overflows_in([2], run, comm)
        run.reducer.deliver()
        run.step(6)
        run.step(7)
        run.reducer.deliver()
    assert scaled.scales == [2.0**k for k in (10, 11, 11, 10, 10, 11, 11, 12)]
    assert scaled.everything == plain.everything
    assert scaled.reducer.stats.skipped == plain.reducer.stats.skipped == 1
    replicas_are_identical(comm, scaled.model)


@pytest.mark.parametrize("spec", ["onebit", "strom:tau=0.02,exchange=sharded"])
def test_flush_under_a_scaler_is_without_scale(spec, comm):
    """optimizer.step() follows, as without a scaler; scaler.step would divide by the scale."""
    plain, scaled = Run(comm, spec), Run(comm, spec, 2.0**10)
    for step in range(6):
        for run in plain, scaled:
            run.step(step)
            if step % 2:
                run.reducer.flush()
                if run is scaled:
                    with pytest.raises(MismatchError, match=r"after flush.* call optimizer.step"):
                        run.scaler.step(run.optimizer)
                run.optimizer.step()
        assert scaled.everything == plain.everything
    assert scaled.reducer.stats.steps == 6 and scaled.scales[-1] == 2.0**13


@pytest.mark.parametrize("begun", [1, 2])
@pytest.mark.parametrize("spec", ["strom:tau=0.5", "onebit", "dense:delay=1"])
def test_flush_and_deliver_refuse_a_step_that_has_begun(spec, begun, comm):
    """Some of its gradients are there, or all: they would be lost. The step can be ended."""
    named = parameters(w=(20, 3), b=20)
    optimizer = torch.optim.SGD([p for _, p in named], lr=1.0)
    reducer = mpicomp.Reducer(named, spec, comm, bucket_bytes=4).attach(optimizer)
    ones = [np.ones(p.shape) for _, p in named]
    give(named, ones)
    optimizer.step()
    optimizer.zero_grad()
    give(named[:begun], ones[:begun])
    what = "deliver" if "delay" in spec else "flush"
    with pytest.raises(MismatchError, match=rf"{what}\(\) in the middle of a step: call it after"):
        getattr(reducer, what)()
    optimizer.step()
    reducer.deliver()
    owed = sum(v for key, v in reducer.state_dict().items() if key.endswith("/w"))
    assert torch.allclose(owed - named[0][1].detach(), torch.full((20, 3), 2.0))


@pytest.mark.parametrize("updates", [1, 2])
@pytest.mark.parametrize("spec", ["strom:tau=0.05", "onebit"])
def test_two_reducers_share_a_scaler(spec, updates, comm):
    """A GAN as torch's guide has it: to the bit as without a scaler, in as many steps."""
    found = []
    for scale in None, 64.0:
        torch.manual_seed(0)
        both = judge, maker = torch.nn.Linear(3, 2), torch.nn.Linear(2, 3)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0, enabled=bool(scale))
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in both]
        reducers = [mpicomp.Reducer(m.named_parameters(), spec, comm, nonfinite="skip").attach(
            optimizer, scaler if scale else None) for m, optimizer in zip(both, optimizers)]
        for step in range(4):
            z = torch.full((1, 2), 0.3 * (step + 1) + comm.rank)
            optimizers[0].zero_grad()
            scaler.scale((judge(torch.ones(1, 3)) - judge(maker(z).detach())).sum()).backward()
            scaler.step(optimizers[0])
            if updates == 2:
                scaler.update()
            optimizers[1].zero_grad()
            with reducers[0].no_sync():
                scaler.scale(judge(maker(z)).sum()).backward()
            scaler.step(optimizers[1])
            scaler.update()
        assert [r.step for r in reducers] == [4, 4]
        found.append([digest(p for m in both for p in m.parameters()),
                      *(digest(list(r.state_dict().values())[1:]) for r in reducers)])
    assert found[0] == found[1]


@pytest.mark.parametrize("clip", [None, 0.2])
@pytest.mark.parametrize("spec", ["dense", "onebit:exchange=sharded", "strom:tau=0.02"])
def test_an_optimizer_that_takes_the_scale_itself(spec, clip, comm):
    """fused=True: torch would look for Inf before the exchange, on each rank apart.

    The first step is one of those that overflow, on one rank.
    """
    plain, scaled = Run(comm, spec, fused=True), Run(comm, spec, 2.0**10, fused=True)
    for run in plain, scaled:
        overflows_in([0, 3], run, comm, clip=clip)
    assert scaled.scales == [2.0**k for k in (9, 9, 10, 9, 9, 10)]
    assert scaled.everything == plain.everything
    assert scaled.reducer.stats.steps == 6 and scaled.reducer.stats.skipped == 2
    replicas_are_identical(comm, scaled.model)


@pytest.mark.parametrize("dtype, fused", [(torch.float32, False), (torch.float32, True),
                                          (torch.float16, True)])
def test_steps_in_which_ranks_have_no_examples(dtype, fused, comm):
    """Where none has any, nothing moves, and the scale does not fall."""
    w = torch.nn.Parameter(torch.ones(5, dtype=dtype))
    optimizer = torch.optim.AdamW([w], lr=0.5, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    mpicomp.Reducer([("w", w)], "dense", comm, nonfinite="skip").attach(optimizer, scaler)
    scales = []
    for step in range(5):
        optimizer.zero_grad()
        if comm.rank == 0 and step != 3:
            scaler.scale((w.float() * (np.inf if step == 1 else 0.25)).sum()).backward()
        else:
            scaler.scale(torch.zeros(()))
        before = w.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
        assert w.isfinite().all() and torch.equal(w, before) == (step in (1, 3))
    assert scales == [2.0**10] + [2.0**9] * 4
    assert len(set(comm.allgather(digest([w])))) == 1


@pytest.mark.parametrize("fused", [False, True])
def test_a_scaler_that_is_switched_off(fused, comm):
    """unscale_ finishes all the same; where a step is skipped, it is not NaN that is applied."""
    plain, scaled = (Run(comm, "onebit", scale, fused, enabled=False) for scale in (None, 2.0**10))
    for run in plain, scaled:
        overflows_in([2], run, comm, clip=0.2)
    assert scaled.everything == plain.everything


def test_a_scaler_needs_steps_that_may_be_skipped(comm):
    named = parameters(w=3)
    optimizer = torch.optim.SGD([named[0][1]], lr=1.0)
    reducer = mpicomp.Reducer(named, "dense", comm)
    with pytest.raises(SpecError, match="nonfinite='skip'"):
        reducer.attach(optimizer, torch.amp.GradScaler("cpu"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gradients_are_unscaled_in_single_precision(dtype, comm):
    """2**-20 is less than the least float16 that rounds well; under a scale of 2**16 it is not."""
    w = torch.nn.Parameter(torch.zeros(5, dtype=dtype))
    optimizer = torch.optim.SGD([w], lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    reducer = mpicomp.Reducer([("w", w)], "onebit:min_rows=1", comm, nonfinite="skip"
                              ).attach(optimizer, scaler)
    scaler.scale((w.float() * torch.full((5,), 1.5 * 2.0**-20)).sum()).backward()
    reducer.finish()
    assert w.grad.dtype == dtype and (w.grad.float() == 1.5 * 2.0**-4).all()
    assert (reducer.state_dict()["error/w"] == 0).all()


@pytest.mark.parametrize("spec", SPECS)
def test_clipping_and_accumulation_keep_replicas_equal(spec, comm):
    run = Run(comm, spec)
    for step in range(4):
        run.step(step, pieces=2, clip=0.2)
    norm = torch.stack([p.grad.norm() for p in run.model.parameters()]).norm()
    assert norm <= 0.2 * (1 + 1e-5)
    replicas_are_identical(comm, run.model)


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec not in ("terngrad", "dorefa")]
                         + ["bf16:feedback=yes", "dorefa:feedback=yes",
                            "strom:tau=0.02,exchange=sharded",
                            "dropping:rate=0.9,exchange=hierarchical"])
def test_nothing_is_lost_under_a_scale_with_accumulation_and_clipping(spec, comm):
    """Ranks times the mean before it is clipped, and all that is owed, make up all that was given.

    terngrad owes nothing and is right on average only. In step 2 a rank overflows: what
    was given there counts nowhere.
    """
    run = Run(comm, spec, 2.0**10)
    names = [name for name, _ in run.model.named_parameters()]
    given, said = ({name: np.zeros(p.shape) for name, p in run.model.named_parameters()}
                   for _ in range(2))
    for step in range(6):
        run.optimizer.zero_grad()
        sick = step == 2 and comm.rank == comm.size - 1
        with run.reducer.no_sync():
            for piece in range(3):
                run.backward(step, sick and piece == 1, pieces=3, piece=piece)
        mine = {name: p.grad.double().numpy() / run.scaler.get_scale()
                for name, p in run.model.named_parameters()}
        run.scaler.unscale_(run.optimizer)
        if step != 2:
            for name, p in run.model.named_parameters():
                given[name] += mine[name]
                said[name] += comm.size * (0 if p.grad is None else p.grad.double().numpy())
        clip_grad_norm_(run.model.parameters(), 0.2)
        run.scaler.step(run.optimizer)
        run.scaler.update()
        replicas_are_identical(comm, run.model)
    state = run.reducer.state_dict()
    for name in names:
        owed = sum((value.double().numpy() for key, value in state.items()
                    if key in (f"error/{name}", f"error2/{name}")), np.zeros(given[name].shape))
        np.testing.assert_allclose(said[name] + comm.allreduce(owed), comm.allreduce(given[name]),
                                   rtol=0, atol=2e-5)
    assert run.reducer.stats.skipped == 1


@pytest.mark.parametrize("spec", ["dense", "onebit", "onebit:exchange=sharded"])
def test_each_rank_clips_its_own_gradient_before_it_is_compressed(spec, comm):
    """All backward passes inside of no_sync(), then clip, then step: what is given is clipped."""
    named = parameters(w=(20, 3), b=(20,))
    reducer = mpicomp.Reducer(named, spec, comm, average=False)
    given, said = ({name: np.zeros(p.shape) for name, p in named} for _ in range(2))
    for step in range(3):
        for _, p in named:
            p.grad = None
        rng = np.random.default_rng(10 * comm.rank + step)
        with reducer.no_sync():
            give(named, [10 * rng.normal(size=p.shape) for _, p in named])
        assert clip_grad_norm_([p for _, p in named], 1.0) > 1
        for name, p in named:
            given[name] += p.grad.numpy()
        reducer.finish()
        for name, p in named:
            said[name] += p.grad.numpy()
    owed = reducer.state_dict()
    for name, _ in named:
        mine = sum(v.numpy().astype(float) for key, v in owed.items() if key.endswith("/" + name))
        assert np.allclose(said[name] + comm.allreduce(mine), comm.allreduce(given[name]),
                           atol=1e-5), name


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("spec", ["dense", "onebit", "strom:tau=0.05", "dropping:rate=0.9",
                                  "terngrad", "onebit:exchange=sharded"])
def test_sparse_gradients_of_an_embedding(spec, set_to_none, comm):
    """They are summed where a row occurs twice, and travel as the dense gradient, to the bit."""
    results = []
    for sparse in True, False:
        torch.manual_seed(1)
        table = torch.nn.Embedding(30, 4, sparse=sparse)
        optimizer = torch.optim.SGD(table.parameters(), lr=0.1)
        reducer = mpicomp.Reducer(table.named_parameters(), spec, comm, seed=3).attach(optimizer)
        for step in range(4):
            optimizer.zero_grad(set_to_none=set_to_none)
            rows = torch.tensor([[1, 1, step], [2 + comm.rank, 7, 7]])
            weights = torch.arange(24.0).view(2, 3, 4) - 9  # whole numbers: any order of sums
            with reducer.no_sync():
                (table(rows) * weights).sum().backward()
            (table(rows + 1) * weights).sum().backward()
            optimizer.step()
        assert not table.weight.grad.is_sparse
        replicas_are_identical(comm, table)
        results.append((digest(table.parameters()),
                        digest(v for k, v in reducer.state_dict().items() if k != "step")))
    assert results[0] == results[1]


def test_a_frozen_layer_stays_without_a_gradient_where_a_scaler_skips(comm):
    """The optimizer has it, the Reducer does not: nothing of it is exchanged or made NaN."""
    model = network()
    frozen = [*model.parameters()][0].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    reducer = mpicomp.Reducer(model.named_parameters(), "onebit", comm, nonfinite="skip")
    reducer.attach(optimizer, scaler)
    x, y = examples(comm, 0)
    for overflow in (True, False):
        optimizer.zero_grad(set_to_none=False)
        loss = torch.nn.functional.cross_entropy(model(x), y)
        scaler.scale(loss * (float("inf") if overflow else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        assert frozen.grad is None
    assert (reducer.stats.steps, reducer.stats.skipped) == (2, 1)
