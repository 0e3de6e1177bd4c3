"""The policy of a flow model: one LightningModule for RL of pictures and videos on its own samples.

Letters: P prompts of a batch, G samples of each, C = P * G, W steps of a window, N = C * W rows of a rollout or
mini-batch, R of a micro-batch. All are this rank's; sums over ranks are taken where a formula needs them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from longrl.algorithms import Algorithm, DrawnSteps, Tokens
from longrl.diffusion.diffusion_family import DiffusionFamily
from longrl.diffusion.sampler import Trajectory
from longrl.diffusion.step_mismatch import StepMismatchMonitor
from longrl.diffusion.trajectory_rows import Place, Rows, SampledGroups, Scores, places_of, score, split, velocity_of
from longrl.models.lora import adapters_off
from longrl.modules.initial_weights import plain_from
from longrl.modules.mini_batches import Rollout, mini_batches
from longrl.modules.optimizer import OptimizerSettings
from longrl.modules.trained import TrainedModule
from longrl.strategies.fsdp import Entry
from longrl.types import Batch


class DiffusionModule(TrainedModule):
    """Trains SD3 or Wan by RL on batches whose groups `DiffusionRolloutCallback` filled.

    A sample is a completion and a denoising step of its window a token, so algorithms and mini-batches are those of
    `PolicyModule`. Losses are sums under weights that add up to one over the whole optimizer step, so any split into
    micro-batches gives the same gradient.

    Args:
        family: the model.
        algorithm: the RL objective: configs/algorithm/flow_grpo.yaml and its like.
        optimizer: AdamW and its schedule.
        init_from: initial weights: a Lightning checkpoint or run folder, an exported pipeline or a hub id. Also the
            reference policy of the KL penalty. To go on with an interrupted run use `--ckpt_path` instead.
        rows_per_micro_batch: denoising steps scored in one forward pass, of any samples; with guidance each is two.
            Bounds memory, changes no gradient.
        mini_batches_per_rollout: optimizer steps one rollout is cut into.
        epochs_per_rollout: how often a rollout is gone through.
        max_grad_norm: gradient norm limit; 0 switches it off.
        max_mismatch: largest mean difference between the log-probabilities of a rollout's steps when they were drawn and in
            its first update; above it the run ends. They are means over a latent, as what the algorithm clips, and the
            default is ten of its usual ranges of 1e-4. In float32 the difference is about 1e-7; in bfloat16 kernels may
            round otherwise in batches of another size, so raise it there if `train/mismatch_mean` comes near.
    """

    def __init__(
        self,
        family: DiffusionFamily,
        algorithm: Algorithm | None = None,
        optimizer: OptimizerSettings | None = None,
        init_from: str | None = None,
        rows_per_micro_batch: int = 8,
        mini_batches_per_rollout: int = 1,
        epochs_per_rollout: int = 1,
        max_grad_norm: float = 1.0,
        max_mismatch: float = 1e-3,
    ) -> None:
        if min(rows_per_micro_batch, mini_batches_per_rollout, epochs_per_rollout) < 1:
            raise ValueError(
                "model.rows_per_micro_batch, model.mini_batches_per_rollout and model.epochs_per_rollout must be at "
                f"least 1, got {rows_per_micro_batch}, {mini_batches_per_rollout} and {epochs_per_rollout}"
            )
        super().__init__(
            family, algorithm, optimizer, init_from, mini_batches_per_rollout, epochs_per_rollout, max_grad_norm
        )
        self.rows_per_micro_batch = rows_per_micro_batch
        self.gap = StepMismatchMonitor(max_mismatch)
        """Compares the sampler's log-probabilities with those of the first update of every rollout."""

    # -- building ------------------------------------------------------------------------------------------------

    @override
    def is_rl(self) -> bool:
        return True

    @override
    def build_model(self) -> nn.Module:
        model = plain_from(self.family, self.init_from)
        if self.family.lora is not None:
            self.family.add_adapters(model)
        if self.parallel.sp_group.size > 1:
            self.family.share_tokens(model, self.parallel.degrees[self.parallel.sp_group.size])
        return model

    @override
    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.family.place(self.device)

    @override
    def on_validation_start(self) -> None:
        self.family.place(self.device)

    @override
    def on_test_start(self) -> None:
        self.family.place(self.device)

    # -- sampling ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def with_velocity(self, use: Callable[[Callable[..., Tensor]], Any]) -> Any:
        """`use(velocity)`, where velocity(latents, timesteps, texts, guidance) reads the current weights, all of them.

        Ranks need not go in step meanwhile. Every rank of the run must call it.
        """

        def velocity(latents: Tensor, timesteps: Tensor, texts: Sequence[str], guidance: float) -> Tensor:
            return velocity_of(self.family, self.model, latents, timesteps, texts, guidance)

        with self.trainer.precision_plugin.forward_context():
            return self.entry.whole(lambda: use(velocity))

    @torch.no_grad()
    def decode(self, trajectories: Sequence[Trajectory]) -> Tensor:
        """[B, F, 3, H, W] uint8 frames of samples, on the CPU."""
        return self.family.decode(torch.stack([item.final for item in trajectories]).to(self.device)).cpu()

    # -- steps ---------------------------------------------------------------------------------------------------

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        if batch.groups is None:
            raise ValueError(
                "nothing samples pictures for this batch; set rollout.reward (configs/reward/ has examples)"
            )
        with self.phases("update"):
            metrics = self.rl_step(batch)
        if metrics:
            self.log_step(metrics)

    def rl_step(self, batch: Batch) -> dict[str, float]:
        """The optimizer steps on one rollout; metrics are the mean over them. No groups on any rank, no step."""
        data = self.parallel.dp
        if data.max(len(batch.groups)) == 0:
            return {}
        flat = SampledGroups(batch.groups, self.device)
        parts = mini_batches(flat, self.mini_batches_per_rollout, self.algorithm, data, flat.sampler_logp, None)
        totals: Counter[str] = Counter()
        for number, rollout in enumerate(parts * self.epochs_per_rollout):
            totals.update(self._update_on(rollout, first=number == 0))
        steps = self.epochs_per_rollout * len(parts)
        return {name: value / steps for name, value in totals.items()} | self.gap.metrics

    def _update_on(self, rollout: Rollout, first: bool) -> dict[str, float]:
        """One optimizer step. The weights that sampled are those of the first: its ratios are 1 exactly."""
        places = places_of([prompt.row.problem for prompt in rollout.prompts], rollout.completions)
        own: list[Sequence[Place] | None] = [*split(places, self.rows_per_micro_batch)]
        own += [None] * (self.parallel.dp.max(len(own)) - len(own))
        totals: Counter[str] = Counter()
        for part in own:
            totals.update(self._backward(rollout, part, first))
        if first:
            self.gap.finish_rollout(self.parallel.world)
        sums = self.parallel.world.sum_dict({n: value / self.parallel.sp_group.size for n, value in totals.items()})
        metrics = {**sums, **self.optimizer_step_clipped()}
        total = metrics.pop("weight_sum", 0.0) or 1.0  # below one with Dr.GRPO's constant, or with masked samples
        plain = ("loss", "grad_norm", "lr")
        return {name: value if name in plain else value / total for name, value in metrics.items()}

    def _backward(self, rollout: Rollout, part: Sequence[Place] | None, first: bool) -> dict[str, float]:
        """A micro-batch forwards and backwards; None waits through one, for sharded weights are gathered by all."""
        if part is None:
            self.manual_backward(self._idle() * 0)
            return {}
        rows = Rows.of(part, self.device)
        reference = self._reference_mean(rows)
        scores = self._score(self.entry, rows)
        index, logp = rows.row_index, scores.logp
        if first:
            self.gap.add_tokens(rollout.sampler_logp[index], logp)
        old = logp.detach() if first else rollout.old_logp[index]
        old_mean = scores.mean.detach() if first else rows.old_mean
        steps = DrawnSteps(scores.mean, rows.std, rows.length, old_mean, reference)
        tokens = Tokens(logp, old.detach(), rollout.advantages[index], rows.sample_index, steps=steps)
        result = self.algorithm.loss_of_steps(tokens, rollout.weights[rows.sample_index].to(logp.device))
        self.manual_backward(result.loss)
        return {"loss": result.loss.item(), **{name: value.item() for name, value in result.metrics.items()}}

    def _score(self, entry: Entry, rows: Rows) -> Scores:
        def forward() -> tuple[Tensor, Tensor]:
            found = score(self.family, entry.model, rows)
            return found.logp, found.mean

        return Scores(*entry(forward))

    @torch.no_grad()
    def _reference_mean(self, rows: Rows) -> Tensor | None:
        if not self._reference:
            return None
        (entry,) = self._reference
        with adapters_off(self.family, entry.model):
            mean = self._score(entry, rows).mean
        entry.release()
        return mean

    def _idle(self) -> Tensor:
        """A forward pass of one row of nothing, for a rank that has fewer micro-batches than others."""
        latents = torch.zeros(1, *self.family.latent_shape(), device=self.device)
        timesteps, text = torch.zeros(1, device=self.device), [self.family.negative_prompt]
        if self._reference:
            (entry,) = self._reference
            with torch.no_grad(), adapters_off(self.family, entry.model):
                entry(lambda: velocity_of(self.family, entry.model, latents, timesteps, text, 1.0))
            entry.release()
        return self.entry(lambda: velocity_of(self.family, self.model, latents, timesteps, text, 1.0)).sum()

    # -- evaluation ----------------------------------------------------------------------------------------------

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, "val")

    @override
    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def _evaluate(self, batch: Batch, stage: str) -> None:
        """Adds up the reward and every part of it, also per category of prompts."""
        for group in batch.groups or []:
            self._evaluated.add_rewards(group, stage, by_category=True)
