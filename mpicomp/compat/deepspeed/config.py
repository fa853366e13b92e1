"""A DeepSpeed configuration as a Python program for mpicomp."""

from collections.abc import Mapping
from math import isfinite
from typing import Any

from mpicomp.errors import SpecError

# {type in lower case: (DeepSpeed's name, key with the step at which the variance is frozen)}
ONEBIT = {"onebitadam": ("OneBitAdam", "freeze_step"),
          "zerooneadam": ("ZeroOneAdam", "var_freeze_step"),
          "onebitlamb": ("OneBitLamb", "freeze_step")}
FROZEN_AT = 100_000  # both keys' default

# What an optimizer's params say beside those that are translated.
PARAMS = {
    "bias_correction": "has no effect in DeepSpeed's 1-bit optimizers, which never correct the "
                       "bias: their first steps are longer than AdamW's. Here it is corrected",
    "eps_inside_sqrt": "has no effect in DeepSpeed either",
    "max_grad_norm": "has no effect in DeepSpeed; gradient_clipping has",
    "amsgrad": "is refused by DeepSpeed's 1-bit optimizers, and not translated",
    "cuda_aware": "is found out by mpicomp itself (docs/gpu.md)",
    "comm_backend_name": "has no counterpart: packets travel over MPI, whatever it names",
    "var_update_scaler": "belongs to 0/1 Adam's variance policy, see the note on ZeroOneAdam",
    "local_step_scaler": "belongs to 0/1 Adam's local steps, see the note on ZeroOneAdam",
    "local_step_clipper": "belongs to 0/1 Adam's local steps, see the note on ZeroOneAdam",
    "max_coeff": "belongs to LAMB's trust ratio", "min_coeff": "belongs to LAMB's trust ratio",
    "coeff_beta": "belongs to LAMB's trust ratio", "factor_max": "belongs to LAMB's trust ratio",
    "factor_min": "belongs to LAMB's trust ratio",
    "factor_threshold": "belongs to LAMB's trust ratio",
    "torch_adam": "has no counterpart: it is torch's AdamW here",
    "adam_w_mode": "is translated as true, AdamW; for L2 regularisation use torch.optim.Adam",
}
# Keys of the file that need nothing, or something else, here.
KEYS = {
    "scheduler": "is not translated: make one of torch.optim.lr_scheduler; every rank steps it",
    "prescale_gradients": "is not needed: sums are made in float32 and divided once",
    "gradient_predivide_factor": "is not needed: sums are made in float32 and divided once",
    "gradient_allreduce_op": "has the mean as default, as here; for sum give average=False",
    "zero_allow_untested_optimizer": "belongs to ZeRO, which mpicomp has not",
    "zero_force_ds_cpu_optimizer": "belongs to ZeRO, which mpicomp has not",
    "steps_per_print": "has no counterpart: print(optimizer.reducer.report()) says what was sent",
    "wall_clock_breakdown": "has no counterpart: optimizer.reducer.report() has seconds by stage",
    "comms_logger": "has no counterpart: optimizer.reducer.report() has bytes and seconds",
    "dump_state": "has no counterpart", "flops_profiler": "has no counterpart",
    "memory_breakdown": "has no counterpart", "autotuning": "has no counterpart",
    "tensorboard": "has no counterpart: log optimizer.reducer.stats yourself",
    "wandb": "has no counterpart: log optimizer.reducer.stats yourself",
    "csv_monitor": "has no counterpart: log optimizer.reducer.stats yourself",
    "activation_checkpointing": "is torch.utils.checkpoint's",
    "amp": "is Apex, which is not supported: use torch.autocast",
    "torch_autocast": "is translated as torch.autocast by hand",
    "dataloader_drop_last": "is the DataLoader's drop_last",
    "elasticity": "has no counterpart: see docs/fault-tolerance.md",
    "checkpoint": "is not translated: see docs/checkpoints.md",
    "disable_allgather": "has no counterpart", "data_types": "has no counterpart: float32",
    "managed_gradient_accumulation": "is not needed: your loop decides when step() is called",
}


