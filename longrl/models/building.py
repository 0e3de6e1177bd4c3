"""From a folder of weights to a model and back: build, load, save, export."""

from __future__ import annotations

import abc
import contextlib
import copy
import logging
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from longrl.io.hub_errors import hub_errors
from longrl.io.weight_folder import check_weight_files
from longrl.models.grouped_experts import choose_experts
from longrl.models.lora import LoRASettings
from longrl.models.pretrained_folder import PretrainedFolder
from longrl.models.remote_code import copy_named_code
from longrl.types import Dtype

logger = logging.getLogger(__name__)

OWN_WEIGHTS = "<own>"
"""`build`'s default: the weights that the family itself names."""


class BuildsModel(PretrainedFolder):
    """How do weights become a model, and a trained model a folder that others load?"""

    text_part: ClassVar[str] = ""
    """Folder of the text model within an exported folder, where generation config and tokenizer are."""
    ignored_weight_prefixes: ClassVar[tuple[str, ...]] = ()
    """How the names of weights begin that a released folder holds for other models beside this one."""

    dtype: Dtype
    random_init: bool
    init_seed: int
    init_device: str | None
    gradient_checkpointing: bool
    lora: LoRASettings | None

    @abc.abstractmethod
    def auto_class(self) -> Any:
        """The transformers Auto class that builds the model."""

    def attn_implementation(self) -> str | dict[str, str]:
        """Attention implementation per sub-config: packed groups in the text stack, the model's own elsewhere."""
        from longrl.packing.attention import ATTENTION_NAME

        return ATTENTION_NAME

    def build(self, weights: str | None = OWN_WEIGHTS) -> Any:
        """The model in training precision, without adapters; on the CPU, random weights where `init_device` says.

        Args:
            weights: a Hugging Face folder or hub id; None for random weights; by default what the family names.

        Raises:
            ValueError: `weights` holds another model than the family describes.
        """
        source = weights
        if weights == OWN_WEIGHTS:
            source = None if self.random_init else self._existing_path()
        options = {"attn_implementation": self.attn_implementation(), "dtype": getattr(torch, self.dtype)}
        if source is None:
            config = copy.deepcopy(self.config)  # the model keeps it and sets its attention in it
            with self._seeded_place():
                model = self.auto_class().from_config(config, **options)
        else:
            logger.info("loading weights of %s", source)
            check_weight_files(source)
            self._check_same_architecture(source)
            with hub_errors(source):
                model = self.load_weights(source, **options)
        choose_experts(model)
        if self.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return model

    @contextlib.contextmanager
    def _seeded_place(self) -> Iterator[None]:
        """Where and from which seed random weights are made; the trainer's own random state stays."""
        is_placed = torch.get_default_device().type != "cpu"  # by `plan`, which builds without a byte
        place = None if is_placed or self.init_device is None else torch.device(self.init_device)
        on_cuda = place is not None and place.type == "cuda"
        with torch.random.fork_rng(devices=[place] if on_cuda else []), place or contextlib.nullcontext():
            torch.manual_seed(self.init_seed)
            yield

    def _check_same_architecture(self, source: str) -> None:
        """Raises ValueError before any weight is read if `source` holds a model of other sizes."""
        theirs = self.read_config(source).get_text_config()
        ours = self.config.get_text_config()
        for name in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size"):
            got, expected = getattr(theirs, name, None), getattr(ours, name, None)
            if got != expected:
                raise ValueError(
                    f"{source!r} holds another model than model.family describes: {name} is {got} instead of "
                    f"{expected}; use the family the weights were made with"
                )

    def load_weights(self, source: str, **options: Any) -> Any:
        """The model with the weights of a folder or hub id, all of them and nothing else.

        Raises:
            ValueError: names or shapes are not the model's.
        """
        model, info = self.auto_class().from_pretrained(
            source, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
        ours = [key for key in info["unexpected_keys"] if not key.startswith(self.ignored_weight_prefixes)]
        check_loaded(source, **{**info, "unexpected_keys": ours})
        return model

    def save_weights(self, model: Any, folder: str | Path) -> None:
        """Writes weights and config, with names and layout of the released files."""
        model.save_pretrained(folder)

    def save_processing(self, folder: str | Path) -> None:
        """Writes what turns text and media into model inputs, beside exported weights."""
        self.tokenizer.save_pretrained(folder)

    def export(self, model: nn.Module, folder: Path) -> None:
        """Writes weights, configs, tokenizer and processor, and the code that these name."""
        self.save_weights(model, folder)
        self.save_processing(folder)
        # The folders' own in place of what transformers makes up for a model that is built from a checkpoint.
        self._copy_generation_config(folder / self.text_part)
        copy_named_code(self._existing_path(), folder)

    def _copy_generation_config(self, folder: Path) -> None:
        """Copies the model's own generation_config.json, if it has one: the end tokens and sampling it was made for."""
        from transformers.utils import cached_file

        options = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
        found = cached_file(self.text_folder(), "generation_config.json", **options)
        if found is not None:
            shutil.copyfile(found, folder / "generation_config.json")


def check_loaded(
    folder: str | Path,
    missing_keys: Iterable[str],
    unexpected_keys: Iterable[str],
    mismatched_keys: Iterable[tuple[str, Any, Any]],
    **other: Any,
) -> None:
    """Raises ValueError with the first names that a folder lacks or has too many, or whose shapes differ.

    transformers fills what is missing with random numbers.

    Args:
        folder: what was read, or its hub id.
        missing_keys: as `from_pretrained(..., output_loading_info=True)` of transformers tells them.
        unexpected_keys: the same.
        mismatched_keys: (name, shape in the folder, shape of the model).
        other: what else it tells.
    """
    problems = [f"{key} is missing" for key in missing_keys] + [f"{key} is unknown" for key in unexpected_keys]
    problems += [f"{key} is {list(got)} instead of {list(want)}" for key, got, want in mismatched_keys]
    if problems:
        raise ValueError(
            f"{folder} does not hold the weights its config.json describes: {'; '.join(sorted(problems)[:5])} "
            f"({len(problems)} differences); fetch the folder again, or correct its config.json"
        )
