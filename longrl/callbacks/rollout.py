"""Fills a batch with rollouts before the step reads it: encode, sync, generate, reward, select, resample."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Sequence
from concurrent.futures import wait
from dataclasses import replace
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from longrl.callbacks.background_rollout import BackgroundRollout, run_in_background
from longrl.callbacks.environment_rollouts import EnvironmentRollouts
from longrl.callbacks.group_metrics import group_metrics
from longrl.callbacks.group_scores import scored_groups
from longrl.callbacks.reward_watch import RewardWatch
from longrl.callbacks.rollout_checks import (
    check_engine_ranks,
    check_judges,
    check_rollout_options,
    compare_engine,
    is_filtered,
    training_limits,
)
from longrl.callbacks.staleness_checks import check_stale_tokens
from longrl.callbacks.staleness_metrics import staleness_metrics
from longrl.callbacks.turn_metrics import turn_metrics
from longrl.callbacks.waiting_groups import WaitingGroups
from longrl.engines.hf import HFEngine
from longrl.engines.rollout_engine import (
    GeneratedShards,
    RolloutEngine,
    RolloutRequest,
    generate_shards,
    prompt_seed,
    sampling_ids,
)
from longrl.environments.settings import EnvironmentSettings
from longrl.features.rollout_features import RolloutFeatures
from longrl.io.number_ranges import LIMIT_OR_ZERO, NOT_NEGATIVE, check_ranges
from longrl.models.base import CausalFamily
from longrl.modules.mismatch import MismatchMonitor
from longrl.modules.policy import PolicyModule, all_media
from longrl.modules.trained import data_module_of, rollout_metrics
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
        sampling: of training rollouts.
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
        overlap: sample the next step's groups during the update, by weights one step older; their importance ratios
            are to the weights that sampled, and a step's change is part of the mismatch. Needs an engine in another
            process.
        router_replay: train a mixture of experts by the experts that the engine chose for each token of prompt and
            completion, in the update and for the old log-probabilities (R3, arXiv:2510.11370); the gates' weights are
            the trainer's own. Needs an engine that returns them.
        environment: answers the turns of completions, as a tool that shows a part of the video does; None: completions
            have one turn.
        warn_without_signal_after: warn once after so many steps in a row in which no group had anything to learn from,
            with the likely causes; 0 never.
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
        overlap: bool = False,
        warn_without_signal_after: int = 10,
        router_replay: bool = False,
        environment: EnvironmentSettings | None = None,
    ) -> None:
        check_ranges(
            locals(),
            "rollout.",
            max_resample_rounds=NOT_NEGATIVE,
            max_mismatch=LIMIT_OR_ZERO,
            max_mean_mismatch=LIMIT_OR_ZERO,
            bypass_old_logp_below=LIMIT_OR_ZERO,
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
        self.overlap = overlap
        self.max_mismatch = max_mismatch
        self.bypass_old_logp_below = bypass_old_logp_below
        self.router_replay = router_replay
        self.environment = environment
        self._environment = EnvironmentRollouts(environment)
        self._monitor = MismatchMonitor(max_mean_mismatch, bypass_old_logp_below, int(overlap))
        self._is_compared = self.engine.reads_policy_weights
        """True once engine and trainer are known to be one model."""
        self._parallel = Parallel()
        self._family: CausalFamily
        """In the precision that the engine computes in; known from `setup` on."""
        self._num_rollouts = 0
        self._empty_steps = 0
        self._metrics: Metrics = {}
        self._watch = RewardWatch(warn_without_signal_after)
        self._sampled: list[Group] = []
        """Groups drawn for this step, selected or not."""
        self._waiting = WaitingGroups()
        self._background: BackgroundRollout | None = None
        """Under way during the update, with `overlap`."""

    # -- setup ---------------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        assert isinstance(pl_module, PolicyModule)
        self._parallel = pl_module.parallel
        pl_module.family.router_replay = self.router_replay and stage == "fit" and pl_module.is_rl()
        self._family = pl_module.family if self.engine.reads_policy_weights else pl_module.engine_family
        self._environment.setup(trainer, pl_module, self.engine)
        self.engine.check_installed()
        check_engine_ranks(self.engine, self._parallel.sp_group.size)
        max_prompt_tokens = data_module_of(trainer).renderer.max_prompt_tokens
        self.fit_lengths(max_prompt_tokens)
        self.engine.invalidate_weights()  # a stage may begin with other weights at the same step
        if stage == "fit" and pl_module.is_rl():
            resamples = self.max_resample_rounds > 0
            pl_module.algorithm.validate(self.sampling, pl_module.steps_per_rollout, int(self.overlap), resamples)
            self.reward.validate(self.sampling.max_completion_tokens)
            check_stale_tokens(pl_module, int(self.overlap), self.bypass_old_logp_below)
            check_rollout_options(pl_module, self.engine, self.sampling, self.overlap, self.bypass_old_logp_below)
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
        self._environment.check_encoder(pl_module, self.overlap)  # only now are there weights

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._environment.close()
        if self.engine.is_remote:  # an engine of this process ends with it, for vLLM takes the process group along
            self.engine.close()

    # -- a training step -----------------------------------------------------------------------------------------

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        if batch.prompts[0].response is not None:
            return  # SFT: the answers are in the batch
        assert isinstance(pl_module, PolicyModule)
        module = pl_module
        dp = module.parallel.dp
        step = trainer.global_step
        num_groups = len(batch.prompts)
        if not self._is_compared:
            self._compare(module, batch.prompts, step)

        # 1. What waits: groups too many for the last step, and with `overlap` those sampled during its update. Then the
        #    prompts of this batch are sampled during the next one.
        waiting = self._waiting
        if waiting.restored:
            waiting.render_restored(data_module_of(trainer).renderer, dp, module.parallel.sp_group)
        if self._background is not None:
            waiting.prefetched = self._finish_background(self._background)
        groups = [replace(group, carried_over=True) for group in waiting.carried]
        prompts: Sequence[Prompt] = batch.prompts
        upcoming: Sequence[Prompt] = ()
        new_groups: list[Group] | None = None
        if waiting.prefetched is not None:
            new_groups = [replace(group, carried_over=True) for group in waiting.prefetched]
            upcoming = batch.prompts
            waiting.prefetched = None
        elif self.overlap:
            upcoming = data_module_of(trainer).draw_prompts(num_groups)

        sampled: list[Group] = []
        num_rounds = 0
        while True:
            if new_groups is None:
                request = self._next_request(module, prompts)
                # 2. Encode the prompts' media: every rank its shard of the frames.
                with module.phases("encode"):
                    features = self._encode(module, prompts)
                # 3. Sync: hand the weights of this step over, unless the engine has them.
                self._sync(module, step)
                # 4. Generate this rank's shards of the completions.
                generated = self._generate(module, request, features)
                # 5. Reward them, and gather the groups.
                new_groups = self._reward(module, request, generated, features)
            sampled += new_groups
            # 6. Select the groups that have something to learn from.
            groups += module.algorithm.select(new_groups)
            # 7. Resample: all ranks go on as long as one lacks groups, for they gather weights together.
            if not dp.max(len(groups) < num_groups) or num_rounds == self.max_resample_rounds:
                break
            prompts = data_module_of(trainer).draw_prompts(num_groups)
            num_rounds += 1
            new_groups = None

        # 8. The step's groups. More of them wait for the next step; too few are a smaller step, none is a step lost.
        if len(groups) < num_groups:
            logger.warning(
                "dynamic sampling kept %d of %d groups after %d rounds of resampling; the step goes on with those "
                "(raise rollout.max_resample_rounds, or use easier and harder prompts)",
                len(groups), num_groups, num_rounds,
            )  # fmt: skip
        batch.groups = groups[:num_groups]
        waiting.carried = groups[num_groups:]
        num_useful = sum(bool((group.valid if group.in_loss is None else group.in_loss).any()) for group in groups)
        self._sampled = sampled
        if dp.max(num_useful):
            self._empty_steps = 0
            self._watch.is_rewarded = True
        else:
            self._empty_steps += 1
            self._watch.end_if_useless(sampled, module.parallel, self._empty_steps, MAX_EMPTY_STEPS)
        self._environment.restore(module, batch.groups)
        with module.phases("encode"):  # again, for the cache may have let go of what carried-over groups need
            step_prompts = [group.prompt for group in batch.groups]
            step_completions = [group.completions for group in batch.groups]
            step_media = all_media(step_prompts, step_completions)
            batch.features = module.features.get_or_encode(module.model, step_media, counted=False)

        # 9. The engine: on with the next step's groups, or at rest.
        if self.overlap:
            self._background = self._start_background(module, upcoming, step)
        self.engine.sleep()
        counts = {
            "rollout/groups_kept": float(len(groups)),
            "rollout/prompts_drawn": float(len(sampled)),
            "rollout/surplus_groups": float(len(waiting.carried)),
        }
        self._metrics = rollout_metrics(sampled, dp) | dp.sum_dict(counts)
        self._metrics["rollout/resample_rounds"] = float(num_rounds)
        if self.overlap:
            self._metrics |= staleness_metrics(batch.groups, step, module.steps_per_rollout, int(self.overlap), dp)
        if self.environment is not None:
            self._metrics |= turn_metrics(sampled, self._environment.take_num_encoded(), module.parallel)

    def _encode(self, module: PolicyModule, prompts: Sequence[Prompt]) -> RolloutFeatures:
        """Features of prompts, every rank its shard of the frames; and room for those of what completions are shown."""
        return RolloutFeatures(module.features.get_or_encode(module.model, prompts), module.features)

    def _next_request(self, module: PolicyModule, prompts: Sequence[Prompt]) -> RolloutRequest:
        """The next rollout of the run, numbered: the number is part of its seed."""
        self._num_rollouts += 1
        seed = prompt_seed(self.seed, f"rollout {self._num_rollouts}")
        ids = sampling_ids([prompt.id for prompt in prompts], module.parallel.dp)
        engine_prompts = []
        for prompt, sampling_id in zip(prompts, ids, strict=True):
            engine_prompts.append(replace(prompt, id=sampling_id))
        # ReMax: one greedy completion more of every prompt.
        samplings = [self.sampling]
        if module.algorithm.greedy_baseline:
            samplings.append(replace(self.sampling, num_generations=1, temperature=0.0))
        return RolloutRequest(prompts, engine_prompts, samplings, seed)

    def _sync(self, module: PolicyModule, step: int) -> None:
        """Hands the weights of a step over, unless the engine has them. Every rank must call it."""
        before = self.engine.num_synced_bytes
        with module.phases("sync"):
            self.engine.sync(self._family, module.model, step)
        module.num_synced_bytes += self.engine.num_synced_bytes - before

    def _generate(
        self, module: PolicyModule, request: RolloutRequest, features: RolloutFeatures
    ) -> list[GeneratedShards]:
        """This rank's shards of the groups. An error of one rank is one of all: none waits for another."""
        reads_weights = self.engine.reads_policy_weights
        sp_group = module.parallel.sp_group
        with (
            module.phases("generate"),
            module.trainer.precision_plugin.forward_context(),
            module.parallel.world.raise_on_any_rank(),
            module.policy.unsharded() if reads_weights else contextlib.nullcontext(),
        ):
            return generate_shards(
                self.engine, self._family, module.model, request, features, sp_group, self._environment.runner
            )

    def _reward(
        self,
        module: PolicyModule,
        request: RolloutRequest,
        generated: Sequence[GeneratedShards],
        features: RolloutFeatures,
    ) -> list[Group]:
        """The groups of all prompts, scored: every rank rewards its shards."""
        with module.phases("reward"):
            groups = scored_groups(
                self.reward, request, generated, module.parallel, self.engine.ranks_per_engine, self._watch.failures
            )
        self._environment.share(module, groups, features)
        return groups

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

    # -- groups sampled during the update ------------------------------------------------------------------------

    def _start_background(self, module: PolicyModule, prompts: Sequence[Prompt], step: int) -> BackgroundRollout:
        """Has the engine generate from the weights as they are, before the update changes them."""
        request = self._next_request(module, prompts)
        with module.phases("encode"):
            features = self._encode(module, prompts)
        self._sync(module, step)
        sp_group = module.parallel.sp_group
        arguments = (self.engine, self._family, module.model, request, features, sp_group, self._environment.runner)
        generated = run_in_background(generate_shards, *arguments)
        return BackgroundRollout(module, request, features, generated)

    def _finish_background(self, background: BackgroundRollout) -> list[Group]:
        """Waits for the rollout under way and has it scored. Every rank must call it."""
        self._background = None  # first, for an error below must not be met again by a checkpoint
        module = background.module
        with module.phases("generate"), module.parallel.world.raise_on_any_rank():
            generated = background.generated.result()
        return self._reward(module, background.request, generated, background.features)

    # -- the first batch, and evaluation -------------------------------------------------------------------------

    def _compare(self, module: PolicyModule, prompts: Sequence[Prompt], step: int) -> None:
        """Before the first rollout: does the engine sample from the model that is trained?"""
        self._is_compared = True
        with module.phases("encode"):
            features = module.features.get_or_encode(module.model, prompts)
        self._sync(module, step)
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
        if self._background is not None:  # it reads the weights that `sync` may replace
            wait([self._background.generated])
        if not self._is_compared:
            self._compare(module, batch.prompts, step)
        request = RolloutRequest(batch.prompts, batch.prompts, [self.eval_sampling], self.seed)
        with module.phases("encode"):
            features = self._encode(module, batch.prompts)
        self._sync(module, step)
        generated = self._generate(module, request, features)
        with module.phases("reward"):
            batch.groups = scored_groups(self.reward, request, generated, module.parallel, self.engine.ranks_per_engine)
        batch.features = dict(features)

    on_test_batch_start = on_validation_batch_start
    on_predict_batch_start = on_validation_batch_start

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.engine.sleep()

    # -- checkpoints ---------------------------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        """Every rank must call it: the groups of all that wait for a later step are saved."""
        if self._background is not None:
            self._waiting.prefetched = self._finish_background(self._background)
        return {
            "num_rollouts": self._num_rollouts,
            "waiting": self._parallel.dp.gather(self._waiting.save()),
            "empty_steps": self._empty_steps,
            "mismatch": self._monitor.last_mean,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._num_rollouts = state_dict["num_rollouts"]
        self._empty_steps = state_dict["empty_steps"]
        self._waiting.load(state_dict["waiting"], self._parallel.dp)
        # Older checkpoints call it the gap.
        self._monitor.last_mean = state_dict["mismatch" if "mismatch" in state_dict else "gap"]
