"""The policy of a diffusion model: one LightningModule for RL of pictures and videos on its own samples.

Letters: P prompts of a batch, G samples of each, C = P * G, W steps of a window, N = C * W rows of a rollout or
mini-batch, R of a micro-batch, D values of a latent. All are this rank's; sums over ranks are taken where a formula
needs them.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from longrl.algorithms import Algorithm, DrawnSteps, LossOutput
from longrl.diffusion.diffusion_family import DiffusionFamily
from longrl.diffusion.objective_step import objective_losses, one_token_each
from longrl.diffusion.objectives import Objective
from longrl.diffusion.old_policy import OLD_PREFIX
from longrl.diffusion.prompt_files import PromptBatch
from longrl.diffusion.sampler import Trajectory
from longrl.diffusion.step_mismatch import StepMismatchMonitor
from longrl.diffusion.trajectory_rows import (
    RowBatch,
    TrajectoryRow,
    score_rows,
    split_rows,
    trajectory_record,
    trajectory_rows,
)
from longrl.io.number_ranges import LIMIT_OR_ZERO, check_ranges
from longrl.io.pulse import PULSE
from longrl.models.ema import EMA_PREFIX, EMASettings, EMAWeights, holds_ema
from longrl.modules.initial_weights import plain_from
from longrl.modules.mini_batches import MiniBatch, flatten_groups, make_mini_batches
from longrl.modules.moving_reference import swapped
from longrl.modules.optimizer import OptimizerSettings
from longrl.modules.step_statistics import StepSums, UpdateMeans
from longrl.modules.trained import TrainedModule
from longrl.types import TextPrompt

AVERAGES = {"ema_weights": EMA_PREFIX, "old_weights": OLD_PREFIX}
"""Attributes with averages of the trained weights -> where checkpoints have them."""


class DiffusionModule(TrainedModule):
    """Trains SD3 or Wan by RL on batches whose groups `DiffusionRolloutCallback` filled.

    A sample is a completion and a denoising step of its window a token, so algorithms and mini-batches are those of
    `PolicyModule`. Losses are sums under weights that add up to one over the whole optimizer step, so any split into
    micro-batches gives the same gradient.

    Args:
        family: which model, and how it is read; configs/family/ has one file per model.
        algorithm: the RL objective: configs/algorithm/flow_grpo.yaml and its like.
        optimizer: AdamW and its schedule.
        init_from: initial weights: a Lightning checkpoint or run folder, an exported pipeline or a hub id. Also the
            reference policy of the KL penalty. To go on with an interrupted run use `--ckpt_path` instead.
        rows_per_micro_batch: denoising steps scored in one forward pass, of any samples; with guidance each is two.
            Bounds memory, changes no gradient.
        mini_batches_per_rollout: optimizer steps one rollout is cut into.
        epochs_per_rollout: how often a rollout is gone through.
        max_grad_norm: gradient norm limit; 0 switches it off.
        max_nonfinite_steps: so many optimizer steps in a row whose loss or gradient norm is not finite end the run; a
            single one is left out, and its batch kept in `run_dir/nonfinite_steps`.
        max_mismatch: largest mean difference between the log-probabilities of a rollout's steps when they were drawn
            and in its first update; above it the run ends. They are means over a latent, as what the algorithm clips,
            and the default is ten of its usual ranges of 1e-4. In float32 the difference is about 1e-7; in bfloat16
            kernels may round otherwise in batches of another size, so raise it there if `train/mismatch_mean` comes
            near.
        ema: keep a moving average of the trained weights: validation, test and `export` take it, training and
            `init_from` of another run the weights themselves. None keeps none; the recipes do, as the released ones.
        objective: what is learned of finished samples, in place of the algorithm's loss of denoising steps, of which
            advantages and selection stay: `DiffusionNFT`, `DiffusionDPO` or `BestOfGroup` of
            longrl/diffusion/objectives.py. None is the algorithm's loss.
    """

    family: DiffusionFamily
    ema_weights: EMAWeights | None
    """The averages, once there are weights; saved in checkpoints."""
    old_weights: EMAWeights | None
    """Those of the policy that samples, where the objective has an old one; saved in checkpoints."""

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
        max_nonfinite_steps: int = 3,
        max_mismatch: float = 1e-3,
        ema: EMASettings | None = None,
        objective: Objective | None = None,
    ) -> None:
        if min(rows_per_micro_batch, mini_batches_per_rollout, epochs_per_rollout) < 1:
            raise ValueError(
                "model.rows_per_micro_batch, model.mini_batches_per_rollout and model.epochs_per_rollout must be at "
                f"least 1, got {rows_per_micro_batch}, {mini_batches_per_rollout} and {epochs_per_rollout}"
            )
        check_ranges(locals(), "model.", max_mismatch=LIMIT_OR_ZERO)
        super().__init__(
            family, algorithm, optimizer, init_from, mini_batches_per_rollout, epochs_per_rollout, max_grad_norm,
            max_nonfinite_steps,
        )  # fmt: skip
        self.rows_per_micro_batch = rows_per_micro_batch
        self.ema = ema
        self.ema_weights = None
        self.objective = objective
        self.old_weights = None
        self.mismatch_monitor = StepMismatchMonitor(max_mismatch)
        """Compares the sampler's log-probabilities with those of the first update of every rollout."""

    # -- building ------------------------------------------------------------------------------------------------

    @override
    def is_rl(self) -> bool:
        return True

    @override
    def needs_reference(self) -> bool:
        return super().needs_reference() if self.objective is None else self.objective.needs_reference

    @override
    def build_model(self) -> nn.Module:
        model = plain_from(self.family, self.init_from)
        if self.family.lora is not None:
            self.family.add_adapters(model)
        size = self.parallel.sp_group.size
        if size > 1:
            self.family.shard_tokens(model, self.parallel.degrees[size])
        return model

    @override
    def configure_model(self) -> None:
        if self.is_built:
            return
        super().configure_model()
        self._begin_averages()

    def _begin_averages(self) -> None:
        """Averages that are wanted and not there begin with the weights as they are."""
        if self.ema is not None and self.ema_weights is None:
            self.ema_weights = EMAWeights(self.model, self.ema)
        old = None if self.objective is None else self.objective.old_policy
        if old is not None and self.old_weights is None:
            self.old_weights = EMAWeights(self.model, old)

    @override
    def before_load(self, checkpoint: Path) -> None:
        super().before_load(checkpoint)
        # A checkpoint without averages is read into a module without: they will begin with its weights.
        for name, prefix in AVERAGES.items():
            if not holds_ema(checkpoint, prefix):
                setattr(self, name, None)

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        state = checkpoint.get("state_dict", {})  # MRSPStrategy has read the weights already
        for attribute, prefix in AVERAGES.items():
            averages = [name for name in state if name.startswith(prefix)]
            if state and not averages:
                setattr(self, attribute, None)
            if getattr(self, attribute) is None:  # a run that goes on without averages
                for name in averages:
                    del state[name]

    @override
    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.family.move_frozen_parts(self.device)

    @override
    def on_train_start(self) -> None:
        super().on_train_start()
        self._begin_averages()

    @override
    def on_validation_start(self) -> None:
        self.family.move_frozen_parts(self.device)
        self._read_averages()

    on_test_start = on_validation_start

    @override
    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self._read_averages()  # on with them, if a signal has saved the weights meanwhile

    on_test_batch_end = on_validation_batch_end

    def _read_averages(self) -> None:
        if self.ema_weights is not None:
            self.policy.release_root()  # gathered weights are of before
            self.ema_weights.swap_in()

    @override
    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        if self.ema_weights is not None:  # a signal may save amid a validation: the weights, not their averages
            self.ema_weights.swap_out()
        return super().state_dict(*args, **kwargs)

    # -- sampling ------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def gathered_weights(self) -> Iterator[None]:
        """Inside, `policy(latents, timesteps, texts, guidance_scale)` reads the current weights, all of them.

        Ranks need not go in step meanwhile. Every rank of the run must enter.
        """
        with torch.no_grad(), self.trainer.precision_plugin.forward_context(), self.policy.unsharded():
            yield

    @contextlib.contextmanager
    def sampling_weights(self) -> Iterator[None]:
        """Inside, the policy has the weights that sample for training: the old policy's, if the objective has one."""
        with contextlib.nullcontext() if self.old_weights is None else swapped(self.old_weights, self.policy):
            yield

    @torch.no_grad()
    def decode_samples(self, trajectories: Sequence[Trajectory]) -> Tensor:
        """[B, F, 3, H, W] uint8 frames of samples, on the CPU."""
        latents = torch.stack([trajectory.final for trajectory in trajectories]).to(self.device)  # [B, ...]
        return self.family.decode_latents(latents).cpu()

    # -- steps ---------------------------------------------------------------------------------------------------

    @override
    def update_policy(self, batch: PromptBatch) -> dict[str, float]:
        """The optimizer steps on one rollout; metrics are the mean over them. No groups on any rank, no step."""
        groups = batch.groups
        if groups is None:
            raise ValueError(
                "nothing samples pictures for this batch; set rollout.reward (configs/reward/ has examples)"
            )
        dp = self.parallel.dp
        if dp.max(len(groups)) == 0:
            return {}
        flat = flatten_groups(groups, self.device)
        if self.objective is not None:
            flat = one_token_each(flat)
        mini_batches = make_mini_batches(
            flat, self.mini_batches_per_rollout, self.algorithm, dp, old_logp=flat.sampler_logp, ref_logp=None,
            task_deviations=self.deviations_of(flat),
        )  # fmt: skip
        updates = UpdateMeans()
        for number, mini_batch in enumerate(mini_batches * self.epochs_per_rollout):
            updates.add(self._update(mini_batch, number == 0, number // len(mini_batches)))
        means = updates.collect()
        if self.old_weights is not None:
            self.old_weights.update(self.trainer.global_step)
            means["nft_old_decay"] = self.old_weights.settings.decay_at(self.trainer.global_step) or 0.0
        return means | self.watch_batches(mini_batches) | self.mismatch_monitor.metrics

    def _update(self, mini_batch: MiniBatch[TextPrompt, Trajectory], is_first: bool, epoch: int) -> dict[str, float]:
        """One optimizer step. The weights that sampled are those of the first: its ratios are 1 exactly."""
        # 1. Micro-batches of rows; as many on every rank, for sharded weights are gathered by all.
        local = self._micro_batches(mini_batch, is_first, epoch)
        num_missing = self.parallel.dp.max(len(local)) - len(local)

        # 2. Forward and backward; gradients add up.
        step_sums = StepSums()
        for loss_of in local:
            PULSE.beats += 1
            result = loss_of()
            self.manual_backward(result.loss)
            step_sums.add({"loss": result.loss, **result.metrics})
        for _ in range(num_missing):
            self.manual_backward(self._idle_forward().sum() * 0)

        # 3. Before the weights change: are samples scored as they were drawn?
        if is_first and self.objective is None:
            self.mismatch_monitor.finish_rollout(self.parallel.world)

        # 4. Every rank that shares a sample has counted it; then the step.
        sp_size = self.parallel.sp_group.size
        totals = step_sums.collect()
        sums = self.parallel.world.sum_dict({name: value / sp_size for name, value in totals.items()})
        steps_before = self.trainer.global_step
        step = self.optimizer_step_clipped(sums["loss"], functools.partial(trajectory_record, mini_batch))
        if self.ema_weights is not None and self.trainer.global_step > steps_before:
            self.ema_weights.update(self.trainer.global_step)
        return {**sums, **step}

    def _micro_batches(
        self, mini_batch: MiniBatch[TextPrompt, Trajectory], is_first: bool, epoch: int
    ) -> list[Callable[[], LossOutput]]:
        """The loss of each micro-batch, to be called in turn."""
        if self.objective is not None:
            return objective_losses(self, self.objective, mini_batch, epoch)
        parts = split_rows(trajectory_rows(mini_batch.groups), self.rows_per_micro_batch)
        return [functools.partial(self._rows_loss, mini_batch, part, is_first) for part in parts]

    def _rows_loss(
        self, mini_batch: MiniBatch[TextPrompt, Trajectory], part: Sequence[TrajectoryRow], is_first: bool
    ) -> LossOutput:
        """The algorithm's objective on a micro-batch."""
        rows = RowBatch.from_rows(part, self.device)
        ref_mean = None if self.reference is None else score_rows(self.reference_velocity, rows).mean  # [R, D]
        scores = score_rows(self.policy, rows)
        index = rows.row_index
        if is_first:
            self.mismatch_monitor.add_tokens(mini_batch.sampler_logp[index], scores.logp, mini_batch.staleness[index])
            old_logp = scores.logp.detach()  # [R]
            old_mean = scores.mean.detach()  # [R, D]
        else:
            assert mini_batch.old_logp is not None
            old_logp = mini_batch.old_logp[index]
            old_mean = rows.old_mean
        steps = DrawnSteps(scores.mean, rows.std, rows.length, old_mean, ref_mean)
        advantages = mini_batch.advantages[index]  # [R]
        weights = mini_batch.weights[rows.sample_index].to(old_logp.device)  # [R]
        return self.algorithm.loss(scores.logp, old_logp, None, None, advantages, weights, rows.sample_index, steps)

    @torch.no_grad()
    def reference_velocity(self, *inputs: Any) -> Tensor:
        """[R, ...] velocities by the reference, of what the policy reads."""
        assert self.reference is not None
        with self.reference_weights():
            velocity: Tensor = self.reference(*inputs)
        return velocity

    def _idle_forward(self) -> Tensor:
        """Velocities of one row of nothing, for a rank that has fewer micro-batches than others."""
        inputs = self.idle_inputs()
        if self.reference is not None:
            self.reference_velocity(*inputs)
        return self.policy(*inputs)

    def idle_inputs(self) -> tuple[Tensor, Tensor, list[str], float]:
        """One row of nothing, as the policy reads it."""
        latents = torch.zeros(1, *self.family.latent_shape(), device=self.device)
        return latents, torch.zeros(1, device=self.device), [self.family.negative_prompt], 1.0

    # -- evaluation ----------------------------------------------------------------------------------------------

    @override
    def validation_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """Adds up the reward and every part of it, also per category of prompts."""
        stage = "test" if self.trainer.testing else "val"
        for group in batch.groups or []:
            self._eval_means.add_rewards(group, stage, by_category=True)

    test_step = validation_step

    @override
    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        if self.ema_weights is not None:  # before the end of validation, where checkpoints are saved
            self.policy.release_root()
            self.ema_weights.swap_out()

    on_test_epoch_end = on_validation_epoch_end
