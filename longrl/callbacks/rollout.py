"""Fills a batch with rollouts before the step reads it: encode, sync, generate, reward, select, resample."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from longrl.callbacks.async_groups import AsyncGroups
from longrl.callbacks.batch_groups import BatchGroups
from longrl.callbacks.environment_rollouts import EnvironmentRollouts
from longrl.callbacks.frame_order import FrameOrder, check_categories, check_frame_order, order_values
from longrl.callbacks.group_metrics import group_metrics
from longrl.callbacks.group_scores import scored_groups
from longrl.callbacks.lost_servers import DataPosition, saved_without_servers
from longrl.callbacks.reward_watch import RewardWatch
from longrl.callbacks.rollout_checks import (
    check_engine_ranks,
    check_frozen_encoder,
    check_judges,
    check_rollout_options,
    compare_engine,
    is_filtered,
    training_limits,
)
from longrl.callbacks.rollout_steps import GroupSource, RolloutSteps
from longrl.callbacks.staleness_checks import check_stale_tokens
from longrl.callbacks.staleness_metrics import staleness_metrics
from longrl.callbacks.turn_metrics import turn_metrics
from longrl.datamodules.loading.schedules import Schedule, check_length_schedule
from longrl.engines.hf import HFEngine
from longrl.engines.rollout_engine import RolloutEngine, RolloutRequest
from longrl.environments.settings import EnvironmentSettings
from longrl.io.number_ranges import LIMIT_OR_ZERO, NOT_NEGATIVE, check_ranges
from longrl.modules.mismatch import MismatchMonitor
from longrl.modules.policy import PolicyModule, all_media
from longrl.modules.rollout_means import mean_over_ranks, rollout_metrics
from longrl.modules.trained import data_module_of
from longrl.rewards import RewardSum
from longrl.strategies.parallel import Parallel
from longrl.types import Batch, Group, Metrics, Prompt, SamplingParams

logger = logging.getLogger(__name__)

MAX_EMPTY_STEPS = 10
"""So many steps without a single group end the run."""


class RolloutCallback(Callback):
    """Drives a rollout engine: `batch.prompts` become `batch.groups`, and `batch.features` what they were made of.

    Training batches with SFT targets are left alone; validation, test and predict batches get greedy completions.

    Args:
        reward: scores completions.
        sampling: how training rollouts are drawn: group size, length, temperature.
        eval_sampling: of validation, test and prediction; None is greedy, one completion.
        engine: generates; None is the trainer's own model.
        max_resample_rounds: how many further batches of prompts dynamic sampling may draw per step.
        max_mismatch: an engine with weights of its own must agree with the trainer to this in the log-probability of
            every greedy token of the first batch, or the run ends before its first step.
        max_mean_mismatch: the same of the tokens of every step, on average; checked before the step changes the
            weights.
        bypass_old_logp_below: while the mean mismatch of the last step is below it, the engine's log-probabilities
            serve as those of the old policy, and the forward pass for them is saved; 0 never. Only a run that takes
            several optimizer steps per rollout has that pass.
        max_staleness: rollouts that may lie between the weights that sampled a token and the step that trains on it. 0:
            every step samples its own groups first. 1: the next step's are sampled during the update. From 2 on
            sampling goes on over several updates: what is under way is cut where weights change and goes on under the
            new ones, and a step takes the prompts that are finished, the oldest first. Importance ratios are to the
            weights that sampled, and the steps' change is part of the mismatch. Above 0 it needs an engine in another
            process.
        router_replay: train a mixture of experts by the experts that the engine chose for each token of prompt and
            completion, in the update and for the old log-probabilities (R3, arXiv:2510.11370); the gates' weights are
            the trainer's own. Needs an engine that returns them.
        frame_order: samples some completions more of each video with its frames shuffled, and gives right completions a
            bonus where order helps (T-GRPO); None: not.
        environment: answers the turns of completions, as a tool that shows a part of the video does; None: completions
            have one turn.
        warn_without_signal_after: warn once after so many steps in a row in which no group had anything to learn from,
            with the likely causes; 0 never.
        length_schedule: `sampling.max_completion_tokens` by optimizer step, at most what `sampling` says: engine,
            update and rewards are set up for that. Completions that begin during step s have the length of step s.
        seed: of the sampling; together with the number of the rollout and the prompt's id (and, of a prompt
            that comes again in a batch, which copy it is) it decides every completion.
    """

    def __init__(
        self,
        reward: RewardSum,
        sampling: SamplingParams | None = None,
        eval_sampling: SamplingParams | None = None,
        engine: RolloutEngine | None = None,
        max_resample_rounds: int = 3,
        seed: int = 0,
        max_mismatch: float = 0.5,
        max_mean_mismatch: float = 0.1,
        bypass_old_logp_below: float = 0.0,
        max_staleness: int = 0,
        warn_without_signal_after: int = 10,
        router_replay: bool = False,
        environment: EnvironmentSettings | None = None,
        length_schedule: Schedule | None = None,
        frame_order: FrameOrder | None = None,
    ) -> None:
        check_ranges(
            locals(),
            "rollout.",
            max_resample_rounds=NOT_NEGATIVE,
            max_mismatch=LIMIT_OR_ZERO,
            max_mean_mismatch=LIMIT_OR_ZERO,
            bypass_old_logp_below=LIMIT_OR_ZERO,
            max_staleness=NOT_NEGATIVE,
        )
        self.reward = reward
        self.sampling = sampling or SamplingParams()
        # Greedy, and one completion: every evaluation asks the same of the policy.
        self.eval_sampling = eval_sampling or replace(
            self.sampling, num_generations=1, temperature=0.0, top_p=1.0, top_k=0
        )
        self.engine = engine or HFEngine()
        self.max_resample_rounds = max_resample_rounds
        self.seed = seed
        self.max_staleness = max_staleness
        self.max_mismatch = max_mismatch
        self.bypass_old_logp_below = bypass_old_logp_below
        self.router_replay = router_replay
        self.environment = environment
        self.frame_order = frame_order
        self._environment = EnvironmentRollouts(environment)
        self._monitor = MismatchMonitor(max_mean_mismatch, bypass_old_logp_below, max_staleness)
        self._is_compared = self.engine.reads_policy_weights
        """True once engine and trainer are known to be one model."""
        self._parallel = Parallel()
        self._empty_steps = 0
        self._metrics: Metrics = {}
        self._watch = RewardWatch(warn_without_signal_after)
        self._data_before = DataPosition()
        self._sampled: list[Group] = []
        """Groups drawn for this step, selected or not."""
        self._steps = RolloutSteps(
            self.engine,
            reward,
            self.sampling,
            seed,
            self._environment,
            self._watch.failures,
            lengths=length_schedule,
            frame_order=frame_order,
        )
        self._source: GroupSource
        """Where a step's groups come from."""
        if max_staleness > 1:
            self._source = AsyncGroups(self._steps, max_staleness, max_resample_rounds)
        else:
            self._source = BatchGroups(self._steps, max_staleness == 1, max_resample_rounds)

    # -- setup ---------------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        assert isinstance(pl_module, PolicyModule)
        self._parallel = pl_module.parallel
        pl_module.family.router_replay = self.router_replay and stage == "fit" and pl_module.is_rl()
        self._steps.family = pl_module.family if self.engine.reads_policy_weights else pl_module.engine_family
        self._environment.setup(trainer, pl_module, self.engine)
        self.engine.check_installed()
        check_engine_ranks(self.engine, self._parallel.sp_group.size)
        max_prompt_tokens = data_module_of(trainer).renderer.max_prompt_tokens
        self.fit_lengths(max_prompt_tokens)
        self.engine.invalidate_weights()  # a stage may begin with other weights at the same step
        if stage == "fit" and pl_module.is_rl():
            check_length_schedule(self._steps.lengths, self.sampling.max_completion_tokens)
            resamples = self.max_resample_rounds > 0
            pl_module.algorithm.validate(self.sampling, pl_module.steps_per_rollout, self.max_staleness, resamples)
            self.reward.validate(self.sampling.max_completion_tokens)
            check_stale_tokens(pl_module, self.max_staleness, self.bypass_old_logp_below)
            if pl_module.consistency is not None:
                pl_module.consistency.check_parts(self.reward.names)
            has_turns = self.environment is not None
            check_frame_order(self.frame_order, pl_module, self.reward, self.max_staleness, has_turns)
            check_categories(self.frame_order, data_module_of(trainer).datasets["train"].rows)
            check_rollout_options(pl_module, self.engine, self.sampling, self.max_staleness, self.bypass_old_logp_below)
            if is_filtered(self.sampling):
                # The engine's log-probabilities are of another distribution: a mismatch says nothing.
                self._monitor.max_mismatch = math.inf
            # The update scores by the distribution that was sampled from; greedy completions count as drawn at 1.
            pl_module.temperature = self.sampling.temperature or 1.0
            pl_module.mismatch_monitor = self._monitor
            data = data_module_of(trainer)
            limits = training_limits(pl_module, self.engine, max_prompt_tokens, self.sampling, self.environment)
            data.limit_lengths(limits, ("train",))
        eval_limits = self.engine.length_limits(self._environment.lengths(self.eval_sampling))
        if eval_limits:  # known now, a prompt that is too long for the engine is skipped instead of ending the run
            data_module_of(trainer).limit_lengths(eval_limits, ("val", "test"))
        check_judges(self.reward, data_module_of(trainer), stage, pl_module.is_rl())
        self.reward.prepare()  # a missing package or folder is found before weights are loaded

    def fit_lengths(self, max_prompt_tokens: int | None) -> None:
        """Has the engine hold the data's longest prompt and the longest completion of the run."""
        self.engine.fit_lengths(max_prompt_tokens, self.longest_completion)

    @property
    def longest_completion(self) -> int:
        """Tokens of the longest completion, of training or evaluation, with all that it may be shown."""
        samplings = (self.sampling, self.eval_sampling)
        return max(self._environment.lengths(one).max_completion_tokens for one in samplings)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, PolicyModule)
        self._data_before.note(trainer)
        # Only now are there weights.
        self._environment.check_encoder(pl_module, self.max_staleness)
        if pl_module.is_rl():
            check_frozen_encoder(pl_module, self.max_staleness)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._source.close()
        self._environment.close()
        if self.engine.is_remote:  # an engine of this process ends with it, for vLLM takes the process group along
            self.engine.close()

    # -- a training step -----------------------------------------------------------------------------------------

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        if batch.prompts[0].response is not None:
            return  # SFT: the answers are in the batch
        assert isinstance(pl_module, PolicyModule)
        with saved_without_servers(trainer, self._source, self._data_before):
            self._fill(pl_module, batch, trainer.global_step)
            data_module_of(trainer).learn(self._sampled)  # last: a step that could not be made teaches nothing

    def _fill(self, module: PolicyModule, batch: Batch, step: int) -> None:
        """Gives a batch its groups, of which there may be fewer than prompts."""
        dp = module.parallel.dp
        num_groups = len(batch.prompts)
        if not self._is_compared:
            self._compare(module, batch.prompts, step)

        # 1. The step's groups. Too few are a smaller step, none is a step lost.
        found = self._source.step_groups(module, batch.prompts, step)
        num_kept = len(found.groups) + len(found.surplus)
        if num_kept < num_groups:
            logger.warning(
                "dynamic sampling kept %d of %d groups after %d rounds of resampling; the step goes on with those "
                "(raise rollout.max_resample_rounds, or use easier and harder prompts)",
                num_kept, num_groups, found.num_rounds,
            )  # fmt: skip
        batch.groups = found.groups
        self._sampled = found.sampled
        kept = found.groups + found.surplus
        num_useful = sum(bool((group.valid if group.in_loss is None else group.in_loss).any()) for group in kept)
        if dp.max(num_useful):
            self._empty_steps = 0
            self._watch.is_rewarded = True
        else:
            self._empty_steps += 1
            self._watch.end_if_useless(found.sampled, module.parallel, self._empty_steps, MAX_EMPTY_STEPS)

        # 2. Their features.
        self._environment.restore(module, batch.groups)
        with module.phases("encode"):  # again, for the cache may have let go of what carried-over groups need
            step_prompts = [group.prompt for group in batch.groups]
            step_completions = [group.completions for group in batch.groups]
            step_media = all_media(step_prompts, step_completions)
            batch.features = module.features.get_or_encode(module.model, step_media, counted=False)

        # 3. The engine goes on, or rests.
        self._source.before_update(module, step)
        counts = {
            "rollout/groups_kept": float(num_kept),
            "rollout/prompts_drawn": float(len(found.sampled)),
            "rollout/surplus_groups": float(len(found.surplus)),
        }
        self._metrics = rollout_metrics(found.sampled, dp) | dp.sum_dict(
            counts | found.counts | self.engine.take_counts()
        )
        self._metrics |= {name: value / dp.size for name, value in dp.sum_dict(found.means).items()}
        self._metrics["rollout/resample_rounds"] = float(found.num_rounds)
        if self.max_staleness:
            limits = (module.steps_per_rollout, self.max_staleness)
            self._metrics |= staleness_metrics(batch.groups, step, *limits, dp)
        if self._steps.lengths is not None:
            self._metrics["data/max_completion_tokens"] = float(self._steps.max_completion_tokens(step))
        if self.frame_order is not None:
            self._metrics |= mean_over_ranks(order_values(found.sampled), dp)
        if self.environment is not None:
            self._metrics |= turn_metrics(found.sampled, self._environment.take_num_encoded(), module.parallel)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, PolicyModule)
        if self._metrics:
            self._metrics |= group_metrics(self._sampled, pl_module.parallel.dp)
        pl_module.log_dict(self._metrics, batch_size=1)
        if "reward/mean" in self._metrics:
            pl_module.log("reward", self._metrics["reward/mean"], prog_bar=True, logger=False, batch_size=1)
        self._metrics = {}
        if batch.groups is not None:
            self._watch.end_step(pl_module, self._sampled)
        self._sampled = []
        self._data_before.note(trainer)

    # -- the first batch, and evaluation -------------------------------------------------------------------------

    def _compare(self, module: PolicyModule, prompts: Sequence[Prompt], step: int) -> None:
        """Before the first rollout: does the engine sample from the model that is trained?"""
        self._is_compared = True
        logger.info("comparing the engine's log-probabilities with the trainer's on the first batch")
        with module.phases("encode"):
            features = module.features.get_or_encode(module.model, prompts)
        self._steps.sync(module, step)
        compare_engine(self.engine, module, prompts, features, self.max_mismatch)

    @override
    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Groups by `eval_sampling`, by the same seed in every evaluation."""
        assert isinstance(pl_module, PolicyModule)
        module = pl_module
        step = trainer.global_step
        self._source.before_evaluation(module.parallel)
        if not self._is_compared:
            self._compare(module, batch.prompts, step)
        request = RolloutRequest(batch.prompts, batch.prompts, [self.eval_sampling], self.seed)
        features = self._steps.encode(module, batch.prompts)
        self._steps.sync(module, step)
        generated = self._steps.generate(module, request, features)
        with module.phases("reward"):
            batch.groups = scored_groups(self.reward, request, generated, module.parallel, self.engine.ranks_per_engine)
        batch.features = dict(features)

    on_test_batch_start = on_validation_batch_start
    on_predict_batch_start = on_validation_batch_start

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.engine.sleep()
        self._source.after_evaluation()

    # -- checkpoints ---------------------------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        """Every rank must call it: the groups of all that wait for a later step are saved, and half completions."""
        saved = self._source.save(self._parallel)
        return saved | {
            "num_rollouts": self._steps.num_rollouts,
            "empty_steps": self._empty_steps,
            "mismatch": self._monitor.last_mean,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._steps.num_rollouts = state_dict["num_rollouts"]
        self._empty_steps = state_dict["empty_steps"]
        self._source.load(state_dict, self._parallel)
        # Older checkpoints call it the gap.
        self._monitor.last_mean = state_dict["mismatch" if "mismatch" in state_dict else "gap"]
