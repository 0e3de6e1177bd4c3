"""`PretrainedFolder`: config and tokenizer of a Hugging Face folder or hub id."""

from __future__ import annotations

import abc
import functools
from pathlib import Path
from typing import Any, ClassVar

from longrl.io.hub_errors import hub_errors
from longrl.io.old_hooks import OLD_HOOKS, RefusesOldHooks
from longrl.io.weight_folder import FETCH_AGAIN, read_json_object
from longrl.models.model_types import check_model_type


class PretrainedFolder(RefusesOldHooks, abc.ABC):
    """Which config and tokenizer does the folder or hub id hold?"""

    _old_hooks = OLD_HOOKS["family"]
    model_types: ClassVar[tuple[str, ...]] = ()
    """`model_type` of the configs it reads; others are refused as soon as the config is. Empty for any."""
    model_path: str
    """The folder or hub id."""
    chat_template_file: str | None = None
    """File of the chat template; None is the folder's own."""

    def __getstate__(self) -> dict[str, Any]:
        """Fields without what a loader worker reads for itself."""
        cached = {"config", "tokenizer", "processor", "chat", "end_token_ids"}
        return {name: value for name, value in self.__dict__.items() if name not in cached}

    @functools.cached_property
    def config(self) -> Any:
        """The model's transformers config.

        Raises:
            ValueError: it is of a type that is not in `model_types`.
        """
        config = self.read_config(self._existing_path())
        check_model_type(self, config)
        return config

    def read_config(self, source: str | Path) -> Any:
        """The config of a folder or hub id."""
        from transformers import AutoConfig

        file = Path(source, "config.json")
        if not file.is_file():
            with hub_errors(source):
                return AutoConfig.from_pretrained(source)
        read_json_object(file)
        try:
            return AutoConfig.from_pretrained(source)
        except Exception as error:  # whatever foreign values lead to in the config's class
            said = str(error).strip().partition("\n")[0][:300] or type(error).__name__
            raise ValueError(f"{file} describes no model that transformers knows ({said}); {FETCH_AGAIN}") from error

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The model's transformers tokenizer, with the chat template of the option if there is one."""
        tokenizer = self.read_tokenizer()
        if self.chat_template_file is not None:
            tokenizer.chat_template = read_template(self.chat_template_file)
        return tokenizer

    def read_tokenizer(self) -> Any:
        """The tokenizer of the folder or hub id, with its chat template."""
        from transformers import AutoTokenizer

        with hub_errors(self.model_path):
            return AutoTokenizer.from_pretrained(self.text_folder())

    def load_processing(self) -> None:
        """Loads what `render` needs, before workers start: forked ones have it, and others load none of their own."""
        _ = self.tokenizer

    def text_folder(self) -> str:
        """Folder or hub id of the text model alone: its config and tokenizer, and what an engine loads."""
        return self._existing_path()

    def _existing_path(self) -> str:
        """The folder or hub id; a string that looks like a path must exist, so that a typo never asks the hub."""
        path = Path(self.model_path).expanduser()
        if is_local(self.model_path) and not (path / "config.json").is_file():
            raise ValueError(
                f"model.family's model={self.model_path!r} is no folder with a config.json; give an exported Hugging "
                "Face folder or a hub id such as Qwen/Qwen2.5-VL-7B-Instruct"
            )
        return str(path) if path.exists() else self.model_path


def is_local(source: str) -> bool:
    """True if `source` is meant as a path: `owner/name` asks the hub, unless `owner` is a folder here (`runs/sft`)."""
    return source.startswith((".", "/", "~")) or source.count("/") != 1 or Path(source).parent.is_dir()


def read_template(path: str) -> str:
    """The chat template in a file.

    Raises:
        ValueError: there is none.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(
            f"model.family.init_args.chat_template_file must be a file with a Jinja template, got {path!r}; correct "
            "the path"
        )
    return file.read_text(encoding="utf-8")
