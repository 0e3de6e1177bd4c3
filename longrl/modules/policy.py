"""The policy being trained: one LightningModule for chain-of-thought SFT and for RL on its own rollouts.

Letters: P prompts of a batch, G completions of each, C = P * G, N completion tokens of a rollout or mini-batch,
R scored rows of a micro-batch.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from typing_extensions import override

from longrl.algorithms import Algorithm
from longrl.models.base import CausalFamily
from longrl.modules.packing import pack
from longrl.modules.weights import build_from
from longrl.phases import PhaseTimes
from longrl.rollout.features import FeatureCache, TrainableFeatures
from longrl.types import Batch, Group, Packed, PolicyOutput, Prompt

LossFunction = Callable[[Packed, PolicyOutput], tuple[Tensor, Mapping[str, Tensor]]]
"""Micro-batch and scores -> (summed loss, metrics that add up over micro-batches)."""


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW and its learning-rate schedule, counted in optimizer steps."""

    lr: float = 1e-6
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0
    total_steps: int | None = None
    """End of a linear or cosine schedule; None takes trainer.max_steps, or all batches of all epochs."""


@dataclass(frozen=True)
class Rollout:
    """One mini-batch of scored groups as flat tensors: completion after completion."""

    prompts: list[Prompt]
    completions: list[list[Tensor]]
    advantages: Tensor
    """[N]"""
    old_logp: Tensor | None
    """[N], or None where the policy that sampled is the one being updated."""
    ref_logp: Tensor | None
    """[N], or None without KL in the loss."""
    sampler_logp: Tensor
    """[N] as the engine reported them."""
    weights: Tensor
    """[C] weight of every token of a completion."""


