"""`python -m longrl replay`: one optimizer step that a run left out, taken again to find the first bad number."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from longrl.algorithms import HighEntropy
from longrl.commands.cache_features import local_trainer
from longrl.commands.first_nonfinite import Finding, NonfiniteWatch, counted
from longrl.commands.parsers import ShortErrors
from longrl.commands.run_config import read_run_config
from longrl.commands.run_parts import RunParts
from longrl.commands.run_trust import check_run_config
from longrl.datamodules.longvideo_reason import LongVideoReason
from longrl.io.checkpoint_files import trust_checkpoints
from longrl.modules.initial_weights import saved_checkpoints
from longrl.modules.mini_batches import MiniBatch, RolloutLoss, TokenLoss
from longrl.modules.policy import PolicyModule, all_media
from longrl.modules.preference_loss import PreferenceLoss
from longrl.modules.sft_loss import SFTLoss
from longrl.modules.skipped_steps import (
    FOLDER,
    StepRecord,
    load_step_record,
    recorded_completions,
    recorded_continuations,
)
from longrl.modules.step_statistics import total_norm
from longrl.types import Continuation, Prompt

AnswerT = TypeVar("AnswerT")


def main(args: Sequence[str]) -> None:
    """Command line of `replay_step`."""
    from jsonargparse import auto_cli

    replay = auto_cli(replay_step, args=list(args), parser_class=ShortErrors, prog="python -m longrl replay")
    sys.stdout.write(f"{replay}\n")


@dataclasses.dataclass(frozen=True)
class Replay:
    """What a step that was left out does when it is taken again."""

    finding: Finding | None
    """None where all numbers are finite now."""
    loss: float
    grad_norm: float
    facts: dict[str, Any]
    """Of the record: step, loss and gradient norm of then."""
    weights: str
    """What they were read from."""
    remarks: Sequence[str] = ()

    def __str__(self) -> str:
        facts = self.facts
        now = f"loss {self.loss:g} and gradient norm {self.grad_norm:g}"
        then = f"loss {float(facts['loss']):g} and gradient norm {float(facts['grad_norm']):g}"
        lines = [f"the step after {facts['global_step']} steps, rank {facts['rank']}: {then} then, {now} now"]
        lines += [f"weights: {self.weights}", *self.remarks]
        if self.finding is not None:
            return "\n".join([*lines, f"first number that is not finite, {self.finding}"])
        return "\n".join(
            [
                *lines,
                "every number is finite now: it needs the weights of that step, the other ranks, or the precision and "
                "kernels of the device that ran it. Name a checkpoint nearer to the step by --weights",
            ]
        )


def replay_step(
    record: str,
    weights: str | None = None,
    accelerator: str | None = None,
    trust_run_config: bool = False,
    trust_checkpoint: bool = False,
) -> Replay:
    """Takes a step again that a run has left out, and says where its first number is that is not finite.

    A record of one of several ranks has that rank's part, which is replayed alone.

    Args:
        record: a file in the folder `nonfinite_steps` of a run.
        weights: what to replay with: a checkpoint, a run or an exported folder; None is the run's last checkpoint, or
            what it began with.
        accelerator: `cpu` or `gpu`; None is the run's.
        trust_run_config: the run's config may name classes and functions of any module, which then run.
        trust_checkpoint: read a checkpoint also if it names functions and classes, which may run any code.

    Raises:
        ValueError: it is no record, of a diffusion model, or its run's config.yaml is not beside its folder or names
            what a stranger could run code by.
    """
    trust_checkpoints(trust_checkpoint)
    path = Path(record)
    if not path.is_file():
        raise ValueError(f"there is no {record}; name a file in RUN/{FOLDER}")
    step = load_step_record(path)
    if "latents.0" in step.tensors:
        raise ValueError(
            f"{record} is of a diffusion model, whose steps are not replayed; name one of a language model"
        )
    run = path.resolve().parent.parent
    if not (run / "config.yaml").is_file():
        raise ValueError(f"{run} has no config.yaml, which says how to replay {record}; leave it in its run's folder")

    check_run_config(read_run_config(str(run)), run / "config.yaml", trust_run_config)

    # 1. The run's own model, on one device.
    parts = RunParts("replay", ["--config", str(run / "config.yaml")])
    policy = parts.model
    assert isinstance(policy, PolicyModule)
    source = weights or next(map(str, saved_checkpoints(run)), None) or policy.init_from
    policy.init_from = source
    settings = parts.config["trainer"]
    trainer = local_trainer(accelerator or settings["accelerator"], settings["precision"])
    policy.configure_model()
    policy.trainer = trainer
    trainer.precision_plugin.convert_module(policy)
    policy.to(trainer.strategy.root_device)
    policy.model.train()
    policy.temperature = float(step.facts.get("temperature", 1.0))

    # 2. The step.
    prompts, remarks = rendered_prompts(step, parts.datamodule)
    watch = NonfiniteWatch(row_names=completion_names(step))
    with watch.watching(policy.model), trainer.precision_plugin.forward_context():
        loss = take_step(policy, step, prompts, watch)
    grad_norm = float(total_norm([p.grad for p in policy.model.parameters() if p.grad is not None]))
    if watch.finding is None and not math.isfinite(grad_norm):
        watch.note(Finding("gradient", "all weights", "each gradient is finite, the norm overflows: that"))
    if "teacher_logp" in step.tensors:
        remarks.append("the step had a teacher's term, which is left out here: model.teacher is not loaded")
    remarks += [f"not finite before anything ran, {finding}" for finding in watch.weights[:4]]
    return Replay(watch.finding, loss, grad_norm, dict(step.facts), source or "the family's own", remarks)


def take_step(policy: PolicyModule, step: StepRecord, prompts: Sequence[Prompt], watch: NonfiniteWatch) -> float:
    """Forward and backward pass of all micro-batches, with the numbers that the step had; returns the loss."""
    is_rl = "rewards" in step.tensors
    recorded: Sequence[Continuation] = recorded_completions(step) if is_rl else recorded_continuations(step, prompts)
    answers = of_prompts(recorded, len(prompts))
    features = policy.features.get_or_encode(policy.model, all_media(prompts, answers))
    loss_of = recorded_loss(policy, step)
    micro_batches, sequence = policy.scoring.micro_batches(prompts, answers)
    total = 0.0
    for packed in micro_batches:
        assert packed is not None, "one rank has no others to wait for"
        watch.packed = packed
        options = loss_of.forward_options(packed, packed)
        output = policy.policy(packed, features, policy.temperature, sequence, **options)
        note_scores(watch, "logp", output.logp)
        note_scores(watch, "entropy", output.entropy)
        result = loss_of(packed.to(policy.device), output)
        note_scores(watch, "the loss", result.loss.detach()[None])
        result.loss.backward()
        total += result.loss.item()
    return total


def note_scores(watch: NonfiniteWatch, name: str, scores: Tensor) -> None:
    """Notes scores or a loss that are not finite, where no module's numbers were."""
    if scores.isfinite().all():
        return
    first = (~scores.isfinite()).nonzero()[0].tolist()
    watch.note(Finding("loss", name, counted("the value", scores), watch._place(first, scores.shape)))


