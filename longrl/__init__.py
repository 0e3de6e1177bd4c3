"""longrl: reinforcement learning for vision-language models that reason over long videos.

`__all__` is the public API; its names are loaded when they are first asked for, so `import longrl` is light.
"""

import importlib
from typing import TYPE_CHECKING, Any

from longrl.torchvision_ops import retry_on_import

if TYPE_CHECKING:
    from longrl.algorithms import Algorithm as Algorithm
    from longrl.callbacks.rollout import RolloutCallback as RolloutCallback
    from longrl.datamodules.loading.render import RowRenderer as RowRenderer
    from longrl.datamodules.longvideo_reason import LongVideoReason as LongVideoReason
    from longrl.datamodules.media.sampling import VideoSampling as VideoSampling
    from longrl.datamodules.rows import read_rows as read_rows
    from longrl.engines.hf import HFEngine as HFEngine
    from longrl.engines.rollout_engine import RolloutEngine as RolloutEngine
    from longrl.engines.server import VLLMServerEngine as VLLMServerEngine
    from longrl.engines.vllm import VLLMEngine as VLLMEngine
    from longrl.features.cache import FeatureCache as FeatureCache
    from longrl.models.base import CausalFamily as CausalFamily
    from longrl.modules.policy import PolicyModule as PolicyModule
    from longrl.packing.pack import pack as pack
    from longrl.rewards import RewardSum as RewardSum, RewardTerm as RewardTerm
    from longrl.strategies.mr_sp import MRSPStrategy as MRSPStrategy
    from longrl.types import (
        Completion as Completion,
        Group as Group,
        Prompt as Prompt,
        Row as Row,
        SamplingParams as SamplingParams,
    )

__version__ = "0.1.0"

_HOME = {
    "Algorithm": "algorithms",
    "CausalFamily": "models.base",
    "Completion": "types",
    "FeatureCache": "features.cache",
    "Group": "types",
    "HFEngine": "engines.hf",
    "LongVideoReason": "datamodules.longvideo_reason",
    "MRSPStrategy": "strategies.mr_sp",
    "PolicyModule": "modules.policy",
    "Prompt": "types",
    "RewardSum": "rewards",
    "RewardTerm": "rewards",
    "RolloutCallback": "callbacks.rollout",
    "RolloutEngine": "engines.rollout_engine",
    "Row": "types",
    "RowRenderer": "datamodules.loading.render",
    "SamplingParams": "types",
    "VLLMEngine": "engines.vllm",
    "VLLMServerEngine": "engines.server",
    "VideoSampling": "datamodules.media.sampling",
    "pack": "packing.pack",
    "read_rows": "datamodules.rows",
}
__all__ = sorted(_HOME)

retry_on_import()


def __getattr__(name: str) -> Any:
    """The public name, from the module that defines it."""
    if name not in _HOME:
        raise AttributeError(f"module 'longrl' has no attribute {name!r}")
    return getattr(importlib.import_module(f"longrl.{_HOME[name]}"), name)
