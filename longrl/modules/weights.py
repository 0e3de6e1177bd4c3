"""Initial weights of a run: from a Lightning checkpoint, an exported folder or the hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from longrl.models.base import CausalFamily, is_local

MODEL_PREFIX = "model."
"""Where a PolicyModule keeps its model in a checkpoint."""


def build_from(family: CausalFamily, source: str | None) -> nn.Module:
    """The family's model with the weights of `source`.

    Args:
        family: describes the model.
        source: None for the family's own weights; a Lightning checkpoint, or a run's folder with
            `checkpoints/last.ckpt`; a folder with Hugging Face weights; a hub id.

    Raises:
        ValueError: `source` does not exist, or holds another model.
    """
    if source is None:
        return family.build()
    checkpoint = find_checkpoint(source)
    if checkpoint is None:
        return family.build(weights=source)
    model = family.build(weights=None)
    load_checkpoint_weights(model, checkpoint)
    return model


def find_checkpoint(source: str) -> Path | None:
    """The Lightning checkpoint `source` names, or None if it is a Hugging Face folder or hub id.

    Raises:
        ValueError: `source` is a path where nothing is, or a folder with neither.
    """
    path = Path(source).expanduser()
    if not path.exists() and (is_local(source) or path.suffix == ".ckpt"):
        raise ValueError(
            f"model.init_from={source!r} does not exist; give a checkpoint file, a run's folder, an exported folder or "
            "a hub id"
        )
    if path.is_file() or path.suffix == ".ckpt":
        return path
    last = path / "checkpoints" / "last.ckpt"
    if last.exists():
        return last
    if path.is_dir() and not (path / "config.json").exists():
        raise ValueError(
            f"model.init_from={source!r} holds neither checkpoints/last.ckpt (a run) nor config.json (an export); "
            "give a checkpoint file, a run's folder, an exported folder or a hub id"
        )
    return None


def load_checkpoint_weights(model: nn.Module, checkpoint: Path) -> None:
    """Loads a Lightning checkpoint's weights, all of them and nothing else."""
    if checkpoint.is_dir():
        _load_shards(model, checkpoint)
        return
    saved = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
    state = {name.removeprefix(MODEL_PREFIX): value for name, value in saved.items() if name.startswith(MODEL_PREFIX)}
    check_same_model(model.state_dict(), state, str(checkpoint))
    model.load_state_dict(state)


def _load_shards(model: nn.Module, folder: Path) -> None:
    """Loads what the ranks of a run saved, however many they were; each process that asks reads all of it."""
    from torch.distributed.checkpoint import FileSystemReader, load

    reader = FileSystemReader(folder)
    prefix = f"state_dict.{MODEL_PREFIX}"
    found = {
        name.removeprefix(prefix): torch.empty(entry.size, device="meta")
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if name.startswith(prefix)
    }
    state = model.state_dict()
    check_same_model(state, found, str(folder))
    wanted = {"state_dict": {MODEL_PREFIX + name: value for name, value in state.items()}}
    load(wanted, storage_reader=reader, no_dist=True)
    model.load_state_dict(state)


def check_same_model(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor], source: str) -> None:
    """Raises ValueError if names or shapes differ, with the first few that do."""
    problems = [f"{name} is missing" for name in wanted.keys() - found.keys()]
    problems += [f"{name} is unknown" for name in found.keys() - wanted.keys()]
    problems += [
        f"{name} is {list(found[name].shape)} instead of {list(wanted[name].shape)}"
        for name in wanted.keys() & found.keys()
        if found[name].shape != wanted[name].shape
    ]
    if problems:
        raise ValueError(
            f"model.init_from={source!r} holds another model than model.family describes: "
            f"{'; '.join(sorted(problems)[:5])} ({len(problems)} differences); use the family it was made with"
        )