def translate(config: Mapping[str, Any], ranks: int | None = None) -> str:
    """A DeepSpeed configuration as a Python program for mpicomp, with notes as comments.

    config  what a ds_config.json holds
    ranks   how many there will be; None: as many as the program is started with

    The optimizers OneBitAdam, ZeroOneAdam and OneBitLamb become mpicomp.optim.OneBitAdam; Adam and
    AdamW torch's AdamW. Whatever is not translated is named in a note; so are unknown keys, and
    values "auto", which the Trainer of Hugging Face fills in. Raises SpecError for what is no
    configuration.
    """
    if not isinstance(config, Mapping):
        raise SpecError(f"a {type(config).__name__} found, expected DeepSpeed's configuration, an "
                        "object of JSON: {\"optimizer\": {...}, ...}")
    reader = _Reader(config)
    made = _optimizer(reader)
    precision = _precision(reader)
    accumulation, batch, check = _batches(reader, ranks)
    clip = _number(reader, "gradient_clipping", 0.0)
    if clip and made.startswith("mpicomp.optim"):
        reader.note("gradient_clipping", "DeepSpeed clips each rank's own gradient after the "
                    "freeze; here it is the mean, which is the momentum then, alike on all ranks")
    arguments = ", sparse=mpicomp.sparse_parameters(model)" * bool(reader.take("sparse_gradients"))
    _zero(reader)
    method = _method(reader, made)
    for key in reader.left():
        reader.note(key, KEYS.get(key, "UNKNOWN, not translated"))
    loop = _loop(accumulation, check, precision, clip)
    first = "import contextlib\n\n" if accumulation != 1 else ""
    return f"""\
{first}import torch

import mpicomp

# model, loader (this rank's share: {batch}) and loss_fn are yours
mpicomp.broadcast_parameters(model)
optimizer = {made}
mpicomp.DistributedOptimizer(
    optimizer, named_parameters=model.named_parameters(), method="{method}"{arguments})

{loop}
# Start it with:  mpirun -n {ranks or 'RANKS'} python script.py
{reader.text()}"""


class _Reader:
    """The keys of a configuration: which were translated, and what is to be said."""

    def __init__(self, config):
        self._left, self._notes = dict(config), []

    def take(self, key, default=None):
        """The value of a key, which is dealt with; the default for "auto", with a note."""
        value = self._left.pop(key, default)
        if value == "auto":
            self.note(key, "is \"auto\": what the Trainer would have put there is not known here")
            return default
        return value

    def left(self):
        """The keys that nobody has taken."""
        return list(self._left)

    def block(self, key):
        """A reader of the object under a key, with the same notes."""
        value = self.take(key) or {}
        if not isinstance(value, Mapping):
            raise SpecError(f"{key}={value!r} found, expected an object of JSON")
        inner = _Reader(value)
        inner._notes = self._notes
        return inner

    def note(self, key, text):
        """Something to be said of a key."""
        self._notes.append(f"{key}: {text}")

    def text(self):
        """All notes as comments."""
        if not self._notes:
            return ""
        return "\n# Notes\n" + "\n".join(_comment(note) for note in self._notes) + "\n"


def _comment(note):
    """A note as lines of at most 88 columns."""
    lines = ["# *"]
    for word in note.split():
        if len(lines[-1]) + len(word) > 87:
            lines.append("#  ")
        lines[-1] += " " + word
    return "\n".join(lines)


def _number(reader, key, default, whole=False):
    """A number of at least 0 (whole: 1), or the default. SpecError for anything else."""
    value = reader.take(key)
    if value is None:
        return default
    kinds, least = (int, 1) if whole else ((int, float), 0)
    if (isinstance(value, bool) or not isinstance(value, kinds) or not isfinite(value)
            or value < least):
        raise SpecError(f"{key}={value!r} found, expected a {'whole ' * whole}number, at least "
                        f"{least}")
    return value


