"""Rewards by a CLIP model from a local folder: CLIPScore, PickScore, and LAION's aesthetic predictor on its embeddings.

Nothing is downloaded. Folders are as `save_pretrained` or a hub download leaves them, with safetensors weights. The
reward of a video is the mean over its frames. Letters: N frames of all samples, D width of the embeddings.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longrl.io.number_ranges import COUNT, check_ranges
from longrl.rewards.batch import BatchReward

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from longrl.types import Row


@dataclass(frozen=True)
class ClipReward(BatchReward["Tensor"]):
    """Base of the rewards of this file: a CLIP model and how it embeds frames and prompts."""

    folder: str
    """The model's files: config.json, model.safetensors, and the processor's files unless `processor` names others."""
    processor: str | None = None
    """Folder of tokenizer and image processor; None is `folder`. PickScore's are those of the model it began from."""
    device: str | None = None
    """None is the rank's GPU if there is one, else the CPU."""
    batch_size: int = 32
    """Frames embedded together."""

    def __post_init__(self) -> None:
        check_ranges(self, f"{type(self).__name__}: ", batch_size=COUNT)

    def prepare(self) -> None:
        """Loads the model.

        Raises:
            ValueError: a folder is not there.
        """
        for folder in filter(None, (self.folder, self.processor)):
            if not Path(folder).expanduser().is_dir():
                raise ValueError(
                    f"{type(self).__name__} reads a CLIP model from a local folder, but {folder!r} is none (working "
                    f"folder: {Path.cwd()}); download the model once and give its folder"
                )
        _ = self._model, self._processor

    def score_all(self, completions: Sequence[Tensor], rows: Sequence[Row]) -> list[float | Exception]:
        """The reward of each sample [F, 3, H, W] uint8 RGB."""
        import torch

        with torch.no_grad():
            frames = [frame for sample in completions for frame in sample]  # each [3, H, W]
            prompts = [row.problem for sample, row in zip(completions, rows, strict=True) for _ in sample]
            values = self.frame_scores(self._image_embeddings(frames), prompts)  # [N]
            parts = values.cpu().split([len(sample) for sample in completions])
        return [float(part.mean()) for part in parts]

    @abstractmethod
    def frame_scores(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """The value [N] of every frame.

        Args:
            images: [N, D] embeddings of length 1.
            prompts: what each frame was made for.
        """

    def text_embeddings(self, prompts: Sequence[str]) -> Tensor:
        """[N, D] of length 1; every distinct prompt is embedded once, longer ones are cut at the model's length."""
        distinct = list(dict.fromkeys(prompts))
        tokens = self._processor(text=distinct, padding=True, truncation=True, return_tensors="pt")
        embeddings = self._model.get_text_features(**tokens.to(self._device)).pooler_output
        return _unit(embeddings)[[distinct.index(prompt) for prompt in prompts]]

    def _image_embeddings(self, frames: Sequence[Tensor]) -> Tensor:
        """[N, D] of length 1."""
        import torch

        embeddings = []
        for start in range(0, len(frames), self.batch_size):
            pixels = self._processor(images=frames[start : start + self.batch_size], return_tensors="pt")
            embeddings.append(self._model.get_image_features(**pixels.to(self._device)).pooler_output)
        return _unit(torch.cat(embeddings))

    @cached_property
    def _device(self) -> torch.device:
        import torch

        return torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))

    @cached_property
    def _model(self) -> Any:
        from transformers import CLIPModel

        folder = Path(self.folder).expanduser()
        model = CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        return model.eval().requires_grad_(False).to(self._device)

    @cached_property
    def _processor(self) -> Any:
        from transformers import CLIPProcessor

        return CLIPProcessor.from_pretrained(Path(self.processor or self.folder).expanduser(), local_files_only=True)


@dataclass(frozen=True)
class ClipScore(ClipReward):
    """CLIPScore of picture and prompt: 2.5 max(cos, 0) (arXiv:2104.08718, sec. 3).

    Example:
        `ClipScore("models/clip-vit-large-patch14")`
    """

    def frame_scores(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """See `ClipReward.frame_scores`."""
        return 2.5 * (images * self.text_embeddings(prompts)).sum(dim=-1).clamp(min=0)


@dataclass(frozen=True)
class PickScore(ClipReward):
    """PickScore of picture and prompt: exp(logit scale) cos (arXiv:2305.01569, sec. 3), around 20; people's preference.

    Example:
        `PickScore("models/PickScore_v1", processor="models/CLIP-ViT-H-14-laion2B-s32B-b79K")`
    """

    def frame_scores(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """See `ClipReward.frame_scores`."""
        return self._model.logit_scale.exp() * (images * self.text_embeddings(prompts)).sum(dim=-1)


@dataclass(frozen=True)
class AestheticScore(ClipReward):
    """LAION's aesthetic predictor: affine layers on CLIP's image embedding of length 1, a mark of about 1 to 10.

    The published heads have no non-linearity: the linear one is one layer, the "improved" one five. Both are for CLIP
    ViT-L/14. They are published as .pth files, which are pickles and never read here; convert one once, where you trust
    it:
    `safetensors.torch.save_file(torch.load("head.pth", weights_only=True), "head.safetensors")`.

    Example:
        `AestheticScore("models/clip-vit-large-patch14", head="models/sac+logos+ava1-l14-linearMSE.safetensors")`
    """

    head: str = ""
    """Safetensors file of the layers: `weight` and `bias`, or `layers.0.weight`, `layers.0.bias`, `layers.2...`."""

    def prepare(self) -> None:
        """Loads model and head; see `ClipReward.prepare`."""
        super().prepare()
        if not Path(self.head).expanduser().is_file():
            raise ValueError(f"head of AestheticScore must be a safetensors file, got {self.head!r}; give its path")
        _ = self._layers

    def frame_scores(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """See `ClipReward.frame_scores`."""
        for weight, bias in self._layers:
            images = images @ weight.T + bias
        return images.squeeze(-1)

    @cached_property
    def _layers(self) -> list[tuple[Tensor, Tensor]]:
        """Weight [out, in] and bias [out] of each layer, in order."""
        from safetensors.torch import load_file

        tensors = load_file(Path(self.head).expanduser())
        names = sorted({name.rpartition(".")[0] for name in tensors}, key=_layer_number)
        keys = [tuple(f"{name}.{part}".lstrip(".") for part in ("weight", "bias")) for name in names]
        if sorted(tensors) != sorted(key for pair in keys for key in pair):
            raise ValueError(f"{self.head} must hold a weight and a bias for each layer, got {sorted(tensors)}")
        layers = [(tensors[weight].float(), tensors[bias].float()) for weight, bias in keys]
        width = self._model.config.projection_dim
        inputs, outputs = [weight.shape[-1] for weight, _ in layers], [len(bias) for _, bias in layers]
        if [width, *outputs] != [*inputs, 1]:
            raise ValueError(
                f"{self.head} must hold affine layers from the model's {width} values to 1; its layers take {inputs} "
                f"and give {outputs}: it is the head of another CLIP"
            )
        return [(weight.to(self._device), bias.to(self._device)) for weight, bias in layers]


def _layer_number(name: str) -> int:
    numbers = re.findall(r"\d+", name)
    return int(numbers[-1]) if numbers else 0


def _unit(vectors: Tensor) -> Tensor:
    return vectors / vectors.norm(dim=-1, keepdim=True)
