"""A policy in this process: its family's own weights, generating by transformers or by vLLM."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable, Iterator, Sequence, Set
from pathlib import Path
from typing import Any

import torch
from torch import nn
from typing_extensions import override

from longrl.datamodules.loading.render import KnowsFeatures
from longrl.engines.hf import HFEngine
from longrl.engines.rollout_engine import RolloutEngine, RolloutRequest, check_environment, generate_shards
from longrl.environments.runner import EnvironmentRunner
from longrl.environments.settings import EnvironmentSettings, with_observed
from longrl.evaluation.answering import Item, Policy, SaveAnswers, make_answer, make_portable
from longrl.evaluation.costs import ModelCost, all_media
from longrl.features.cache import FeatureCache
from longrl.features.disk_cache import DiskCache
from longrl.features.provenance import tensor_bytes
from longrl.features.rollout_features import RolloutFeatures
from longrl.io.number_ranges import NOT_NEGATIVE, check_ranges
from longrl.models.base import CausalFamily
from longrl.models.cell_order import in_order
from longrl.models.chunked_mlp import chunk_mlps
from longrl.models.pretrained_folder import is_local
from longrl.modules.initial_weights import plain_from
from longrl.packing.lengths import LengthLimit
from longrl.strategies.axis import SINGLE_RANK
from longrl.types import Completion, Media, Prompt, SamplingParams

logger = logging.getLogger(__name__)

GIB = 1 << 30
NAMES_IN_STORED_ANSWERS = {
    "longrl.engines.hf.HFEngine": "longrl.rollout.engine.HFEngine",
    "longrl.engines.vllm.VLLMEngine": "longrl.rollout.vllm_engine.VLLMEngine",
    "longrl.engines.server.VLLMServerEngine": "longrl.rollout.vllm_server.VLLMServerEngine",
}
"""Classes that moved -> the import path by which keys and results of evaluations know them, from 0.1.0 on."""


class LocalPolicy(Policy):
    """Weights of a run, a folder or the hub, in this process.

    Args:
        family: describes the model; `dtype` is what everything is computed in. The command `evaluate` takes it from the
            run or the exported folder that `weights` names, unless an option says otherwise.
        weights: as `model.init_from` of a run: its folder, a checkpoint, an exported folder or a hub id; None for those
            that the family names.
        engine: generates: `longrl.engines.hf.HFEngine` or `longrl.engines.vllm.VLLMEngine`.
        device: `cuda`, `cpu`, or `auto`.
        feature_cache_gib: features of videos that are kept for the next questions about them.
        feature_cache_dir: folder in which they outlive the run, as `model.feature_cache_dir` of a run.
        feature_cache_disk_gib: what that folder may take.
        environment: answers the turns of answers, as `rollout.environment` of a run, from which `evaluate` takes it
            unless an option says otherwise; None: answers have one turn.
    """

    shuffles_frames = True

    def __init__(
        self,
        family: CausalFamily,
        weights: str | None = None,
        engine: RolloutEngine | None = None,
        device: str = "auto",
        feature_cache_gib: float = 1.0,
        feature_cache_dir: str | None = None,
        feature_cache_disk_gib: float = 1024.0,
        environment: EnvironmentSettings | None = None,
    ) -> None:
        sizes = {"feature_cache_gib": NOT_NEGATIVE, "feature_cache_disk_gib": NOT_NEGATIVE}
        check_ranges(locals(), "policy.init_args.", **sizes)
        self.family: CausalFamily = family
        self.weights = weights
        self.engine = engine or HFEngine()
        self.device = _device(device)
        disk = None
        if feature_cache_dir:
            disk = DiskCache(family, feature_cache_dir, int(feature_cache_disk_gib * GIB))
        self.features = FeatureCache(family, int(feature_cache_gib * GIB), disk=disk)
        self.model: nn.Module | None = None
        self._cost: ModelCost | None = None
        self._identity: dict[str, Any] = {}
        self.environment = environment
        self.has_environment = environment is not None
        self._runner: EnvironmentRunner | None = None
        if environment is not None:
            check_environment(self.engine)
            self._runner = EnvironmentRunner(environment, family)
            family.tools = self._runner.tools  # before rows are rendered

    @override
    def prepare(self, folder: Path) -> None:
        plain = plain_from(self.family, self.weights, "--policy.init_args.weights")
        model = chunk_mlps(self.family, plain).eval().requires_grad_(False)
        source = self.weights or self.family.model_path
        self._identity = {
            "family": class_path(self.family),
            "settings": make_portable(self.family.identity()),
            "model": shown_name(source),
            "revision": None if is_local(source) else getattr(model.config, "_commit_hash", None),
            "weights": weights_hash(model),
            "engine": class_path(self.engine),
            "engine_options": make_portable(self.engine.identity()),
            "versions": self.engine.library_versions(),
        }
        if self.environment is not None:  # without one, answers stored before there were any are found
            self._identity["environment"] = make_portable(self.environment.identity())
        # An engine with weights of its own leaves the encoder alone on the device.
        parts = (model,) if self.engine.reads_policy_weights else self.family.media_encoders(model)
        for part in parts:
            part.to(self.device)
        self.model = model
        self._cost = ModelCost.of(self.family, model)
        if self.features.disk is not None:
            self.features.disk.check_encoder(model)

    @override
    def stored(self) -> KnowsFeatures | None:
        assert self.model is not None, "prepare comes first"
        return None if self.features.disk is None else self.features.disk.files(self.model)

    @override
    def fit_lengths(self, max_prompt_tokens: int | None, sampling: SamplingParams) -> None:
        self.engine.check_installed()
        self.engine.fit_lengths(max_prompt_tokens, with_observed(sampling, self.environment).max_completion_tokens)

    @override
    def length_limits(self, sampling: SamplingParams) -> tuple[LengthLimit, ...]:
        return self.engine.length_limits(with_observed(sampling, self.environment))

    @override
    def close(self) -> None:
        if self._runner is not None:
            self._runner.close()
        if self.engine.is_remote:  # one of this process ends with it
            self.engine.close()

    @override
    def identity(self) -> dict[str, Any]:
        return self._identity

    @override
    def answer(self, batches: Iterable[Sequence[Item]], sampling: SamplingParams, seed: int, save: SaveAnswers) -> None:
        assert self.model is not None, "prepare comes first"
        self.engine.sync(self.family, self.model, step=0)
        for batch in batches:
            prompts = [prompt for _, prompt in batch]
            of_prompts = self.features.get_or_encode(self.model, prompts)
            features = RolloutFeatures(of_prompts, self.features)
            request = RolloutRequest(prompts, prompts, [sampling], seed)
            (shards,) = generate_shards(
                self.engine, self.family, self.model, request, features, SINGLE_RANK, self._runner
            )
            groups = [group.completions for _, group in shards]
            self.features.add(features.shown)  # the next question may ask for the same
            encoded = self._encoded(prompts, groups, self.features.last_encoded | features.encoded)
            answers = [
                make_answer(self.family, prompt, group, self._cost, media)
                for prompt, group, media in zip(prompts, groups, encoded, strict=True)
            ]
            save(dict(zip((index for index, _ in batch), answers, strict=True)))

    @staticmethod
    def _encoded(
        prompts: Sequence[Prompt], groups: Sequence[Sequence[Completion]], keys: Set[str]
    ) -> Iterator[list[Media]]:
        """For each prompt the media that went through the encoder: the first question that shows one pays for it.

        Args:
            prompts: of a batch.
            groups: their completions.
            keys: of the media that were encoded for the batch.
        """
        left = set(keys)
        for prompt, completions in zip(prompts, groups, strict=True):
            media = {in_order(item).key: item for item in all_media(prompt, completions)}
            paid = left & media.keys()
            left -= paid
            yield [item for key, item in media.items() if key in paid]


def _device(name: str) -> torch.device:
    """Under torchrun every process has a GPU of its own. It becomes the current one: engines compute there."""
    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    device = torch.device(name)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device


def weights_hash(model: nn.Module) -> str:
    """Sha256 of names, types, shapes and values of all weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def shown_name(source: str) -> str:
    """A hub id as it is; of a path what says most of it, without the folders before: runs/a/checkpoints/last.ckpt is a.

    Example:
        `shown_name("runs/demo/rl")` is "rl".
    """
    path = Path(source)
    if not (is_local(source) or path.exists()):
        return source
    inside_run = path.parent.name == "checkpoints"
    return path.resolve().parents[1].name if inside_run else path.resolve().name


def class_path(value: object) -> str:
    """The import path of a value's class, as stored answers have it."""
    path = f"{type(value).__module__}.{type(value).__qualname__}"
    return NAMES_IN_STORED_ANSWERS.get(path, path)