class PolicyModule(LightningModule):
    """Trains a model family by SFT (batches without groups) or RL (batches whose groups a rollout callback filled).

    Optimization is manual: losses are sums under weights that add up to one over the whole optimizer step, so any split
    into micro-batches gives the same gradient.

    Args:
        family: the model.
        algorithm: the RL objective; not used by SFT.
        optimizer: AdamW and its schedule.
        init_from: initial weights: a Lightning checkpoint or run folder, an exported folder or a hub id. Also the
            reference policy of the KL penalty. To go on with an interrupted run use `--ckpt_path` instead.
        max_tokens_per_micro_batch: token budget of one forward pass; bounds memory, changes no gradient.
        mini_batches_per_rollout: optimizer steps one rollout is cut into.
        epochs_per_rollout: how often a rollout is gone through.
        max_grad_norm: gradient norm limit; 0 switches it off.
        temperature: the one completions are sampled with; the CLI links it from the rollout callback.
        feature_cache_bytes: features of a frozen tower kept between steps.
    """

    def __init__(
        self,
        family: CausalFamily,
        algorithm: Algorithm | None = None,
        optimizer: OptimizerSettings | None = None,
        init_from: str | None = None,
        max_tokens_per_micro_batch: int = 16_384,
        mini_batches_per_rollout: int = 1,
        epochs_per_rollout: int = 1,
        max_grad_norm: float = 1.0,
        temperature: float = 1.0,
        feature_cache_bytes: int = 1 << 30,
    ) -> None:
        super().__init__()
        if min(max_tokens_per_micro_batch, mini_batches_per_rollout, epochs_per_rollout) < 1:
            raise ValueError(
                "model.max_tokens_per_micro_batch, model.mini_batches_per_rollout and model.epochs_per_rollout must be "
                f"at least 1, got {max_tokens_per_micro_batch}, {mini_batches_per_rollout} and {epochs_per_rollout}"
            )
        self.automatic_optimization = False
        self.family = family
        self.algorithm = algorithm or Algorithm()
        self.optimizer_settings = optimizer or OptimizerSettings()
        self.init_from = init_from
        self.max_tokens_per_micro_batch = max_tokens_per_micro_batch
        self.mini_batches_per_rollout = mini_batches_per_rollout
        self.epochs_per_rollout = epochs_per_rollout
        self.max_grad_norm = max_grad_norm
        self.temperature = temperature
        self.phases = PhaseTimes()
        self.features = FeatureCache(family, feature_cache_bytes)
        self.model: nn.Module | None = None
        self._reference: tuple[nn.Module, ...] = ()  # a tuple, so that it is no submodule: not saved, not trained

    # -- building ------------------------------------------------------------------------------------------------

    @override
    def configure_model(self) -> None:
        if self.model is None:
            self.model = build_from(self.family, self.init_from)

    @override
    def on_fit_start(self) -> None:
        if self.algorithm.kl_coef > 0 and self._is_rl():
            reference = build_from(self.family, self.init_from).to(self.device).eval()
            self._reference = (reference.requires_grad_(False),)
        self.model.train()

    def _is_rl(self) -> bool:
        return self.trainer.datamodule.renderer.stage == "rl"

    @override
    def configure_optimizers(self) -> dict[str, Any]:
        from transformers import get_scheduler

        settings = self.optimizer_settings
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(
            parameters, lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay
        )
        schedule = "constant_with_warmup" if settings.schedule == "constant" else settings.schedule
        scheduler = get_scheduler(schedule, optimizer, settings.warmup_steps, self._total_steps())
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    @property
    def steps_per_rollout(self) -> int:
        """Optimizer steps on one rollout."""
        return self.mini_batches_per_rollout * self.epochs_per_rollout

    def _total_steps(self) -> int | None:
        """Optimizer steps until the end of the schedule."""
        settings = self.optimizer_settings
        if settings.schedule == "constant" or settings.total_steps is not None:
            return settings.total_steps
        if self.trainer.max_steps > 0:
            return self.trainer.max_steps
        per_batch = self.steps_per_rollout if self._is_rl() else 1
        return int(self.trainer.estimated_stepping_batches) * per_batch

    @property
    def tower_trains(self) -> bool:
        """Whether features need gradients."""
        tower = self.family.tower(self.model)
        return tower is not None and any(parameter.requires_grad for parameter in tower.parameters())

    def encode(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """{media key: [N, D] features} without gradient, each distinct medium encoded once while the tower stands."""
        return self.features.get_or_encode(self.model, prompts)

    # -- steps ---------------------------------------------------------------------------------------------------

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        with self.phases("update"):
            metrics = self.sft_step(batch) if batch.groups is None else self.rl_step(batch)
        if not metrics:
            return
        self.log_dict({f"train/{name}": value for name, value in metrics.items()}, prog_bar=False, batch_size=1)
        self.log("loss", metrics["loss"], prog_bar=True, logger=False, batch_size=1)

    def sft_step(self, batch: Batch) -> dict[str, float]:
        """One optimizer step on the negative log-likelihood per response token of the whole batch."""
        responses = _targets(batch)
        num_tokens = sum(len(ids) for (ids,) in responses)

        def loss_of(packed: Packed, output: PolicyOutput) -> tuple[Tensor, dict[str, Tensor]]:
            return -output.logp.sum() / num_tokens, {"entropy": output.entropy.sum() / num_tokens}

        features = {} if self.tower_trains else self.encode(batch.prompts)
        return self._update(batch.prompts, responses, features, loss_of)

    def rl_step(self, batch: Batch) -> dict[str, float]:
        """The optimizer steps on one rollout; metrics are the mean over them. No groups, no step."""
        if not batch.groups:
            return {}
        mini_batches = self._mini_batches(batch)
        totals: Counter[str] = Counter()
        for _ in range(self.epochs_per_rollout):
            for rollout in mini_batches:
                totals.update(self._update_on(rollout, batch.features))
        steps = self.epochs_per_rollout * len(mini_batches)
        return {name: value / steps for name, value in totals.items()}

    def _update_on(self, rollout: Rollout, features: Mapping[str, Tensor]) -> dict[str, float]:
        def loss_of(packed: Packed, output: PolicyOutput) -> tuple[Tensor, Mapping[str, Tensor]]:
            rows, weights = packed.token_index, rollout.weights[packed.completion_index].to(output.logp.device)
            result = self.algorithm.loss(
                output.logp,
                output.logp.detach() if rollout.old_logp is None else rollout.old_logp[rows],
                None if rollout.ref_logp is None else rollout.ref_logp[rows],
                rollout.sampler_logp[rows],
                rollout.advantages[rows],
                weights,
                packed.completion_index,
            )
            return result.loss, {"entropy": (output.entropy * weights).sum(), **result.metrics}

        metrics = self._update(rollout.prompts, rollout.completions, features, loss_of)
        total = metrics.pop("weight_sum") or 1.0  # below one with Dr.GRPO's constant, or with masked completions
        own = ("loss", "grad_norm", "lr")
        return {name: value if name in own else value / total for name, value in metrics.items()}

    def _update(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Sequence[Tensor]],
        features: Mapping[str, Tensor],
        loss_of: LossFunction,
    ) -> dict[str, float]:
        """One optimizer step: micro-batches, backward, clipping, scheduler. Returns summed metrics."""
        trainable = TrainableFeatures(self.family, self.model, prompts) if self.tower_trains else None
        totals: Counter[str] = Counter()
        for packed in pack(prompts, completions, self.max_tokens_per_micro_batch):
            packed = packed.to(self.device)
            output = self.family.forward(
                self.model, packed, trainable.leaves if trainable else features, self.temperature
            )
            loss, metrics = loss_of(packed, output)
            self.manual_backward(loss)
            totals.update({"loss": loss.item(), **{name: value.item() for name, value in metrics.items()}})
        if trainable:
            trainable.backward()
        return {**totals, **self._optimizer_step()}

    def _optimizer_step(self) -> dict[str, float]:
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        limit = self.max_grad_norm or float("inf")
        grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        lr = optimizer.param_groups[0]["lr"]
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if self.tower_trains:
            self.features.clear()
        return {"grad_norm": float(grad_norm), "lr": lr}

    # -- from groups to mini-batches -----------------------------------------------------------------------------

    def _mini_batches(self, batch: Batch) -> list[Rollout]:
        """Scores the groups once with the policy and reference as they are, and cuts them into mini-batches."""
        groups = batch.groups
        algorithm = self.algorithm
        sampler = torch.cat([completion.logprobs for group in groups for completion in group.completions])
        old = self._old_logp(groups, batch.features, sampler)
        reference = self._reference_logp(groups, batch.features)
        penalty = None
        if reference is not None and algorithm.kl_placement == "reward":
            penalty, reference = algorithm.kl(old, reference), None
        advantages = algorithm.token_advantages(
            rewards=torch.stack([group.rewards for group in groups]).to(self.device),
            valid=torch.stack([group.valid for group in groups]).to(self.device),
            lengths=_lengths(groups).to(self.device),
            kl=penalty,
            baseline=_baselines(groups, self.device),
        )
        rows = _token_ranges(groups)
        return [
            self._rollout(groups[part], rows[part], advantages, old, reference, sampler.to(self.device))
            for part in _parts(len(groups), self.mini_batches_per_rollout)
        ]

    def _rollout(
        self,
        groups: Sequence[Group],
        ranges: Sequence[range],
        advantages: Tensor,
        old: Tensor | None,
        reference: Tensor | None,
        sampler: Tensor,
    ) -> Rollout:
        """The tensors of some neighbouring groups."""
        rows = slice(ranges[0].start, ranges[-1].stop)
        valid = torch.cat([group.valid for group in groups]).to(self.device)
        return Rollout(
            prompts=[group.prompt for group in groups],
            completions=_completions(groups),
            advantages=advantages[rows],
            old_logp=None if old is None else old[rows],
            ref_logp=None if reference is None else reference[rows],
            sampler_logp=sampler[rows],
            weights=self.algorithm.completion_weights(_lengths(groups).to(self.device), valid),
        )

    def _old_logp(self, groups: Sequence[Group], features: Mapping[str, Tensor], sampler: Tensor) -> Tensor | None:
        """[N] log-probabilities before the update, or None if the first update is the only one.

        Groups carried over were sampled by older weights: theirs are the sampler's.
        """
        in_reward = self.algorithm.kl_coef > 0 and self.algorithm.kl_placement == "reward"
        carried = any(group.carried_over for group in groups)
        if self.steps_per_rollout == 1 and not in_reward and not carried:
            return None
        old = self.score(self.model, [group.prompt for group in groups], _completions(groups), features)
        for group, rows in zip(groups, _token_ranges(groups), strict=True):
            if group.carried_over:
                old[rows.start : rows.stop] = sampler[rows.start : rows.stop].to(old)
        return old

    def _reference_logp(self, groups: Sequence[Group], features: Mapping[str, Tensor]) -> Tensor | None:
        """[N] log-probabilities of the reference policy, or None without KL penalty."""
        if not self._reference:
            return None
        prompts = [group.prompt for group in groups]
        if self.tower_trains:  # the reference has the tower it started with
            features = FeatureCache(self.family).get_or_encode(self._reference[0], prompts)
        return self.score(self._reference[0], prompts, _completions(groups), features)

    @torch.no_grad()
    def score(
        self,
        model: nn.Module,
        prompts: Sequence[Prompt],
        completions: Sequence[Sequence[Tensor]],
        features: Mapping[str, Tensor],
    ) -> Tensor:
        """[N] log-probabilities of all completion tokens under `model`."""
        parts = pack(prompts, completions, self.max_tokens_per_micro_batch)
        logp = torch.zeros(sum(len(part.token_index) for part in parts), device=self.device)
        for packed in parts:
            output = self.family.forward(model, packed, features, self.temperature)
            logp[packed.token_index.to(self.device)] = output.logp
        return logp

    # -- evaluation ----------------------------------------------------------------------------------------------

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, "val")

    @override
    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, "test")

    @override
    def predict_step(self, batch: Batch, batch_idx: int) -> list[list[str]]:
        """Texts of each prompt's completions: all that Lightning keeps; `EvaluationReport` writes more of them."""
        return [[completion.text for completion in group.completions] for group in batch.groups or []]

    def _evaluate(self, batch: Batch, stage: str) -> None:
        """Logs the mean of every reward part, in validation per category too; of SFT batches the loss."""
        for group in batch.groups or []:
            for name, values in group.reward_parts.items():
                self.log(f"{stage}/{name}", values.mean(), batch_size=1, prog_bar=name == "accuracy", sync_dist=True)
                if stage == "val":  # `test` reports categories with intervals: callbacks/evaluation.py
                    key = f"{stage}/{name}/{group.prompt.row.category}"
                    self.log(key, values.mean(), batch_size=1, sync_dist=True)
        if batch.prompts and (batch.groups is None or batch.prompts[0].response_ids is not None):
            responses = _targets(batch)
            logp = self.score(self.model, batch.prompts, responses, batch.features or self.encode(batch.prompts))
            self.log(f"{stage}/loss", -logp.mean(), batch_size=len(logp), sync_dist=True)


