"""A DeepSpeed checkpoint's weights and moments, by parameter name, for torch.optim.AdamW."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch

from mpicomp.compat.deepspeed.config import FROZEN_AT, ONEBIT
from mpicomp.errors import CheckpointError

UPDATES_BETWEEN = 16  # var_update_scaler's default: variance updates until their interval doubles


def adamw_state(checkpoint: Mapping[str, Any],
                groups: Sequence[Sequence[str]] | None = None
                ) -> tuple[dict[str, Any], list[str]]:
    """The moments and weights of a DeepSpeed checkpoint, by parameter name, and notes on them.

    checkpoint  what torch.load(".../mp_rank_00_model_states.pt", weights_only=True) gives
    groups      names, or patterns such as "*.bias", of the parameters of each group of the
                optimizer, in its order; the first pattern that fits counts, and what fits none
                was frozen. None: one group of all

    Returns ({"model": state_dict, "optimizer": state_dict of torch.optim.AdamW}, notes). A state's
    "params" are names; torch's load_state_dict goes by their order, which is that of the model's
    parameters in each group. Weights are the float32 ones where the file has them, tied ones
    under each of their names. `step` is the
    number of gradients that the variance has seen, so that AdamW's bias correction is right.
    Errors of the compression are left out, as DeepSpeed does when it loads.

    Raises CheckpointError where the file does not hold what DeepSpeed's sources say.
    """
    notes = _origin(checkpoint)
    names = _parameters(checkpoint)
    found = checkpoint["optimizer"]
    flat, inner = found.get("fp32_groups_flat"), found.get("optimizer_state_dict", found)
    groups = _members(inner, names, groups, notes)
    if flat is not None:
        state = _split(inner, flat, groups)
    else:
        state = _whole(inner, groups)
    model = dict(checkpoint["module"])
    masters = found.get("fp32_groups")
    for number, group in enumerate(groups):
        if flat is not None:
            model |= dict(zip(group, _pieces(flat[number], group.values())))
        elif masters is not None:
            model |= dict(zip(group, masters[number]))
    model |= {name: model[first] for name, first in _shared(checkpoint, names).items()}
    for name in state:
        state[name]["step"] = torch.tensor(float(_seen(checkpoint, state[name]["step"], notes)))
    defaults = torch.optim.AdamW([torch.nn.Parameter(torch.empty(0))]).defaults
    param_groups = [
        {**defaults, **{key: _plain(saved[key]) for key in ("lr", "betas", "eps", "weight_decay")
                        if key in saved},
         "params": list(group)} for saved, group in zip(inner["param_groups"], groups)]
    return {"model": model, "optimizer": {"state": state, "param_groups": param_groups}}, notes


def _origin(checkpoint):
    """Notes on where a checkpoint comes from. CheckpointError for one that cannot be read."""
    if not isinstance(checkpoint, Mapping) or "module" not in checkpoint:
        raise CheckpointError("no DeepSpeed checkpoint: expected the keys module and optimizer, as "
                              "in TAG/mp_rank_00_model_states.pt")
    if not isinstance(checkpoint.get("optimizer"), Mapping):
        raise CheckpointError(
            "this checkpoint has no optimizer state: with ZeRO it lies in other files (*_optim_"
            "states.pt), which are not read. DeepSpeed's 1-bit optimizers do not run with ZeRO; "
            "take the weights by its zero_to_fp32.py")
    if checkpoint.get("mp_world_size", 1) != 1:
        raise CheckpointError(f"mp_world_size={checkpoint['mp_world_size']} found, expected 1: "
                              "this file holds one part of each tensor")
    return [f"written by DeepSpeed {checkpoint.get('ds_version', '(no version)')} on "
            f"{checkpoint.get('dp_world_size', 'an unknown number of')} ranks after "
            f"{checkpoint.get('global_steps', 'unknown')} steps"]


def _parameters(checkpoint):
    """{name: tensor} of the module's parameters, in order: no buffers, shared ones once."""
    buffers, seen, names = set(checkpoint.get("buffer_names") or ()), set(), {}
    frozen = set(checkpoint.get("frozen_param_shapes") or ())
    for name, tensor in checkpoint["module"].items():
        if not isinstance(tensor, torch.Tensor) or name in buffers | frozen:
            continue
        where = _where(name, tensor)
        if where not in seen:
            seen.add(where)
            names[name] = tensor
    return names


def _where(name, tensor):
    """What tensors that are one have in common."""
    return (tensor.data_ptr(), tensor.shape) if tensor.numel() else name


def _shared(checkpoint, names):
    """{other name: name} of parameters that are tied to one of `names`."""
    first = {_where(name, tensor): name for name, tensor in names.items()}
    places = {name: first.get(_where(name, tensor)) for name, tensor in checkpoint["module"].items()
              if isinstance(tensor, torch.Tensor) and name not in names}
    return {name: place for name, place in places.items() if place}


def _members(inner, names, groups, notes):
    """[{name: tensor}] for each group of the optimizer."""
    if not isinstance(inner.get("state"), Mapping) or "param_groups" not in inner:
        raise CheckpointError("the optimizer's state has no state and param_groups: found "
                              + ", ".join(map(str, inner)))
    count = len(inner["param_groups"])
    if groups is None and count > 1:
        raise CheckpointError(
            f"the optimizer has {count} groups, and the file does not say which parameter is in "
            "which: type  --groups GROUPS.json  with a list of patterns for each, in its order, "
            'such as [["*.weight"], ["*.bias", "*norm*"]]')
    groups = groups if groups is not None else [["*"]]
    if len(groups) != count:
        raise CheckpointError(f"{len(groups)} groups given, expected {count}")
    members = [{} for _ in groups]
    for name, tensor in names.items():
        home = [n for n, patterns in enumerate(groups)
                if any(fnmatchcase(name, pattern) for pattern in patterns)]
        if home:
            members[home[0]][name] = tensor
        else:
            notes.append(f"{name} is in no group, so it is taken for frozen")
    return members