# -- what the record says --------------------------------------------------------------------------------------------


def rendered_prompts(step: StepRecord, data: LongVideoReason) -> tuple[list[Prompt], list[str]]:
    """The prompts of a step, with the tokens that they had, and remarks on those that are rendered otherwise now."""
    remarks = []
    prompts = []
    for number, row in enumerate(step.rows):
        prompt = data.renderer(row)
        ids = step.tensors[f"input_ids.{number}"]
        if not torch.equal(prompt.input_ids, ids):
            remarks.append(f"row {row.id!r} is rendered otherwise now: {len(prompt.input_ids)} tokens, then {len(ids)}")
            if len(prompt.input_ids) == len(ids):
                prompt = dataclasses.replace(prompt, input_ids=ids)
        prompts.append(prompt)
    return prompts, remarks


def of_prompts(answers: Sequence[AnswerT], num_prompts: int) -> list[list[AnswerT]]:
    """The answers of each prompt, as many of every one."""
    size = len(answers) // max(1, num_prompts)
    return [list(answers[number * size : (number + 1) * size]) for number in range(num_prompts)]


def completion_names(step: StepRecord) -> dict[int, str]:
    """What each completion of a step is called."""
    count = step.facts["num_completions"]
    size = count // max(1, len(step.rows))
    return {number: f"row {step.rows[number // size].id!r}, completion {number % size}" for number in range(count)}


def recorded_loss(policy: PolicyModule, step: StepRecord) -> TokenLoss:
    """The loss that the step had, with the advantages and log-probabilities of then."""
    tensors = {name: tensor.to(policy.device) for name, tensor in step.tensors.items()}
    if "reward_shift" in tensors:
        answers = of_prompts(recorded_continuations(step), len(step.rows))
        shift = float(tensors["reward_shift"])
        options = (len(answers), shift, policy.device)
        return PreferenceLoss.of_pairs(policy.preference, answers, tensors.get("ref_logp"), *options)
    if "advantages" not in tensors:
        return SFTLoss(sum(target.num_sampled for target in recorded_continuations(step)))
    sampler_logp = tensors["sampler_logp"]
    weights = tensors["weights"]
    chosen = tensors.get("high_entropy")
    batch: MiniBatch[Any, Any] = MiniBatch(
        groups=(),
        advantages=tensors["advantages"],
        old_logp=tensors.get("old_logp"),
        ref_logp=tensors.get("ref_logp"),
        sampler_logp=sampler_logp,
        staleness=tensors.get("staleness", torch.zeros_like(sampler_logp, dtype=torch.int64)),
        weights=weights,
        nonfinite=torch.zeros_like(weights, dtype=torch.bool),
        high_entropy=None if chosen is None else HighEntropy(chosen, weights.new_zeros(())),
    )
    had = {name: step.facts[name] for name in ("kl_coef", "entropy_coef") if name in step.facts}
    return RolloutLoss(dataclasses.replace(policy.algorithm, **had), batch)