def _optimizer(reader):
    """The expression that makes the optimizer."""
    block = reader.block("optimizer")
    kind = block.take("type", "")
    block.take("legacy_fusion")
    params = block.block("params")
    for key in block.left():
        reader.note(f"optimizer.{key}", "UNKNOWN, not translated")
    known, freeze = ONEBIT.get(str(kind).lower(), (None, None))
    if not known and str(kind).lower() not in ("adam", "adamw"):
        reader.note("optimizer", f"{kind or 'none'} found: make your own, as below; mpicomp takes "
                    "any optimizer of torch")
        return "torch.optim.AdamW(model.parameters(), lr=0.001)  # yours"
    betas = params.take("betas", [0.9, 0.999])
    if not (isinstance(betas, (list, tuple)) and len(betas) == 2 and all(
            isinstance(beta, (int, float)) and 0 <= beta < 1 for beta in betas)):
        raise SpecError(f"betas={betas!r} found, expected two numbers, at least 0 and below 1")
    values = [f"lr={_number(params, 'lr', 1e-3)!r}", f"betas=({betas[0]!r}, {betas[1]!r})",
              f"eps={_number(params, 'eps', 1e-8)!r}",
              f"weight_decay={_number(params, 'weight_decay', 0.0)!r}"]
    if known:
        values.append(_freeze(reader, params, known, freeze))
    for key in params.left():
        reader.note(f"optimizer.params.{key}", PARAMS.get(key, "UNKNOWN, not translated"))
    name = "mpicomp.optim.OneBitAdam" if known else "torch.optim.AdamW"
    return f"{name}(\n    model.parameters(), {', '.join(values)})"


def _freeze(reader, params, kind, key):
    """The argument freeze=, and what to say of the optimizer."""
    step = _number(params, key, None, whole=True)
    if step is None:
        reader.note(key, f"is not given, and {FROZEN_AT:,} in DeepSpeed, so a shorter run is never "
                    "compressed; here the variance decides when to freeze")
    elif kind != "OneBitLamb":
        reader.note(key, f"{step}: DeepSpeed's first step changes nothing and counts, so its "
                    f"variance has seen {step - 1} gradients then. A good value is 15-25 % of all "
                    "steps; freeze=\"auto\" lets the variance decide")
    if kind == "ZeroOneAdam":
        reader.note("ZeroOneAdam", "becomes 1-bit Adam: every step is exchanged, first dense, then "
                    "1 bit of the momentum. Its growing intervals between variance updates are "
                    "not translated; for its local steps see mpicomp.LocalUpdates")
    if kind == "OneBitLamb":
        step = None
        reader.note("OneBitLamb", "becomes 1-bit Adam: mpicomp has no LAMB. SEARCH THE LEARNING "
                    "RATE AGAIN, for LAMB multiplies it by a trust ratio for each tensor; "
                    "its freeze_step is not taken over")
    return 'freeze="auto"' if step is None else f"freeze={step}"


def _precision(reader):
    """The context of the forward pass."""
    blocks = [reader.block(key) for key in ("fp16", "bf16", "bfloat16")]  # the last is older
    half, on = blocks[0], [bool(block.take("enabled", False)) for block in blocks]
    if on[0]:
        others = half.left()
        reader.note("fp16", "is translated as bfloat16, which needs no loss scale"
                    + (f", so {', '.join(others)} have no counterpart" if others else "")
                    + ". Weights stay float32. For float16 with a GradScaler see docs/step.md")
    elif any(on):
        reader.note("bf16", "weights stay float32; autocast computes in bfloat16")
    return "torch.autocast(x.device.type, torch.bfloat16)" if any(on) else None


