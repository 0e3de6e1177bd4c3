"""The modules of VILA (arXiv:2312.07533), NVILA (arXiv:2412.04468) and LongVILA (arXiv:2408.10188), and their folder.

transformers has SigLIP and Qwen2 but no class that joins them as VILA does, and the released folders bring code of
their own. Here are the projector and the joint, written from the published layout; nothing of the folder is run.
Letters: F frames or tiles, P patches of one, C encoder width, N rows behind the projector, D language model's width.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from longrl.io.hub_errors import hub_errors
from longrl.models.building import check_loaded
from longrl.models.vila_config import DOWNSAMPLING, PARTS, VilaConfig

TOWER_PREFIX = "vision_model."
"""Before the encoder's names in released folders; transformers 5 dropped it."""


class Downsample(nn.Module):
    """k x k neighbouring patches become one of k * k times the width; zeros fill the right and lower edge.

    `mlp_downsample` does the same as `mlp_downsample_2x2_fix` since NVILA. VILA 1.5's code left rows and columns
    exchanged; its models are not read here.
    """

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, features: Tensor) -> Tensor:
        """[F, P, C] of square grids -> [F, N, k * k * C]."""
        k, side = self.factor, round(features.shape[1] ** 0.5)
        grid = features.unflatten(1, (side, side))
        missing = -side % k
        grid = nn.functional.pad(grid, (0, 0, 0, missing, 0, missing))
        cut = grid.unflatten(2, (-1, k)).unflatten(1, (-1, k))  # [F, rows, k, columns, k, C]
        return cut.transpose(2, 3).flatten(3).flatten(1, 2)


class Projector(nn.Module):
    """From the encoder's width to the language model's. Names are those of `mm_projector/model.safetensors`."""

    def __init__(self, config: VilaConfig) -> None:
        super().__init__()
        self.layers = _layers(config.projector, config.projector_input, config.llm.hidden_size)

    def forward(self, features: Tensor) -> Tensor:
        """[F, P, C] -> [F, N, D]."""
        return self.layers(features)


def _layers(kind: str, width: int, hidden: int) -> nn.Module:
    """NVlabs/VILA, llava/model/multimodal_projector/base_projector.py."""
    factor = DOWNSAMPLING[kind]
    joined = width * factor**2
    end = [nn.GELU(), nn.Linear(hidden, hidden)]
    if kind == "linear":
        return nn.Linear(width, hidden)
    if kind == "mlp2x_gelu":
        return nn.Sequential(nn.Linear(width, hidden), *end)
    downsample = [Downsample(factor), nn.LayerNorm(joined)]
    if kind == "mlp_downsample_3x3_fix":
        middle = [nn.Linear(joined, 3 * width), nn.GELU(), nn.LayerNorm(3 * width)]
        return nn.Sequential(*downsample, *middle, nn.Linear(3 * width, hidden), *end)
    return nn.Sequential(*downsample, nn.Linear(joined, hidden), *end)


