"""Where a model's sizes come from: its own folder, the hub's local copy, or the configs that ship with longrl.

`configs/shapes/OWNER/NAME` holds the released `config.json` (and for media `preprocessor_config.json`) of the models
that the recipes name, of Omni models the thinker's part, so that a run can be planned on a machine without network and
without weights.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from longrl.io.shipped_files import find_shipped, shipped_files
from longrl.models.base import CausalFamily
from longrl.models.model_types import check_model_type

FOLDER = Path("configs/shapes")


def find_config(family: CausalFamily) -> CausalFamily:
    """Gives the family a config, and a processor if it reads media, that need neither network nor weights.

    Args:
        family: changed in place if its hub id is not in the local copy of the hub.

    Raises:
        ValueError: the config is neither here nor in `configs/shapes`.
    """
    from transformers import AutoImageProcessor, AutoVideoProcessor

    folder = find_shipped(FOLDER / family.model_path) or FOLDER / family.model_path
    if (Path(family.model_path).expanduser() / "config.json").is_file():
        return family
    if (folder / "config.json").is_file():
        config = family.read_config(folder)
        check_model_type(family, config)
        family.config = config
        if (folder / "preprocessor_config.json").is_file():
            # In the place of what the family would load; no tokenizer is needed to count patches.
            vars(family)["processor"] = SimpleNamespace(
                image_processor=AutoImageProcessor.from_pretrained(folder),
                video_processor=AutoVideoProcessor.from_pretrained(folder),
            )
        return family
    try:
        config = family.read_config(family.model_path)
    except (OSError, ValueError) as error:
        files = (Path(name) for name in shipped_files() if name.startswith(f"{FOLDER}/"))
        shipped = [str(file.parent.relative_to(FOLDER)) for file in files if file.name == "config.json"]
        raise ValueError(
            f"plan needs the config of model.family.init_args.model={family.model_path!r}, which is no folder with a "
            f"config.json, not in the hub's local copy and none of the shipped {', '.join(shipped)}; put its "
            f"config.json into {FOLDER / family.model_path}"
        ) from error
    check_model_type(family, config)
    family.config = config
    return family


def build_on_meta(family: CausalFamily) -> nn.Module:
    """The family's model without a byte of weights: what `family.build` would make, on the meta device."""
    with torch.device("meta"):
        return family.build(weights=None)
