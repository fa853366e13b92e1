"""What train.py does around its steps: resume, log, evaluate, save, end early, write the result."""
from __future__ import annotations

import hashlib
import json
import shutil
import signal
import statistics
from contextlib import nullcontext
from time import perf_counter

import torch

import mpicomp
import mpicomp.nn
from mpicomp import checkpoint
from trainer.account import Account
from trainer.datasets import my_rows
from trainer.journal import Journal
from trainer.resume import Checkpoints
from trainer.scores import evaluate, phoneme_error_rate, rows_of


class Training:
    """A training under way. It goes on from a checkpoint where --resume asks for that.

        training = Training(setup, model, optimizer, reducer)
        for step in training.steps():
            training.after(step, *training.piece(train, step))
        training.finish()

    train(step) gets its examples by `batch`, asks for `signal` after backward, and returns this
    rank's summed loss, its number of targets, and that signal. `reducer` is the optimizer's, or
    with --local mpicomp.LocalUpdates.
    """

    def __init__(self, setup, model, optimizer, reducer):
        self.setup, self.ranks, self.model = setup, setup.ranks, model
        self.optimizer, self.reducer = optimizer, reducer
        self.account = Account(self.reducer)
        self.checkpoints = Checkpoints(setup, model, optimizer, reducer, self.account)
        self.start = self.checkpoints.restore()
        self.scores, self.recovery, self.began = None, None, 0.0
        self.journal = Journal(setup.out, self.ranks.size == 1)
        self.ranks.agreed(lambda: self._take_over() if self.ranks.rank == 0 else None)
        self._introduce()
        # Asynchronous ranks must not meet in every step: a signal is heard at the next checkpoint.
        self.together = not setup.method.asynchronous
        self.signals = checkpoint.Signals(self.ranks.comm)
        if setup.args.survive:
            self._survive()

    def _take_over(self):
        """Make --out the folder of this training, on rank 0."""
        setup, out = self.setup, self.setup.out
        out.mkdir(parents=True, exist_ok=True)
        (out / "result.json").unlink(missing_ok=True)
        if not self.start:
            shutil.rmtree(self.checkpoints.folder, ignore_errors=True)
        self.journal.open(self.start)
        (out / "config.json").write_text(json.dumps(
            {**setup.config, "ranks": self.ranks.size, "digest": setup.digest}))

    def _introduce(self):
        """Print what is trained."""
        setup, ranks = self.setup, self.ranks
        parameters = sum(p.numel() for p in self.model.parameters())
        ranks.say("  ".join(f"{key}={value}" for key, value in setup.config.items()))
        ranks.say(f"{parameters:,} parameters  {len(setup.kept)} + {len(setup.scored[1])} examples"
                  f"  {ranks.size} ranks x {torch.get_num_threads()} threads  out={setup.out}"
                  + (f"  from step {self.start}" if self.start else ""))

    # ---- ranks that die

    def _survive(self):
        """With --survive: do a piece again on the ranks that are left where one dies."""
        squares = self.setup.squares
        self.recovery = mpicomp.Recovery(
            self.reducer, self.model, self.ranks.comm, regrouped=self._regrouped,
            least=self.setup.args.survive, keep=lambda: dict(squares),
            restore=lambda kept: (squares.clear(), squares.update(kept)))
        self.ranks.move(self.recovery.comm)
        self.recovery.track(self.signals.comm)

    def _regrouped(self, recovery):
        """A rank has died: those that are left divide the data anew, the first of them writes."""
        self.ranks.move(recovery.comm)
        recovery.track(self.signals.move(recovery.comm))
        if self.ranks.rank == 0 and self.journal.metrics is None:
            self.journal.open(self.reducer.step)

    def piece(self, work, *arguments):
        """work(...), with --survive again where a rank dies in it; all end on a RatioError."""
        def refusing():
            return self._within_ratio(work, *arguments)
        return self.recovery.run(refusing) if self.recovery else refusing()

    def _within_ratio(self, work, *arguments):
        """work(...); where --require-ratio is not kept, all ranks learn it and end together."""
        try:
            return work(*arguments)
        except mpicomp.RatioError as problem:
            self.ranks.refuse(problem)

    # ---- a step

    def steps(self):
        """The numbers of the steps that are left, from 0."""
        self.journal.show(self.start, self.setup.steps)
        for step in range(self.start, self.setup.steps):
            self.began = perf_counter()
            yield step

    def batch(self, step):
        """This rank's examples of a step, as (inputs, targets); sets the step's learning rate."""
        setup, ranks = self.setup, self.ranks
        if setup.args.local:  # ranks meet when a round ends
            self.together = self.reducer.exchanges_next
        if self.together:
            self.signals.post()
        rows = my_rows(len(setup.kept), setup.batch, setup.args.seed, step, ranks.rank, ranks.size)
        for group in self.optimizer.param_groups:
            group["lr"] = setup.learning_rate(step)
        if "bits" in setup.config:
            mpicomp.nn.reseed(setup.noise, setup.args.seed, ranks.rank, step)
        return rows_of(setup.data.train, setup.kept[rows], setup.device)

    def signal(self):
        """The number of a signal that any rank had heard when the step began, or 0."""
        return self.signals.agreed() if self.together else 0

    def after(self, step, loss, targets, heard):
        """Count a step, and do what is due after it: flush, log, evaluate, save, end early."""
        setup, last = self.setup, step + 1 == self.setup.steps
        self.account.add(loss, targets, perf_counter() - self.began)
        self.journal.advance()
        ends_epoch = (step + 1) % setup.epoch_steps == 0
        if setup.args.flush_epochs and ends_epoch:
            self._settle()
            self.reducer.flush()
            self.optimizer.step()
        logs = (step + 1) % setup.args.log_every == 0 or last
        evaluates = ends_epoch or last
        stopped_by = heard * (not last)
        saves = stopped_by or (step + 1) % setup.save_every == 0 or last
        if last and setup.args.local:
            self.reducer.sync()
        if evaluates or saves or logs and setup.method.unattended:
            self.piece(self._settle)
        if saves and not self.together:
            stopped_by = self.piece(self._asked) * (not last)
        if logs:
            self._log(step)
        if evaluates:
            self._evaluate(step)
        if saves:
            self.piece(self.checkpoints.save, step)
        if stopped_by:
            self._stop(step, stopped_by)

    def _settle(self):
        """Make replicas equal: apply all packets that an asynchronous method has under way."""
        if self.setup.args.local:
            return
        self.reducer.deliver()
        if self.setup.method.asynchronous and not self.setup.method.owns:
            # Replicas have added the same packets in another order, and with momentum or Adam in
            # other steps. What is evaluated and saved is rank 0's, and from there all go on.
            size = 4 * sum(value.numel() for value in self.model.state_dict().values())
            sent, received = (0, size) if self.ranks.rank else (size, 0)
            self.reducer.stats.count("Bcast", sent, received)
            mpicomp.broadcast_parameters(self.model, self.ranks.comm)

    def _asked(self):
        """`signal` of ranks that meet at checkpoints only."""
        self._settle()
        self.signals.post()
        return self.signals.agreed()

    # ---- what it writes

    def _record(self, kind, step, **values):
        """Write a row of metrics.jsonl, and return it."""
        counted = self.account.bytes()
        row = dict(kind=kind, step=step + 1, epoch=(step + 1) / self.setup.epoch_steps,
                   seconds=self.account.seconds, bytes_sent=counted["sent"],
                   ratio=self.account.ratio(), bytes_by_reason=counted["reasons"], **values)
        self.journal.write(row)
        return row

    def _log(self, step):
        """Log the mean loss since the last line over all ranks, in float64, added in rank order."""
        setup, tally = self.setup, self.account.tally
        parts = self.piece(lambda: self.ranks.comm.allgather(
            (tally["loss"], tally["targets"], self.account.bytes()["sent"])))
        if self.ranks.rank == 0:
            loss, targets, sent = (sum(column) for column in zip(*parts, strict=True))
            layers = {"layers": self.reducer.named()} if setup.args.log_layers else {}
            row = self._record(
                "train", step, loss=loss / targets, learning_rate=setup.learning_rate(step),
                bytes_all=sent, **layers, bytes_per_step=tally["sent"] / tally["steps"],
                examples_per_second=setup.batch * tally["steps"] / tally["seconds"])
            self.journal.numbers(
                f"step {row['step']:5}/{setup.steps}  epoch {row['epoch']:5.2f}",
                f"loss {row['loss']:.4f}  {row['examples_per_second']:,.0f} examples/s  "
                f"{row['bytes_per_step']:,.0f} bytes/step  ratio {row['ratio']:.1f}")
        self.account.clear()

    def _evaluate(self, step):
        """Score the model, and log loss and accuracy."""
        self.scores = self._score(evaluate)
        if self.ranks.rank == 0:
            (loss, accuracy), what = self.scores, self.setup.what
            self._record("eval", step, loss=loss, accuracy=accuracy)
            self.journal.say(f"step {step + 1:5}/{self.setup.steps}  {what} accuracy "
                             f"{accuracy:.2%}  {what} loss {loss:.4f}")

    def _score(self, function):
        """What evaluate or phoneme_error_rate gives for this model, on the ranks that are left."""
        with self.reducer.anchored() if self.setup.args.local else nullcontext():
            return self.piece(lambda: function(self.model, *self.setup.scored, self.ranks.comm))

    def _stop(self, step, number):
        """End all ranks after a checkpoint, with the status that asks for a resumption."""
        self.ranks.say(f"{signal.Signals(number).name}: saved after step {step + 1}, ending with "
                       f"status {checkpoint.RESUME}; --resume goes on from there")
        self.journal.close()
        if self.recovery:
            self.recovery.leave(checkpoint.RESUME)
        self.ranks.end(checkpoint.RESUME)

    def finish(self):
        """Write result.json, print it, and make sure that all replicas are equal."""
        self.signals.close()
        if not self.setup.args.local:
            self._within_ratio(self.reducer.check_ratio)
        loss, accuracy = self.scores or self._score(evaluate)
        errors = self._score(phoneme_error_rate)
        weights = self._weights()
        if self.ranks.rank == 0:
            self.journal.close()
            self._write_result(dict(accuracy=accuracy, loss=loss, **errors), weights)
        if self.recovery:
            self.recovery.leave()

    def _weights(self):
        """The sha256 of the model's parameters and buffers, the same on all ranks."""
        weights = hashlib.sha256()
        for name, value in self.model.state_dict().items():
            weights.update(name.encode() + value.cpu().numpy().tobytes())
        replicas = self.piece(lambda: self.ranks.comm.allgather(weights.hexdigest()))
        if len(set(replicas)) > 1:
            raise RuntimeError(f"rank {self.ranks.rank}: the replicas differ, which must never "
                               f"happen: {replicas}")
        return replicas[0]

    def _write_result(self, scores, weights):
        """Write result.json, so that it is there whole or not at all, and print the essence."""
        setup, account = self.setup, self.account
        counted, seconds, what = account.bytes(), account.seconds, setup.what
        result = dict(
            **scores, bytes_per_step=counted["sent"] / setup.steps, ratio=account.ratio(),
            steps=setup.steps, ranks=self.ranks.size, bytes_by_reason=counted["reasons"],
            seconds_per_step=statistics.median(account.times or [seconds / setup.steps]),
            seconds=seconds, parameters_sha256=weights, skipped=self.reducer.stats.skipped,
            digest=setup.digest, **(dict(lost=self.recovery.lost) if self.recovery else {}),
            config=setup.config, torch=torch.__version__,
            shapes={name: list(p.shape) for name, p in self.model.named_parameters()})
        part = setup.out / "result.json.part"
        checkpoint.write(part, json.dumps(result, indent=1).encode())
        part.replace(setup.out / "result.json")
        rates = "".join(f"{name} {rate:.2%}  " for name, rate in scores.items()
                        if name not in ("accuracy", "loss"))
        self.ranks.say(f"{what} accuracy {scores['accuracy']:.2%}  {what} loss "
                       f"{scores['loss']:.4f}  {rates}{result['bytes_per_step']:,.0f} bytes/step  "
                       f"ratio {result['ratio']:.1f}  {1000 * result['seconds_per_step']:.1f} "
                       f"ms/step\nparameters {weights}")
