"""Initial weights of a run: from a Lightning checkpoint, an exported folder or the hub."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from longrl.io.checkpoint_files import META, check_files, load_file, load_shards, load_state, read_metadata
from longrl.io.hub_errors import naming_option
from longrl.models.base import CausalFamily
from longrl.models.building import OWN_WEIGHTS
from longrl.models.chunked_mlp import chunk_mlps
from longrl.models.compiled_layers import compile_layers
from longrl.models.ema import averages_by_weight
from longrl.models.lora import (
    OPTION,
    LoRASettings,
    add_adapters,
    from_checkpoint,
    is_adapter,
    merged_weights,
    plain_name,
)
from longrl.models.pretrained_folder import is_local
from longrl.strategies.axis import world_axis
from longrl.strategies.shards import check_by_ranks

logger = logging.getLogger(__name__)

EXPORTED = ("config.json", "model_index.json")
"""Files by which a folder of transformers or of a diffusers pipeline is known."""
MODEL_PREFIX = "model."
"""Where a PolicyModule keeps its model in a checkpoint."""
INIT_FROM = "model.init_from"
"""The option of a training run that names its initial weights."""
SIGNAL_CHECKPOINT = re.compile(r"hpc_ckpt_(\d+)\.ckpt")
"""Lightning's name of a checkpoint that it writes into a run's folder when SLURM sends a signal."""


class BuildableFamily(Protocol):
    """A family of language or of diffusion models: it builds one from weights that it can read."""

    def build(self, weights: str | None = OWN_WEIGHTS) -> nn.Module:
        """See `longrl.models.building.BuildsModel.build`."""


def build_from(family: CausalFamily, source: str | None) -> nn.Module:
    """The policy's model: that of `plain_from`, with the adapters, chunked MLPs and compiled layers of the family."""
    model = plain_from(family, source)
    if family.lora is not None:
        model = add_adapters(family, model)
    return compile_layers(family, chunk_mlps(family, model))


def plain_from(
    family: BuildableFamily,
    source: str | None,
    option: str = INIT_FROM,
    averaged: bool = False,
) -> nn.Module:
    """The family's model with the weights of `source`, without adapters.

    Adapters of `source` are merged into its weights. So a run always begins at its source's policy, with adapters, if
    it has any, that add nothing yet: switched off, they leave the policy it began with.

    Args:
        family: describes the model.
        source: None for the family's own weights; a Lightning checkpoint, or a run's folder with
            `checkpoints/last.ckpt` or else a signal's checkpoint; a folder with Hugging Face weights; a hub id.
        option: what the user calls `source`, for errors.
        averaged: take the moving averages of trained weights where a checkpoint has them.

    In a run of several ranks all of them must call it.

    Raises:
        ValueError: `source` does not exist, or holds another model.
    """
    if source is None:
        return family.build()
    checkpoint = find_checkpoint(source, option)
    if checkpoint is None:
        with naming_option(option):
            return family.build(weights=source)
    logger.info("loading weights of %s", checkpoint)
    check_by_ranks(checkpoint, world_axis())
    model = family.build(weights=None)
    load_checkpoint_weights(model, checkpoint, option, averaged)
    return model


def find_checkpoint(source: str, option: str = INIT_FROM) -> Path | None:
    """The Lightning checkpoint `source` names, or None if it is a Hugging Face folder or hub id.

    Args:
        source: as of `plain_from`.
        option: what the user calls it, for errors.

    Raises:
        ValueError: `source` is a path where nothing is, or a folder with neither.
    """
    path = Path(source).expanduser()
    if not path.exists() and (is_local(source) or path.suffix == ".ckpt"):
        raise ValueError(
            f"{option}={source!r} does not exist; give a checkpoint file, a run's folder, an exported folder or "
            "a hub id"
        )
    if path.is_file() or path.suffix == ".ckpt":
        return path
    last = path / "checkpoints" / "last.ckpt"
    if last.exists():
        return last
    if path.is_dir() and not any((path / name).exists() for name in EXPORTED):
        saved = saved_checkpoints(path)
        if saved and SIGNAL_CHECKPOINT.fullmatch(saved[0].name):
            logger.warning("%s=%s has no last.ckpt; %s is used, which a signal left", option, source, saved[0])
            return saved[0]
        others = f"; it has {', '.join(map(str, saved[:3]))}, one of which may be named" if saved else ""
        raise ValueError(
            f"{option}={source!r} holds neither checkpoints/last.ckpt (a run) nor config.json (an export); "
            f"give a checkpoint file, a run's folder, an exported folder or a hub id{others}"
        )
    return None


def saved_checkpoints(run: Path) -> list[Path]:
    """The checkpoints in a run's folder, the one to go on with first: last.ckpt, a signal's last one, any other."""
    last = run / "checkpoints" / "last.ckpt"
    numbered = []
    for path in run.glob("*.ckpt"):
        match = SIGNAL_CHECKPOINT.fullmatch(path.name)
        if match:
            number = int(match[1])
            numbered.append((number, path))
    numbered.sort(reverse=True)
    of_signals = [path for _, path in numbered]
    others = sorted(path for path in run.glob("checkpoints/*.ckpt") if path != last)
    # While it is replaced, a checkpoint has another name for a moment.
    is_there = last.exists() or last.with_name(f".{last.name}.before").exists()
    return [*([last] if is_there else []), *of_signals, *others]


