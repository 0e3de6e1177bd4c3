"""Checks before the first step of an RL run: options that contradict each other, lengths, and the engine."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from longrl.datamodules.longvideo_reason import LongVideoReason
from longrl.engines.parity import check_rendered_prompts
from longrl.engines.rollout_engine import RolloutEngine
from longrl.environments.settings import EnvironmentSettings, with_observed
from longrl.models.base import CausalFamily
from longrl.models.expert_routing import num_experts
from longrl.modules.mismatch import Mismatch
from longrl.modules.policy import PolicyModule
from longrl.packing.lengths import LengthLimit, length_problem, micro_batch_limit
from longrl.rewards import RewardSum
from longrl.types import Completion, Features, Prompt, SamplingParams

NUM_SHOWN = 8
"""Tokens in the message of a failed comparison."""

logger = logging.getLogger(__name__)

PARITY_TOKENS = 8
"""Greedy tokens of each prompt of the first batch by which engine and trainer are compared."""


def check_engine_ranks(engine: RolloutEngine, sp_group_size: int) -> None:
    """Raises ValueError if ranks that make up one engine do not have the same prompts."""
    if sp_group_size % engine.ranks_per_engine:
        raise ValueError(
            f"rollout.engine.tensor_parallel_size={engine.ranks_per_engine} must divide the {sp_group_size} ranks that "
            "share prompts; set trainer.strategy.init_args.sequence_parallel_size to a multiple of it, or "
            "rollout.engine.tensor_parallel_size to 1"
        )


def check_rollout_options(
    module: PolicyModule,
    engine: RolloutEngine,
    sampling: SamplingParams,
    max_staleness: int,
    bypass_below: float,
) -> None:
    """Checks what the engine can do and what its log-probabilities are used for.

    Args:
        module: knows the updates per rollout.
        engine: of the run.
        sampling: of training rollouts.
        max_staleness: the option `rollout.max_staleness`.
        bypass_below: the option `rollout.bypass_old_logp_below`.

    Raises:
        ValueError: the engine cannot generate beside the update, or its log-probabilities are to stand for the old
            policy's, but are those of another distribution.
    """
    check_staleness(engine, max_staleness)
    if module.family.fp32_lm_head and not engine.supports_fp32_lm_head:
        raise ValueError(
            f"model.algorithm.fp32_lm_head=true has trainer and engine compute logits in float32, and "
            f"{type(engine).__name__} does not say that it can (`supports_fp32_lm_head`); use "
            "longrl.engines.hf.HFEngine or a vLLM engine, or set model.algorithm.fp32_lm_head to false"
        )
    if module.family.router_replay:
        check_router_replay(module.family, engine)
    elif num_experts(module.family):
        logger.info(
            "a mixture of experts trains without router replay: where engine and trainer pick other experts, "
            "log-probabilities differ (train/mismatch_mean); %s",
            engine.router_replay_problem() or "rollout.router_replay=true has the update use the engine's",
        )
    if max_staleness and is_filtered(sampling):
        logger.warning(
            "with top_p or top_k the old log-probabilities of groups sampled ahead (rollout.max_staleness) are those "
            "of the filtered distribution, and their ratios a little low; set both off, or rollout.max_staleness to 0"
        )
    in_reward = module.algorithm.kl_coef > 0 and module.algorithm.kl_placement == "reward"
    if bypass_below and (module.steps_per_rollout == 1 or max_staleness or in_reward):
        logger.warning(
            "rollout.bypass_old_logp_below has no effect: it saves the old policy's forward pass, which only a run "
            "with several optimizer steps per rollout has, with rollout.max_staleness=0 and without KL in the reward; "
            "set it to 0, or raise model.mini_batches_per_rollout"
        )
    if not is_filtered(sampling):
        return
    if bypass_below:
        raise ValueError(
            f"rollout.bypass_old_logp_below={bypass_below} needs top_p=1 and top_k=0, got {sampling.top_p} and "
            f"{sampling.top_k}: the engine's log-probabilities are those of the filtered distribution; set "
            "rollout.bypass_old_logp_below to 0"
        )
    logger.warning(
        "with top_p or top_k the engine's log-probabilities are those of the filtered distribution: mismatch metrics "
        "and importance corrections are biased, and rollout.max_mean_mismatch is not applied; set "
        "rollout.sampling.top_p to 1 and rollout.sampling.top_k to 0"
    )


def check_staleness(engine: RolloutEngine, max_staleness: int) -> None:
    """Raises ValueError unless the engine can sample while the trainer updates, as `rollout.max_staleness` has it."""
    said = f"rollout.max_staleness={max_staleness}"
    if max_staleness and not engine.is_remote:
        raise ValueError(
            f"{said} needs an engine in another process, got {type(engine).__name__}; use "
            "longrl.engines.server.VLLMServerEngine, or rollout.max_staleness=0"
        )
    if max_staleness < 2:
        return
    problem = engine.staleness_problem()
    if problem:
        raise ValueError(
            f"{said} has completions go on where weights change, and {type(engine).__name__} cannot: {problem}; use "
            "longrl.engines.server.VLLMServerEngine, or lower rollout.max_staleness to 1"
        )


def check_frozen_encoder(module: PolicyModule, max_staleness: int) -> None:
    """Raises ValueError if features of prompts would be of older weights than those that go on with them."""
    if max_staleness > 1 and module.vision_encoder_trains:
        raise ValueError(
            f"rollout.max_staleness={max_staleness} has completions go on where weights change, by the features that "
            "their prompts had, but the encoder trains; set model.family.init_args.freeze_vision_encoder to true, or "
            "lower rollout.max_staleness to 1"
        )


def check_router_replay(family: CausalFamily, engine: RolloutEngine) -> None:
    """Raises ValueError unless the model has experts to be replayed and the engine says which it chose."""
    experts = num_experts(family)
    if not experts:
        raise ValueError(
            f"rollout.router_replay=true needs a mixture of experts, and {family.model_path!r} has none; set "
            "rollout.router_replay to false"
        )
    problem = engine.router_replay_problem()
    if problem:
        raise ValueError(
            "rollout.router_replay=true needs an engine that says which experts it chose, got "
            f"{type(engine).__name__}: {problem}; use longrl.engines.hf.HFEngine, or longrl.engines.vllm.VLLMEngine on "
            "GPUs that each have one, or set rollout.router_replay to false"
        )
    if family.compile_layers:
        raise ValueError(
            "rollout.router_replay=true needs layers that run as they are written; set "
            "model.family.init_args.compile_layers to false, or rollout.router_replay to false"
        )
    logger.info(
        "router replay: the update and the old log-probabilities use the experts, of %d, that %s chose for each token; "
        "a reference policy chooses its own", experts, type(engine).__name__,
    )  # fmt: skip


def check_judges(reward: RewardSum, data: LongVideoReason, stage: str, is_rl: bool) -> None:
    """Raises ValueError if rows whose completions are to be rewarded have a task that no reward judges.

    Rows of `test` may have one: its report counts them as not judged.
    """
    for split in ("train", "val") if stage == "fit" and is_rl else ("val",):
        if split in data.datasets and stage in ("fit", "validate"):
            reward.check_rows(data.datasets[split].rows, split)


def is_filtered(sampling: SamplingParams) -> bool:
    """True if completions are drawn from a part of the distribution."""
    return sampling.top_p < 1 or sampling.top_k > 0


def training_limits(
    module: PolicyModule,
    engine: RolloutEngine,
    max_prompt_tokens: int | None,
    sampling: SamplingParams,
    environment: EnvironmentSettings | None = None,
) -> tuple[LengthLimit, ...]:
    """What update and engine take: longer prompts are skipped; warned of where `data.max_prompt_tokens` lets them in.

    Args:
        module: does the update.
        engine: samples.
        max_prompt_tokens: the option of the data.
        sampling: of training rollouts; every completion may become as long as it allows.
        environment: and as what it may be shown beside.
    """
    lengths = with_observed(sampling, environment)
    of_update = micro_batch_limit(
        module.max_tokens_per_micro_batch,
        module.parallel.degrees,
        lengths.max_completion_tokens,
    )
    of_engine = engine.length_limits(lengths)
    limits = (of_update, *of_engine)
    remedy = ""
    if environment is not None:
        options = "data.max_prompt_tokens, sampling.max_completion_tokens or rollout.environment.max_observed_tokens"
        remedy = f"lower {options} (now {environment.max_observed_tokens})"
    for limit in limits:
        problem = length_problem(
            "the longest prompt of data.max_prompt_tokens",
            max_prompt_tokens or 0,
            limit.longest,
            limit=limit.tokens,
            option=limit.option,
            ranks=limit.ranks,
            remedy=remedy,
        )
        if problem:
            logger.warning("%s; longer prompts are skipped", problem)
    return limits


def compare_engine(
    engine: RolloutEngine,
    module: PolicyModule,
    prompts: Sequence[Prompt],
    features: Features,
    max_mismatch: float,
) -> None:
    """Raises RuntimeError unless engine and trainer read these prompts alike and score greedy tokens alike.

    Args:
        engine: has weights of its own, and has been handed the trainer's.
        module: the trainer's side.
        prompts: of the sequence-parallel group.
        features: {media key: [N, D]} of the prompts.
        max_mismatch: largest difference of a log-probability.
    """
    # 1. Token ids, positions and features, as the engine reads them.
    family = module.engine_family
    rendered = engine.rendered_prompts(family, prompts, features)
    read, rows = family.as_read(prompts, features)
    check_rendered_prompts(read, rendered, rows)

    # 2. A few greedy tokens of every prompt, scored by both.
    greedy = SamplingParams(num_generations=1, max_completion_tokens=PARITY_TOKENS, temperature=0.0)
    with module.parallel.world.raise_on_any_rank():
        completions = engine.generate(family, module.model, prompts, features, greedy, seed=0)
    engine.sleep()
    with module.trainer.precision_plugin.forward_context():
        logp = module.score(module.policy, prompts, completions, features, temperature=1.0)  # [N]
    mismatch = Mismatch(engine_logps(completions), logp.cpu())
    figures = ", ".join(f"{name} {value:.2e}" for name, value in mismatch.metrics().items())
    logger.info("log-probabilities of engine and trainer before the first step differ by: %s", figures)
    check_mismatch(mismatch, prompts, completions, max_mismatch)


def check_mismatch(
    mismatch: Mismatch, prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]], max_mismatch: float
) -> None:
    """Raises RuntimeError with a table of the tokens that differ most if any differs by more than `max_mismatch`.

    Args:
        mismatch: of the completions' tokens, in their order.
        prompts: P prompts.
        completions: greedy ones of each prompt.
        max_mismatch: largest difference of a log-probability that rounding explains.
    """
    difference = (mismatch.trainer_logp - mismatch.engine_logp).abs()  # [N]
    if not len(difference) or float(difference.max()) <= max_mismatch:
        return
    tokens = [
        (prompt.id, index, int(token))
        for prompt, group in zip(prompts, completions, strict=True)
        for completion in group
        for index, token in enumerate(completion.token_ids)
    ]
    lines = []
    for row in torch.topk(difference, min(NUM_SHOWN, len(difference))).indices.tolist():
        prompt_id, index, token = tokens[row]
        lines.append(
            f"  prompt {prompt_id!r}, token {index} (id {token}): engine {float(mismatch.engine_logp[row]):.4f}, "
            f"trainer {float(mismatch.trainer_logp[row]):.4f}"
        )
    lengths = ", ".join(f"{item.id!r} {len(item.input_ids)} tokens, {len(item.media)} media" for item in prompts)
    raise RuntimeError(
        f"engine and trainer disagree by up to {float(difference.max()):.4f} in the log-probability of a greedy token, "
        f"more than max_mismatch={max_mismatch}; training would follow another model than the one that samples. "
        "The tokens that differ most:\n" + "\n".join(lines) + f"\nPrompts: {lengths}. Check that "
        "engine and family read the same folder and dtype (a difference of 0.1 is usual in bfloat16), or raise "
        "rollout.max_mismatch"
    )


def engine_logps(completions: Sequence[Sequence[Completion]]) -> Tensor:
    """[N] log-probabilities of all tokens, as the engine reported them."""
    logps = [completion.logprobs for group in completions for completion in group]
    return torch.cat([torch.zeros(0), *logps])