def _batches(reader, ranks):
    """(the expression for backward passes in a step, in words how large a batch is, None or
    an expression that must be 0 when the program runs)."""
    total = _number(reader, "train_batch_size", None, whole=True)
    micro = _number(reader, "train_micro_batch_size_per_gpu", None, whole=True)
    passes = _number(reader, "gradient_accumulation_steps", None, whole=True)
    least = (micro or 1) * (passes or 1)
    if total and not ranks and total % least:
        raise SpecError(f"train_batch_size={total} found, expected a multiple of {least}: micro "
                        f"batch {micro or 'any'} x accumulation {passes or 'any'}")
    if total and ranks:
        known = (passes or 1) * (micro or 1) * ranks
        if total % known or (passes and micro and total != known):
            raise SpecError(f"train_batch_size={total} found, expected a multiple of {known}: "
                            f"micro batch {micro or 'any'} x accumulation {passes or 'any'} x "
                            f"{ranks} ranks; with both given, exactly that")
        passes = passes or (total // known if micro else 1)
        micro = total // (passes * ranks)
    elif total and micro and passes is None:
        reader.note("train_batch_size", f"{total} examples a step on all ranks together, "
                    f"{micro} in a micro batch: the number of ranks decides how many are added up")
        shares = f"({micro} * optimizer.reducer.comm.size)"
        return f"{total} // {shares}", f"batches of {micro}", f"{total} % {shares}"
    if total and not ranks:
        share = f" of {micro} x {passes}" if micro and passes else ""
        reader.note("train_batch_size", f"{total} examples a step on all ranks together{share}: "
                    + (f"start {total // least} ranks" if micro and passes else
                       "give each rank its share, or type --ranks"))
    return passes or 1, f"batches of {micro}" if micro else "batches", None


def _zero(reader):
    """Say what becomes of ZeRO."""
    stage = reader.block("zero_optimization").take("stage", 0)
    if stage:
        reader.note("zero_optimization", f"stage {stage}: mpicomp has no ZeRO; every rank holds "
                    "all weights and the whole optimizer state. DeepSpeed itself refuses ZeRO with "
                    "its 1-bit optimizers")


def _method(reader, made):
    """The method of the exchange."""
    kind = reader.take("communication_data_type")
    if made.startswith("mpicomp.optim"):
        if kind:
            reader.note("communication_data_type", f"{kind}: the momentum travels as 1 bit; before "
                        "the freeze gradients travel as float32")
        return "onebit"
    known = {"fp16": "fp16", "fp32": "dense", "bfp16": "bf16", "bf16": "bf16", None: "dense"}
    if kind not in known:
        raise SpecError(f"communication_data_type={kind!r} found, expected fp16, fp32 or bfp16")
    return known[kind]


def _loop(passes, check, precision, clip):
    """The training loop; where `check` is an expression, it must be 0."""
    forward = f"with {precision}:\n" if precision else ""
    several = passes != 1
    loss = "loss = loss_fn(model(x), y)" + " / accumulation" * several
    lines, body = [], []
    if check:
        lines += [f"if {check}:", '    raise SystemExit("ranks do not divide train_batch_size / '
                                  'micro batch: start another number")']
    if several:
        lines += [f"accumulation = {passes}  # backward passes in a step",
                  "number = 0  # of batches so far; it goes on through all epochs"]
        body += ["number += 1", "last = number % accumulation == 0"]
    lines.append("for x, y in loader:  # once an epoch" if several else "for x, y in loader:")
    body += [forward.strip(), f"    {loss}"] if forward else [loss]
    if several:
        body += ["with contextlib.nullcontext() if last else optimizer.reducer.no_sync():",
                 "    loss.backward()", "if not last:", "    continue"]
    else:
        body += ["loss.backward()"]
    if clip:
        body += [f"mpicomp.clip_grad_norm_(optimizer, {clip!r})"]
    body += ["optimizer.step()", "optimizer.zero_grad()"]
    return "\n".join(lines + ["    " + line for line in body]) + "\n"
