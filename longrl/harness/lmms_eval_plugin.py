"""What lmms-eval finds of longrl: the entry point `lmms_eval.models` of pyproject.toml names `manifest`."""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """The `ModelManifest` of `--model longrl`; loads nothing of the model."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("longrl", chat_class_path="longrl.harness.lmms_eval_model.LongRL")
