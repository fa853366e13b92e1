"""What `mpicomp migrate` does: the files of DeepSpeed in, text and a file for torch out."""

import json
from os import PathLike
from pathlib import Path

import torch

from mpicomp.compat.deepspeed.checkpoint import adamw_state
from mpicomp.compat.deepspeed.config import translate
from mpicomp.errors import CheckpointError, SpecError


def config_file(path: str | PathLike[str], ranks: int | None = None) -> str:
    """`translate` of a ds_config.json. Raises SpecError where it cannot be read."""
    return translate(_json(path), ranks)


def checkpoint_file(path: str | PathLike[str], output: str | PathLike[str],
                    groups: str | PathLike[str] | None = None) -> list[str]:
    """Write `adamw_state` of a DeepSpeed checkpoint to `output`; returns the notes.

    path    TAG/mp_rank_00_model_states.pt, read by torch.load(weights_only=True)
    output  a new file, written by torch.save: {"model": ..., "optimizer": ...}
    groups  a JSON file, a list of lists of names or patterns, see `adamw_state`

    Raises CheckpointError where it cannot be read, or `output` is there already or cannot be
    written.
    """
    if Path(output).exists():
        raise CheckpointError(f"{output} is there already: type another name after --output")
    if not Path(output).resolve().parent.is_dir():
        raise CheckpointError(f"{output}: the folder {Path(output).parent} is not there: make it, "
                              "or type another name after --output")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from None
    except Exception as error:  # damaged bytes raise of every kind
        said = str(error).splitlines() or [type(error).__name__]
        raise CheckpointError(
            f"{path} cannot be read with weights_only=True, which runs no code of the file ("
            f"{said[0]}): it is damaged, or your script has put objects of "
            "classes of its own into client_state; save it without them") from None
    result, notes = adamw_state(found, None if groups is None else _groups(groups))
    try:
        torch.save(result, output)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{output} cannot be written: {error}") from None
    return notes


def _groups(path):
    """Lists of patterns from a JSON file."""
    groups = _json(path)
    if not (isinstance(groups, list) and all(
            isinstance(one, list) and all(isinstance(name, str) for name in one)
            for one in groups)):
        raise SpecError(f"{path}: expected a list of lists of names or patterns, such as "
                        '[["*.weight"], ["*.bias"]]')
    return groups


def _json(path):
    """What a JSON file holds. SpecError where it cannot be read."""
    try:
        return json.loads(Path(path).read_text())
    except OSError as error:
        raise SpecError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise SpecError(f"{path} is no JSON: {error}") from None