def _targets(batch: Batch) -> list[list[Tensor]]:
    """The SFT target of each prompt.

    Raises:
        ValueError: the prompts have none, for they are meant to be answered by a rollout callback.
    """
    targets = [prompt.response_ids for prompt in batch.prompts]
    if any(ids is None for ids in targets):
        raise ValueError(
            "data.stage=rl gives prompts without targets and there is no rollout callback to answer them; add "
            "longrl.callbacks.rollout.RolloutCallback to trainer.callbacks, or set data.stage to sft"
        )
    return [[ids] for ids in targets if ids is not None]


def _completions(groups: Sequence[Group]) -> list[list[Tensor]]:
    return [[completion.token_ids for completion in group.completions] for group in groups]


def _lengths(groups: Sequence[Group]) -> Tensor:
    """[C] tokens of each completion."""
    return torch.tensor([len(completion.token_ids) for group in groups for completion in group.completions])


def _baselines(groups: Sequence[Group], device: torch.device) -> Tensor | None:
    """[P] rewards of greedy completions, if the groups have them."""
    if any(group.baseline is None for group in groups):
        return None
    return torch.tensor([group.baseline for group in groups], device=device)


def _token_ranges(groups: Sequence[Group]) -> list[range]:
    """Where each group's tokens lie among the N tokens of the rollout."""
    ranges, start = [], 0
    for group in groups:
        stop = start + sum(len(completion.token_ids) for completion in group.completions)
        ranges.append(range(start, stop))
        start = stop
    return ranges


def _parts(count: int, num_parts: int) -> list[slice]:
    """`count` things in `num_parts` neighbouring slices whose sizes differ by at most one."""
    num_parts = min(num_parts, count)
    edges = [count * place // num_parts for place in range(num_parts + 1)]
    return [slice(start, stop) for start, stop in itertools.pairwise(edges)]
