"""Fills a batch of prompts with pictures or videos before the step reads it: sample, decode, reward, select."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from typing_extensions import override

from longrl.callbacks.reward_watch import RewardWatch
from longrl.callbacks.rollout import MAX_EMPTY_STEPS
from longrl.diffusion.diffusion_module import DiffusionModule
from longrl.diffusion.prompt_files import PromptBatch
from longrl.diffusion.sampler import DiffusionSampling, Trajectory, sample_trajectories
from longrl.diffusion.steps import DenoisingStep
from longrl.diffusion.trajectory_rows import TrajectoryGroup
from longrl.engines.rollout_engine import prompt_seed, sampling_ids
from longrl.modules.rollout_means import mean_over_ranks, reward_values
from longrl.rewards import RewardSum
from longrl.rewards.failures import Failure
from longrl.types import Group, Row, TextPrompt

logger = logging.getLogger(__name__)

MAX_GAIN = 5.0
"""Deviations that a step's mean may move by for a velocity that changes by 1: more than three times FlowSDE's most."""


@dataclass(frozen=True)
class DecodedSample:
    """A sample as rewards see it."""

    frames: Tensor
    """[F, 3, H, W] uint8."""


class DiffusionRolloutCallback(Callback):
    """Samples with the module's own weights: `batch.prompts` become `batch.groups`.

    A sample depends on the weights, the seed, the number of the rollout, its prompt's id and its index in the group,
    whatever rank or process it is drawn in; a prompt that comes again in a batch gets others. So a resumed run draws
    what the uninterrupted one would have drawn.

    Args:
        reward: of functions `(frames [F, 3, H, W] uint8, row) -> float`.
        sampling: how training rollouts are drawn: group size, denoising steps, noise.
        eval_sampling: of validation and test; None is the plain ODE, one sample of each prompt, four times the steps.
        samples_per_batch: drawn and decoded together; bounds memory.
        seed: of all noise, and of windows that are drawn.
        warn_without_signal_after: warn once after so many steps in a row in which no group had anything to learn from,
            with the likely causes; 0 never.
    """

    def __init__(
        self,
        reward: RewardSum,
        sampling: DiffusionSampling | None = None,
        eval_sampling: DiffusionSampling | None = None,
        samples_per_batch: int = 8,
        seed: int = 0,
        warn_without_signal_after: int = 10,
    ) -> None:
        if samples_per_batch < 1:
            raise ValueError(f"rollout.samples_per_batch must be at least 1, got {samples_per_batch}")
        self.reward = reward
        self.sampling = sampling or DiffusionSampling()
        self.eval_sampling = eval_sampling or replace(
            self.sampling, num_generations=1, window=None, num_steps=4 * self.sampling.num_steps
        )
        self.samples_per_batch = samples_per_batch
        self.seed = seed
        self._num_rollouts = 0
        self._empty_steps = 0
        self._warned_of_faint = False
        self._metrics: dict[str, float] = {}
        self._watch = RewardWatch(warn_without_signal_after)
        self._sampled: list[TrajectoryGroup] = []
        """Groups drawn for this step, selected or not."""

    # -- hooks ---------------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        assert isinstance(pl_module, DiffusionModule)
        pl_module.family.latent_shape()  # a size that the model does not have is an error now
        if stage == "fit" and pl_module.objective is not None:
            pl_module.objective.validate(pl_module.algorithm, self.sampling)
        elif stage == "fit":
            pl_module.algorithm.validate_steps(self.sampling.num_generations, pl_module.steps_per_rollout)
            if not any(step.std for step in self._steps(pl_module, self.sampling)):
                raise ValueError(
                    "no denoising step draws noise, so there is nothing to train; set rollout.sampling.window to "
                    "longrl.diffusion.windows.all_steps, and noise_level of its dynamics above 0"
                )
        self.reward.prepare()  # a missing package or folder is found before weights are loaded

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: PromptBatch, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, DiffusionModule)
        dp = pl_module.parallel.dp
        name = f"rollout {self._num_rollouts}"
        with pl_module.sampling_weights():
            groups = self.sample_groups(pl_module, batch.prompts, self.sampling, name, self._watch.failures)
        self._sampled = groups
        self._watch.end_if_hopeless(groups, pl_module.parallel)
        self._num_rollouts += 1
        batch.groups = pl_module.algorithm.select(groups)
        self._count_empty_steps(dp.max(num_useful_groups(batch.groups)))
        counts = {"rollout/groups_kept": float(len(batch.groups))}
        steps = groups[0].completions[0].steps
        if steps:
            counts["rollout/first_scored_step"] = steps[0].index / dp.size
        self._metrics = mean_over_ranks(reward_values(groups), dp) | dp.sum_dict(counts)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PromptBatch, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, DiffusionModule)
        seconds = {f"time/{name}": value for name, value in pl_module.phases.collect().items()}
        pl_module.log_dict(self._metrics | seconds, batch_size=1)
        pl_module.log("reward", self._metrics["reward/mean"], prog_bar=True, logger=False, batch_size=1)
        self._watch.end_step(pl_module, self._sampled)
        self._sampled = []

    @override
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: PromptBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        assert isinstance(pl_module, DiffusionModule)
        batch.groups = self.sample_groups(pl_module, batch.prompts, self.eval_sampling, "evaluation")

    on_test_batch_start = on_validation_batch_start

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, DiffusionModule)
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
        self._num_rollouts = state_dict["num_rollouts"]
        self._empty_steps = state_dict["empty_steps"]

    # -- rollouts ------------------------------------------------------------------------------------------------

    def sample_groups(
        self,
        module: DiffusionModule,
        rows: Sequence[Row],
        sampling: DiffusionSampling,
        name: str,
        failures: list[Failure] | None = None,
    ) -> list[TrajectoryGroup]:
        """The groups of all prompts, scored; every rank of the run must call it.

        Args:
            module: has the weights.
            rows: P prompts.
            sampling: how to draw.
            name: of the rollout; another one draws other samples.
            failures: gets what could not be rewarded.
        """
        # 1. Prompts: each distinct one is encoded once, before sampling needs the memory.
        texts = [row.problem for row in rows]
        with module.phases("encode"):
            module.family.conditions.prepare([module.family.negative_prompt, *texts], module.device)

        # 2. Samples, prompt after prompt, in batches of any prompts. Each has a seed of its own.
        steps = self._steps(module, sampling)
        count = sampling.num_generations
        trajectories: list[Trajectory] = []
        base_seed = prompt_seed(self.seed, name)
        ids = sampling_ids([row.id for row in rows], module.parallel.dp)
        requests = [(text, id_, index) for text, id_ in zip(texts, ids, strict=True) for index in range(count)]
        with module.phases("generate"), module.gathered_weights():
            for start in range(0, len(requests), self.samples_per_batch):
                part = requests[start : start + self.samples_per_batch]
                start_seeds = [prompt_seed(base_seed, id_) for _, id_, _ in part] if sampling.same_start else None
                trajectories += sample_trajectories(
                    module.policy,
                    [text for text, _, _ in part],
                    [prompt_seed(base_seed, f"{id_}/{index}") for _, id_, index in part],
                    steps,
                    shape=module.family.latent_shape(),
                    guidance_scale=sampling.guidance_scale,
                    device=module.device,
                    start_seeds=start_seeds,
                )

        # 3. Frames, which live until they are rewarded.
        decoded: list[DecodedSample] = []
        with module.phases("decode"):
            for start in range(0, len(trajectories), self.samples_per_batch):
                frames = module.decode_samples(trajectories[start : start + self.samples_per_batch])
                decoded += [DecodedSample(sample) for sample in frames]  # [F, 3, H, W] each

        # 4. Rewards.
        spans = [slice(index * count, (index + 1) * count) for index in range(len(rows))]
        groups: list[Group[TextPrompt, Any]] = [
            Group(TextPrompt(row), decoded[span]) for row, span in zip(rows, spans, strict=True)
        ]
        with module.phases("reward"):
            self.reward.score(groups, failures)
        for group, span in zip(groups, spans, strict=True):
            group.completions = trajectories[span]
        return groups

    def _steps(self, module: DiffusionModule, sampling: DiffusionSampling) -> list[DenoisingStep]:
        sigmas, timesteps = module.family.denoising_schedule(sampling.num_steps)
        steps = sampling.steps(sigmas, timesteps, self._num_rollouts, self.seed)
        faint = [step for step in steps if step.gain > MAX_GAIN]
        if faint and not self._warned_of_faint:
            self._warned_of_faint = True
            warn_of_faint_step(faint[0])
        return steps

    # -- runs without reward -------------------------------------------------------------------------------------

    def _count_empty_steps(self, num_useful: int) -> None:
        """Ends a run that has nothing left to learn from."""
        self._empty_steps = 0 if num_useful else self._empty_steps + 1
        if self._empty_steps == MAX_EMPTY_STEPS:
            raise RuntimeError(self._watch.uselessness(MAX_EMPTY_STEPS, "Warnings above say what failed"))


@rank_zero_only
def warn_of_faint_step(step: DenoisingStep) -> None:
    """Says which step draws too little noise for how far it moves, as late ones of CPS do."""
    logger.warning(
        "denoising step %d ends at sigma %.3g with noise of deviation %.2g, and a velocity that changes by 1 moves it "
        "%.0f deviations (at most %g are sound): its ratios are clipped at once and its KL outweighs other steps'. "
        "With CPS train earlier steps alone, by rollout.sampling.window with class_path "
        "longrl.diffusion.windows.RandomWindow and init_args.end %d or less (the released recipes: half of the steps), "
        "or give rollout.sampling.dynamics the class_path longrl.diffusion.steps.FlowSDE",
        step.index, step.next_sigma, step.std, step.gain, MAX_GAIN, step.index,
    )  # fmt: skip


def num_useful_groups(groups: Sequence[TrajectoryGroup]) -> int:
    """Groups of which some sample could be rewarded."""
    return sum(bool(group.valid.any()) for group in groups)