def _pieces(flat, tensors):
    """A flat array cut into the shapes of tensors, in order."""
    sizes = [tensor.numel() for tensor in tensors]
    if flat.numel() != sum(sizes):
        raise CheckpointError(f"a group of {flat.numel()} elements found, expected {sum(sizes)}, "
                              "the sum of its parameters: the groups, or frozen parameters, are "
                              "others than in the run that wrote it")
    return [part.clone().view(tensor.shape) for part, tensor in zip(flat.split(sizes), tensors)]


def _split(inner, flat, groups):
    """{name: moments} where each group of the optimizer is one flat tensor (fp16, bf16)."""
    if len(flat) != len(groups):
        raise CheckpointError(f"{len(flat)} flat groups found, expected {len(groups)}")
    state = {}
    for saved, group in zip(inner["param_groups"], groups):
        theirs = _moments(inner, saved["params"][0])
        parts = [_pieces(theirs[key].reshape(-1), group.values())
                 for key in ("exp_avg", "exp_avg_sq")]
        state |= {name: {"step": theirs["step"], "exp_avg": m, "exp_avg_sq": v}
                  for name, m, v in zip(group, *parts)}
    return state


def _whole(inner, groups):
    """{name: moments} where the optimizer has one state for each parameter (float32, LAMB)."""
    state = {}
    for saved, group in zip(inner["param_groups"], groups):
        ids = [one for one in saved["params"] if one in inner["state"]]
        if len(ids) != len(group):
            raise CheckpointError(f"{len(ids)} parameters with a state found in a group, expected "
                                  f"{len(group)}, those of the module: leave frozen ones out by "
                                  "--groups")
        for one, (name, tensor) in zip(ids, group.items()):
            theirs = _moments(inner, one)
            if theirs["exp_avg"].shape != tensor.shape:
                raise CheckpointError(
                    f"exp_avg of shape {list(theirs['exp_avg'].shape)} found for {name!r}, "
                    f"expected {list(tensor.shape)}: the groups are others than in that run")
            state[name] = theirs
    return state


def _moments(inner, number):
    """exp_avg, exp_avg_sq in float32, and step, of one state."""
    theirs = inner["state"].get(number, {})
    if missing := [key for key in ("step", "exp_avg", "exp_avg_sq") if key not in theirs]:
        raise CheckpointError(f"state {number} has no {missing[0]}: it is of another optimizer "
                              f"than Adam or 1-bit Adam (found {', '.join(theirs) or 'nothing'})")
    return {"step": theirs["step"], "exp_avg": theirs["exp_avg"].detach().float(),
            "exp_avg_sq": theirs["exp_avg_sq"].detach().float()}


def _seen(checkpoint, step, notes):
    """How many gradients the variance has seen when DeepSpeed's count is `step`."""
    step = int(step)
    block = _object(_object(checkpoint, "ds_config"), "optimizer")
    kind, params = str(block.get("type", "")).lower(), _object(block, "params")
    if kind not in ONEBIT:
        _say(notes, f"step {step} is taken as it is, for an optimizer of type "
             f"{block.get('type', 'unknown')}")
        return step
    name, key = ONEBIT[kind]
    last = min(step, _steps(params, key, FROZEN_AT) + (kind == "zerooneadam"))
    if kind == "zerooneadam":
        seen = variance_updates(last, _steps(params, "var_update_scaler", UPDATES_BETWEEN))
        _say(notes, "0/1 Adam: weights and momentum are those of rank 0, which between two "
             "exchanges of its local phase are no other rank's")
    else:
        seen = last - 1
    if kind == "onebitlamb":
        _say(notes, "1-bit LAMB: its trust ratios are left out, AdamW has none")
    _say(notes, f"step {step} of {name} becomes {seen}: the gradients that its variance has seen")
    return seen


def _object(found, key):
    """The object under a key of a configuration; {} where there is none."""
    inner = found.get(key)
    return inner if isinstance(inner, Mapping) else {}


def _steps(params, key, default):
    """A number of steps in the optimizer's params."""
    value = params.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(
            f"ds_config: {key}={value!r} found, expected a whole number, at least 1: it tells how "
            "many gradients the variance has seen. Load the checkpoint, type  checkpoint"
            f'["ds_config"]["optimizer"]["params"]["{key}"] = STEPS  and save it by torch.save')
    return value


def _say(notes, text):
    if text not in notes:
        notes.append(text)


def variance_updates(step: int, scaler: int = UPDATES_BETWEEN) -> int:
    """How often DeepSpeed's ZeroOneAdam has updated its variance after so many steps.

    Its first step does nothing. Updates come at multiples of an interval, 1 at first, that doubles
    after every `scaler` updates (zoadam.py of DeepSpeed).
    """
    interval, at, done = 1, 1, 0
    while (at := at + interval) <= step:
        done += 1
        if done % scaler == 0:
            interval *= 2
            at -= at % interval  # the next one is at a multiple
    return done


def _plain(value):
    """An option of a group as torch's AdamW has it."""
    return tuple(value) if isinstance(value, list) else value
