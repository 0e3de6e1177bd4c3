"""`ProcessorFamily`: what image-text models of transformers have in common, whose folders hold a processor."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from typing_extensions import override

from longrl.io.hub_errors import hub_errors
from longrl.models.base import CausalFamily


class ProcessorFamily(CausalFamily):
    """A model that `AutoModelForImageTextToText` builds, read and written with its own processor."""

    @override
    def auto_class(self) -> Any:
        from transformers import AutoModelForImageTextToText

        return AutoModelForImageTextToText

    @override
    def backbone(self, model: Any) -> Any:
        return model.model.language_model

    @functools.cached_property
    def processor(self) -> Any:
        """The model's own image and video processors."""
        from transformers import AutoProcessor

        with hub_errors(self.model_path):
            return AutoProcessor.from_pretrained(self._existing_path())

    @override
    def read_tokenizer(self) -> Any:
        """The folder's, with the processor's chat template where the tokenizer's own files have none."""
        tokenizer = super().read_tokenizer()
        if tokenizer.chat_template is None:
            tokenizer.chat_template = self.processor.chat_template
        return tokenizer

    @override
    def load_processing(self) -> None:
        super().load_processing()
        _ = self.processor

    @override
    def save_processing(self, folder: str | Path) -> None:
        self.processor.save_pretrained(folder)
        if self.chat_template_file is not None:
            self.tokenizer.save_pretrained(folder)