def load_checkpoint_weights(
    model: nn.Module, checkpoint: Path, option: str = INIT_FROM, averaged: bool = False
) -> None:
    """Loads a Lightning checkpoint's weights, all of them and nothing else, its adapters merged."""
    state = model.state_dict()
    saved = saved_weights(checkpoint, averaged)
    plain: dict[str, Tensor] = {}
    targets: dict[str, Tensor] = {}
    for name, value in saved.items():
        if is_adapter(name):
            targets[name] = torch.empty(value.shape)
        else:
            plain[plain_name(name)] = value
    check_same_model(state, plain, str(checkpoint), option)
    if checkpoint.is_dir():
        # Shards are read into the model, and adapters beside it; each process that asks reads all of them.
        for name in saved.keys() - targets.keys():
            targets[name] = state[plain_name(name)]
        fill_from_shards(checkpoint, targets, averaged)
        saved = targets
    for name, value in merged_weights(saved, saved_lora(checkpoint), torch.float32):  # rounded once, as it is copied
        state[name].copy_(value)


def read_adapters(source: str, option: str = INIT_FROM, averaged: bool = False) -> dict[str, Tensor]:
    """The adapters in the Lightning checkpoint that `source` names, under their names in the model.

    Raises:
        ValueError: it names none, or one without adapters.
    """
    checkpoint = find_checkpoint(source, option)
    saved = {}
    if checkpoint is not None:
        check_files(checkpoint)
        saved = saved_weights(checkpoint, averaged)
    adapters = {name: value for name, value in saved.items() if is_adapter(name)}
    if checkpoint is None or not adapters:
        raise ValueError(
            f"{option}={source!r} holds no LoRA adapters; name a run with {OPTION}, or one of its checkpoints"
        )
    if checkpoint.is_dir():
        adapters = {name: torch.empty(value.shape) for name, value in adapters.items()}
        fill_from_shards(checkpoint, adapters, averaged)
    return {name: value.clone() for name, value in adapters.items()}


def saved_weights(checkpoint: Path, averaged: bool = False) -> dict[str, Tensor]:
    """Names and weights of the model in a checkpoint; of a sharded one, empty tensors of their shapes.

    Args:
        checkpoint: a file, or a folder of shards.
        averaged: take the moving averages of those that have one.
    """
    saved = _saved_shapes(checkpoint) if checkpoint.is_dir() else load_state(checkpoint)["state_dict"]
    weights = _of_model(saved)
    if averaged:
        for name, average in averages_by_weight(saved).items():
            weights[name] = saved[average]
    return weights


def saved_step(checkpoint: Path) -> int | None:
    """Optimizer steps that a checkpoint was saved behind; None where it does not say so."""
    file = checkpoint / META if checkpoint.is_dir() else checkpoint
    step = load_file(file).get("global_step") if file.is_file() else None
    return int(step) if isinstance(step, int) else None


def fill_from_shards(folder: Path, targets: Mapping[str, Tensor], averaged: bool = False) -> None:
    """Fills `targets` with what the ranks of a run saved, however many they were; `averaged` as in `saved_weights`."""
    averages: dict[str, str] = {}
    if averaged:
        shapes = _saved_shapes(folder)
        averages = averages_by_weight(shapes)
    state = {}
    for name, value in targets.items():
        saved_name = averages.get(name, MODEL_PREFIX + name)
        state[saved_name] = value
    load_shards({"state_dict": state}, folder, alone=True)


def _saved_shapes(folder: Path) -> dict[str, Tensor]:
    """Empty tensors by the names that they have in a sharded checkpoint's state."""
    prefix = "state_dict."
    shapes = {}
    metadata = read_metadata(folder)
    for name, entry in metadata.state_dict_metadata.items():
        if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata):
            shapes[name.removeprefix(prefix)] = torch.empty(entry.size, device="meta")
    return shapes


def saved_lora(checkpoint: Path) -> LoRASettings | None:
    """The settings of a checkpoint's adapters, None if it has none."""
    return from_checkpoint(load_file(checkpoint / META if checkpoint.is_dir() else checkpoint))


def check_same_model(
    expected: Mapping[str, Tensor],
    saved: Mapping[str, Tensor],
    source: str,
    option: str = INIT_FROM,
) -> None:
    """Raises ValueError if names or shapes differ, with the first few that do."""
    problems = [f"{name} is missing" for name in expected.keys() - saved.keys()]
    problems += [f"{name} is unknown" for name in saved.keys() - expected.keys()]
    for name in expected.keys() & saved.keys():
        shape = list(saved[name].shape)
        expected_shape = list(expected[name].shape)
        if shape != expected_shape:
            problems.append(f"{name} is {shape} instead of {expected_shape}")
    if problems:
        raise ValueError(
            f"{option}={source!r} holds another model than the family describes: "
            f"{'; '.join(sorted(problems)[:5])} ({len(problems)} differences); use the family it was made with"
        )


def check_resumed_weights(state: Mapping[str, Tensor], checkpoint: Mapping[str, Any], path: str) -> None:
    """Raises ValueError if a checkpoint of one file has another model than the module that goes on with it.

    Args:
        state: the module's.
        checkpoint: Lightning's; of shards it has no weights, and the strategy compares them.
        path: of the checkpoint.
    """
    saved = checkpoint.get("state_dict")
    if saved is None:
        return
    ours = _of_model(state)
    theirs = _of_model(saved)
    check_same_model(ours, theirs, path, "--ckpt_path")


def _of_model(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    weights = {}
    for name, value in state.items():
        if name.startswith(MODEL_PREFIX):
            weights[name.removeprefix(MODEL_PREFIX)] = value
    return weights