class Visual(nn.Module):
    """Encoder and projector in one forward, pixels in and rows for the language model out: one unit shards both."""

    vision_tower: Any
    mm_projector: Any

    def __init__(self, vision_encoder: nn.Module, projector: nn.Module, config: VilaConfig) -> None:
        super().__init__()
        self.vision_tower, self.mm_projector = vision_encoder, projector
        self.scales, self.output_scale = config.scales, config.output_scale
        self.num_layers = config.vision_encoder.num_hidden_layers + 1 + config.select_layer
        self.scale = config.preprocessor.get("rescale_factor", 1 / 255)
        self.mean, self.std = (config.preprocessor.get(f"image_{name}", [0.5] * 3) for name in ("mean", "std"))

    def forward(self, pixels: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """[F, 3, S, S] uint8 -> [F, N, D]; the tiles of one image by dynamic S2, in `grid`, -> [1, N, D]."""
        features = self.patch_features(pixels)
        if not self.scales:
            return self.mm_projector(features)
        if grid is None:  # frames and images that are not cut have one scale, taken for all
            return self.mm_projector(features.repeat(1, 1, len(self.scales)))
        merged, (rows, columns) = self._side_by_side(features, grid)
        cut = merged[0].unflatten(2, (columns, -1)).unflatten(1, (rows, -1))  # [C, rows, side, columns, side]
        tiles = cut.permute(1, 3, 2, 4, 0).flatten(2, 3).flatten(0, 1)  # [rows * columns, P, C]
        return _joined(self.mm_projector(tiles), (rows, columns)).flatten(2).transpose(1, 2)

    def patch_features(self, pixels: Tensor) -> Tensor:
        """[F, 3, S, S] uint8 -> [F, P, C], of the selected layer; those behind it do not run."""
        weight = self.vision_tower.embeddings.patch_embedding.weight
        mean, std = (pixels.new_tensor(x, dtype=torch.float32)[:, None, None] for x in (self.mean, self.std))
        hidden = self.vision_tower.embeddings(((pixels.float() * self.scale - mean) / std).to(weight.dtype))
        for layer in self.vision_tower.encoder.layers[: self.num_layers]:
            hidden = layer(hidden, None)
        return hidden

    def _side_by_side(self, features: Tensor, grid: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        """Features of all scales on the grid of one: [1, scales * C, rows, columns] and its tiles.

        NVlabs/VILA, llava_arch.py: merge_features_for_dynamic_s2.
        """
        squares = [(scale // self.scales[0],) * 2 for scale in self.scales[:-1]]
        grids = [*squares, grid]
        parts = features.split([rows * columns for rows, columns in grids])
        maps = [_joined(part, tiles) for part, tiles in zip(parts, grids, strict=True)]
        size = maps[self.output_scale].shape[-2:]
        resized = [nn.functional.interpolate(item.float(), size=size, mode="area").to(item) for item in maps]
        return torch.cat(resized, 1), grids[self.output_scale]


def _joined(tiles: Tensor, grid: tuple[int, int]) -> Tensor:
    """[rows * columns, P, C] of square tiles -> [1, C, rows * side, columns * side]."""
    side = round(tiles.shape[1] ** 0.5)
    cut = tiles.view(*grid, side, side, -1)
    return cut.permute(4, 0, 2, 1, 3).flatten(1, 2).flatten(2)[None]


class VilaModel(nn.Module):
    """Language model, encoder and projector under the names of their folders. Longrl's families call the parts."""

    llm: Any
    vision_tower: Any
    mm_projector: Any
    visual: Visual
    """Encoder and projector as one."""

    def __init__(self, config: VilaConfig, llm: nn.Module, vision_encoder: nn.Module, projector: Projector) -> None:
        super().__init__()
        self.config = config
        self.llm, self.vision_tower, self.mm_projector = llm, vision_encoder, projector
        # Past nn.Module's registration, so that its names do not stand beside those of its parts.
        object.__setattr__(self, "visual", Visual(vision_encoder, projector, config))

    @classmethod
    def from_config(cls, config: VilaConfig, attn_implementation: dict[str, str], dtype: torch.dtype) -> VilaModel:
        """Random weights."""
        from transformers import AutoModel, AutoModelForCausalLM

        llm = AutoModelForCausalLM.from_config(config.llm, attn_implementation=attn_implementation["llm"], dtype=dtype)
        vision_encoder = AutoModel.from_config(
            config.vision_encoder, attn_implementation=attn_implementation["vision_tower"], dtype=dtype
        )
        return cls(config, llm, vision_encoder, Projector(config).to(dtype))

    @classmethod
    def from_pretrained(cls, source: str | Path, attn_implementation: dict[str, str], dtype: torch.dtype) -> VilaModel:
        """The weights of a released or exported folder, or of a hub id.

        Raises:
            ValueError: names or shapes in the folder are not the model's, with the differences.
        """
        from transformers import AutoModel, AutoModelForCausalLM

        folder = local_folder(source)
        config = VilaConfig(folder)
        parts = []
        kinds: dict[str, Any] = {"llm": AutoModelForCausalLM, "vision_tower": AutoModel}
        options = {"dtype": dtype, "output_loading_info": True, "ignore_mismatched_sizes": True}
        for name, auto_class in kinds.items():
            attention = attn_implementation[name]
            part, info = auto_class.from_pretrained(folder / name, attn_implementation=attention, **options)
            check_loaded(folder / name, **info)
            parts.append(part)
        llm, vision_encoder = parts
        return cls(config, llm, vision_encoder, _load_projector(folder / "mm_projector", config).to(dtype))

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the folder as released: weights and configs; `save_processing` of the family adds the rest."""
        from safetensors.torch import save_file

        folder = Path(folder)
        for name in PARTS:
            (folder / name).mkdir(parents=True, exist_ok=True)
        self.llm.save_pretrained(folder / "llm")
        self.vision_tower.config.save_pretrained(folder / "vision_tower")
        kind = {"mm_projector_type": self.config.projector, "model_type": "v2l_projector"}
        _write_json(folder / "mm_projector", {"architectures": ["MultimodalProjector"], **kind})
        vision_encoder = {TOWER_PREFIX + name: value for name, value in self.vision_tower.state_dict().items()}
        for name, state in (("vision_tower", vision_encoder), ("mm_projector", self.mm_projector.state_dict())):
            state = {key: value.contiguous().cpu() for key, value in state.items()}
            save_file(state, folder / name / "model.safetensors", metadata={"format": "pt"})
        configs = {f"{name}_cfg": json.loads((folder / name / "config.json").read_text()) for name in PARTS}
        _write_json(folder, self.config.values | configs)

    def get_input_embeddings(self) -> nn.Module:
        """The language model's."""
        return self.llm.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """The language model's."""
        return self.llm.get_output_embeddings()

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """Gradient checkpointing of both transformers models."""
        self.llm.gradient_checkpointing_enable(**options)
        self.vision_tower.gradient_checkpointing_enable(**options)


def local_folder(source: str | Path) -> Path:
    """The folder of a model, fetched from the hub, without its code, if `source` is no folder."""
    path = Path(source).expanduser()
    return path if path.is_dir() else _fetched(str(source))


@functools.cache
def _fetched(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download

    with hub_errors(hub_id):
        return Path(snapshot_download(hub_id, ignore_patterns=["*.py"]))


def _load_projector(folder: Path, config: VilaConfig) -> Projector:
    from safetensors.torch import load_file

    with torch.device("meta"):
        projector = Projector(config)
    weights = load_file(folder / "model.safetensors")
    ours = projector.state_dict()
    shapes = [(key, weights[key].shape, ours[key].shape) for key in weights.keys() & ours.keys()]
    check_loaded(
        folder,
        missing_keys=ours.keys() - weights.keys(),
        unexpected_keys=weights.keys() - ours.keys(),
        mismatched_keys=[item for item in shapes if item[1] != item[2]],
    )
    projector.load_state_dict(weights, assign=True)
    return projector


def _write_json(folder: Path, values: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")
