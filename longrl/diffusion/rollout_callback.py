"""Fills a batch of prompts with pictures or videos before the step reads it: sample, decode, reward, select."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from longrl.callbacks.rollout import MAX_EMPTY_STEPS
from longrl.diffusion.diffusion_module import DiffusionModule
from longrl.diffusion.sampler import DiffusionSampling, Trajectory, draw_seeded
from longrl.diffusion.steps import Step
from longrl.engines.rollout_engine import prompt_seed, sampling_ids
from longrl.modules.trained import reward_metrics
from longrl.rewards import RewardSum
from longrl.types import Batch, Group, Row, TextPrompt


@dataclass(frozen=True)
class Decoded:
    """A sample as rewards and reports see it."""

    frames: Tensor
    """[F, 3, H, W] uint8."""


class DiffusionRolloutCallback(Callback):
    """Samples with the module's own weights: `batch.prompts` become `batch.groups`.

    A sample depends on the weights, the seed, the number of the rollout, its prompt's id and its place in the group,
    whatever rank or process it is drawn in; a prompt that comes again in a batch gets others. So a resumed run draws
    what the uninterrupted one would have drawn.

    Args:
        reward: of functions `(frames [F, 3, H, W] uint8, row) -> float`.
        sampling: of training rollouts.
        eval_sampling: of validation and test; None is the plain ODE, one sample of each prompt, four times the steps.
        samples_per_batch: drawn and decoded together; bounds memory.
        seed: of all noise, and of windows that are drawn.
    """

    def __init__(
        self,
        reward: RewardSum,
        sampling: DiffusionSampling | None = None,
        eval_sampling: DiffusionSampling | None = None,
        samples_per_batch: int = 8,
        seed: int = 0,
    ) -> None:
        if samples_per_batch < 1:
            raise ValueError(f"rollout.samples_per_batch must be at least 1, got {samples_per_batch}")
        self.reward = reward
        self.sampling = sampling or DiffusionSampling()
        self.eval_sampling = eval_sampling or dataclasses.replace(
            self.sampling, num_generations=1, window=None, num_steps=4 * self.sampling.num_steps
        )
        self.samples_per_batch = samples_per_batch
        self.seed = seed
        self._num_rollouts = 0
        self._empty_steps = 0
        self._metrics: dict[str, float] = {}
        self._errors: list[str] = []
        """Of the last rollout's rewards."""

    # -- hooks ---------------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        pl_module.family.latent_shape()  # a size that the model does not have is an error now
        if stage == "fit":
            pl_module.algorithm.validate_steps(self.sampling.num_generations, pl_module.steps_per_rollout)
            if not any(step.std for step in self._steps(pl_module, self.sampling)):
                raise ValueError(
                    "no denoising step draws noise, so there is nothing to train; set rollout.sampling.window "
                    "to longrl.diffusion.windows.all_steps, and noise_level of its dynamics above 0"
                )
        self.reward.prepare()  # a missing package or folder is found before weights are loaded

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        found = self.sample(pl_module, batch.prompts, self.sampling, f"rollout {self._num_rollouts}")
        if self._num_rollouts == 0:
            self._check_rewards(pl_module, found)
        self._num_rollouts += 1
        batch.groups = pl_module.algorithm.select(found)
        data = pl_module.parallel.dp
        self._count_empty(data.max(sum(int(group.valid.any()) for group in batch.groups)))
        means = {name: value / data.size for name, value in rollout_metrics(found).items()}
        self._metrics = data.sum_dict(means | {"rollout/groups_kept": float(len(batch.groups))})

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        seconds = {f"time/{name}": value for name, value in pl_module.phases.collect().items()}
        pl_module.log_dict(self._metrics | seconds, batch_size=1)
        pl_module.log("reward", self._metrics["reward/mean"], prog_bar=True, logger=False, batch_size=1)

    @override
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        batch.groups = self.sample(pl_module, batch.prompts, self.eval_sampling, "evaluation")

    @override
    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        batch.groups = self.sample(pl_module, batch.prompts, self.eval_sampling, "evaluation")

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.phases.collect()  # its seconds belong to no step

    @property
    @override
    def state_key(self) -> str:
        return "FlowRolloutCallback"  # the name in checkpoints, from before the class had its own

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"num_rollouts": self._num_rollouts, "empty_steps": self._empty_steps}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._num_rollouts, self._empty_steps = state_dict["num_rollouts"], state_dict["empty_steps"]

    # -- work ----------------------------------------------------------------------------------------------------

    def _count_empty(self, num_useful: int) -> None:
        """Ends a run that has nothing left to learn from."""
        self._empty_steps = 0 if num_useful else self._empty_steps + 1
        if self._empty_steps == MAX_EMPTY_STEPS:
            raise RuntimeError(
                f"in {MAX_EMPTY_STEPS} steps in a row no group was of use: every reward failed, or "
                "model.algorithm.select dropped every group. Check the rewards (warnings above say what failed), or "
                "set model.algorithm.select to longrl.algorithms.keep_all"
            )

    def _check_rewards(self, policy: DiffusionModule, groups: Sequence[Group]) -> None:
        """Ends a run at once whose reward fails on everything that it sees."""
        errors = [text for own in policy.parallel.world.gather(self._errors[:1]) for text in own]
        if errors and not policy.parallel.world.max(sum(int(group.valid.any()) for group in groups)):
            raise ValueError(
                f"the reward failed on every sample of the first rollout, first with {errors[0]}; for a diffusion "
                "model a function gets frames [F, 3, H, W] and the row, so correct it, or take one for pictures and "
                "videos (configs/reward/colour.yaml and its like) where it was made for texts (think_answer.yaml)"
            )

    def sample(
        self, policy: DiffusionModule, rows: Sequence[Row], sampling: DiffusionSampling, name: str
    ) -> list[Group]:
        """The groups of all prompts, scored; every rank of the run must call it.

        Args:
            policy: whose weights are read.
            rows: P prompts.
            sampling: how to draw.
            name: of the rollout; another one draws other samples.
        """
        steps, count = self._steps(policy, sampling), sampling.num_generations
        ids = sampling_ids([row.id for row in rows], policy.parallel.dp)
        wanted = [(row, own, place) for row, own in zip(rows, ids, strict=True) for place in range(count)]
        with policy.phases("encode"):
            policy.family.conditions.prepare(
                [policy.family.negative_prompt, *(row.problem for row in rows)], policy.device
            )
        with policy.phases("generate"), policy.sampling():
            samples = self._draw(policy, wanted, sampling, steps, name)
        samples = [dataclasses.replace(sample, decode=lambda one: policy.decode([one])[0]) for sample in samples]
        groups = [
            Group(TextPrompt(row), samples[index * count : (index + 1) * count])  # type: ignore[arg-type]
            for index, row in enumerate(rows)
        ]
        self._score(policy, groups)
        return groups

    def _steps(self, policy: DiffusionModule, sampling: DiffusionSampling) -> list[Step]:
        return sampling.steps(*policy.family.schedule(sampling.num_steps), self._num_rollouts, self.seed)

    def _draw(
        self,
        policy: DiffusionModule,
        wanted: Sequence[tuple[Row, str, int]],
        sampling: DiffusionSampling,
        steps: Sequence[Step],
        name: str,
    ) -> list[Trajectory]:
        base, guidance, shape = prompt_seed(self.seed, name), sampling.guidance_scale, policy.family.latent_shape()
        found: list[Trajectory] = []
        for start in range(0, len(wanted), self.samples_per_batch):
            part = wanted[start : start + self.samples_per_batch]
            texts = [row.problem for row, _, _ in part]
            seeds = [prompt_seed(base, f"{own}/{place}") for _, own, place in part]
            starts = [prompt_seed(base, own) for _, own, _ in part] if sampling.same_start else None
            found += draw_seeded(
                lambda latents, timesteps, texts=texts: policy.policy(latents, timesteps, texts, guidance),
                shape, steps, seeds, guidance, policy.device, starts,
            )  # fmt: skip
        return found

    def _score(self, policy: DiffusionModule, groups: list[Group]) -> None:
        """Fills rewards; frames live no longer than that."""
        with policy.phases("decode"):
            flat = [sample for group in groups for sample in group.completions]
            parts = [flat[i : i + self.samples_per_batch] for i in range(0, len(flat), self.samples_per_batch)]
            frames = [Decoded(frame) for part in parts for frame in policy.decode(part)]
        with policy.phases("reward"):
            count = len(groups[0].completions) if groups else 0
            shown = [
                dataclasses.replace(group, completions=frames[index * count : (index + 1) * count])
                for index, group in enumerate(groups)
            ]
            self._errors = []
            self.reward.score(shown, self._errors)
        for group, scored in zip(groups, shown, strict=True):
            group.rewards, group.reward_parts, group.valid = scored.rewards, scored.reward_parts, scored.valid


def rollout_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """What the curves show of all that was sampled in a step, selected or not."""
    return reward_metrics(groups) | {"rollout/first_scored_step": float(groups[0].completions[0].steps[0].index)}
