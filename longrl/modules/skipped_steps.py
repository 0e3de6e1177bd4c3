"""Optimizer steps that are left out, for their loss or gradient norm is not a finite number, and a record of each.

Loss and norm are sums over all ranks, so all ranks leave the same steps out. Weights, optimizer, scheduler and the
trainer's `global_step` stay as they were: a step left out is none, and a resumed run counts as the uninterrupted one.
What follows every step that is taken, as a mean of weights, belongs behind `optimizer.step` of `TrainedModule`.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from longrl.datamodules.media.saved_media import restored_media, saved_media
from longrl.io.atomic import atomic_write
from longrl.modules.mini_batches import MiniBatch, TokenLoss
from longrl.packing.pack import Continuations, continuations
from longrl.types import FULL_SHARD, Batch, Completion, Continuation, Group, Prompt, Row

logger = logging.getLogger(__name__)

FOLDER = "nonfinite_steps"
"""Folder of the run in which records lie."""
MAX_RECORDS = 8
"""Records that every rank writes in a run: the first ones say most."""
EXPERTS = ("experts", "prompt_experts")
"""Fields of a completion that an engine fills under `rollout.router_replay`."""
SHOWN = ("sampled", "position_ids")
"""Fields of a completion that was shown something."""


@dataclass(frozen=True)
class StepRecord:
    """The rank's part of an optimizer step, as plain values: enough to take it again.

    Example:
        ```python
        record = load_step_record("runs/NAME/nonfinite_steps/step_00000012_1_rank_0.safetensors")
        record.facts                                  # {"global_step": 12, "loss": nan, "grad_norm": nan, ...}
        batch = replay_batch(record, family.render)   # of a text run without media; else a data module's renderer
        ```
    """

    rows: Sequence[Row]
    """P records of the data set."""
    tensors: Mapping[str, Tensor]
    """Of text `input_ids.p` [T] of each prompt and `completions.c` [S] of each completion, of those that were shown
    something `sampled.c` [S] and `position_ids.c` [A, S], their media being among the facts; in RL also `advantages`,
    `old_logp`, `ref_logp`, `sampler_logp` [N] as far as there are any, `weights` [C], `rewards` and `valid` [P, G],
    with experts to be replayed `experts.c` [S - 1, M, k] and `prompt_experts.c` [T, M, k]. Of a diffusion model scores
    and `latents.c` [W + 1, ...] of each sample."""
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Plain values: step, rank, loss, gradient norm, temperature; `media` by the number of their completion."""


class SkippedSteps:
    """Counts the steps left out, keeps records of the first ones, and ends a run that takes no other.

    Args:
        limit: so many in a row end the run.
    """

    def __init__(self, limit: int) -> None:
        if limit < 1:
            raise ValueError(f"model.max_nonfinite_steps must be at least 1, got {limit}; 3 is the default")
        self.limit = limit
        self.count = 0
        """Of the whole run."""
        self.in_a_row = 0
        """Since the last step that was taken."""

    def add(self, folder: Path, record: Callable[[], StepRecord], facts: Mapping[str, Any]) -> None:
        """Counts a step that is left out. Every rank of the run calls it.

        Args:
            folder: of the run.
            record: makes the record of this rank's part.
            facts: further ones; `global_step`, `rank`, `loss` and `grad_norm` at least.

        Raises:
            RuntimeError: `limit` steps in a row were left out. No checkpoint follows.
        """
        # 1. The counts are those of all ranks; a record is this rank's.
        self.count += 1
        self.in_a_row += 1
        made = record()
        step = facts["global_step"]
        name = f"step_{step:08d}_{self.count}_rank_{facts['rank']}.safetensors"
        path = folder / FOLDER / name
        kept = "not kept, for there are enough"
        if self.count <= MAX_RECORDS:
            kept = f"kept in {path}"
            try:
                write_step_record(path, made, facts)
            except OSError as error:  # a full disk must not part this rank from the others
                kept = f"lost ({error})"

        # 2. Which rows they were is what the user asks first.
        loss = facts["loss"]
        grad_norm = facts["grad_norm"]
        row_ids = [row.id for row in made.rows]
        logger.warning(
            "the optimizer step after %d steps is left out, number %d of the run: its loss is %g and its gradient norm "
            "%g. Rows %s; their batch is %s",
            step,
            self.count,
            loss,
            grad_norm,
            row_ids,
            kept,
        )
        if self.in_a_row >= self.limit:
            raise RuntimeError(
                f"loss or gradient norm of {self.in_a_row} optimizer steps in a row was not finite (the last: loss "
                f"{loss:g}, gradient norm {grad_norm:g}), as many as model.max_nonfinite_steps allows; they did not "
                f"change the weights, and no checkpoint was written. Their batches are in {folder / FOLDER} "
                "(longrl.modules.skipped_steps.load_step_record). Look at the rows named above, lower "
                "model.optimizer.lr, or compute in float32; then go on from the last checkpoint with --ckpt_path"
            )

    def state_dict(self) -> dict[str, int]:
        """Both counts, for checkpoints."""
        return {"count": self.count, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """The inverse; checkpoints of before have none."""
        self.count = state.get("count", 0)
        self.in_a_row = state.get("in_a_row", 0)


def tell_nonfinite(mini_batches: Sequence[MiniBatch[Any, Any]], count: float) -> None:
    """Says in a line how many completions are in no loss, on all ranks, and of which rows this rank's are."""
    row_ids = []
    for part in mini_batches:
        masks = part.nonfinite.tensor_split(len(part.groups) or 1)
        for group, left_out in zip(part.groups, masks, strict=False):
            if left_out.any():
                row_ids.append(group.prompt.id)
    logger.warning(
        "%d completions of a rollout are in no loss and no mean: an old or reference log-probability of theirs, or an "
        "advantage, is not a finite number. Rows of this rank: %s",
        count,
        row_ids,
    )


# -- records -----------------------------------------------------------------------------------------------------


def text_record(
    prompts: Sequence[Prompt],
    completions: Continuations,
    loss: TokenLoss,
    **facts: Any,
) -> StepRecord:
    """The record of a step on text.

    Args:
        prompts: P of them.
        completions: G of each, or one SFT target, with the experts that the engine chose, if it says.
        loss: of their tokens; says what else it reads.
        facts: kept as they are.
    """
    tensors = loss.tensors()
    rows = []
    media = {}
    num_completions = 0
    groups = continuations(completions)
    for number, prompt in enumerate(prompts):
        rows.append(prompt.row)
        tensors[f"input_ids.{number}"] = prompt.input_ids
        for completion in groups[number]:
            tensors[f"completions.{num_completions}"] = completion.token_ids
            for name in (*EXPERTS, *SHOWN):
                values = getattr(completion, name, None)
                if values is not None:
                    tensors[f"{name}.{num_completions}"] = values
            if completion.media:
                media[str(num_completions)] = [saved_media(item) for item in completion.media]
            num_completions += 1
    facts["num_completions"] = num_completions
    facts["media"] = media
    return StepRecord(rows, tensors, facts)


def write_step_record(path: Path, record: StepRecord, facts: Mapping[str, Any]) -> None:
    """Writes a safetensors file, whole or not at all; rows, facts and further `facts` are JSON in its header."""
    from safetensors.torch import save

    tensors = {}
    for name, tensor in record.tensors.items():
        local = tensor.detach().cpu()
        tensors[name] = local.contiguous().clone()  # safetensors refuses views of one memory
    rows = []
    for row in record.rows:
        fields = dataclasses.asdict(row)
        fields["metadata"] = dict(row.metadata)
        rows.append(fields)
    all_facts = {**record.facts, **facts}
    header = {
        "rows": json.dumps(rows, default=str),
        "facts": json.dumps(all_facts, default=str),
    }
    atomic_write(path, save(tensors, header))


def load_step_record(path: str | Path) -> StepRecord:
    """The record in a file that a run wrote. Nothing in a file can run code: it holds numbers and JSON.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no record.
    """
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            names = sorted(file.keys())
            tensors = {name: file.get_tensor(name) for name in names}
            header = file.metadata()
        rows = []
        for fields in json.loads(header["rows"]):
            for name in ("videos", "images", "audios", "messages", "trace"):
                fields[name] = tuple(fields.get(name, ()))
            rows.append(Row(**fields))
        facts = dict(json.loads(header["facts"]))
    except FileNotFoundError:
        raise
    except Exception as error:  # what a damaged header raises has many types
        raise ValueError(
            f"{path} is no record of an optimizer step ({type(error).__name__}: {error}); name a file in RUN/{FOLDER}"
        ) from error
    return StepRecord(rows, tensors, facts)


def replay_batch(record: StepRecord, render: Callable[[Row], Prompt]) -> Batch:
    """The batch of a text step, to be given to `PolicyModule.update_policy` once its features are encoded.

    Args:
        record: of a step on answers, on pairs or in RL.
        render: makes a prompt of a row as the run did.

    Example:
        ```python
        batch = replay_batch(record, renderer)
        batch.features = module.features.get_or_encode(module.model, batch.prompts)
        module.update_policy(batch)
        ```
    """
    tensors = record.tensors
    prompts = [render(row) for row in record.rows]
    # 1. SFT: one answer of each; of a pair two.
    if "rewards" not in tensors:
        targets = recorded_continuations(record, prompts)
        size = len(targets) // max(1, len(prompts))
        taught = []
        for number, prompt in enumerate(prompts):
            answers = targets[number * size :][:size]
            rejected = answers[1] if size == 2 else None
            taught.append(dataclasses.replace(prompt, response=answers[0], rejected=rejected))
        return Batch(taught)
    # 2. RL: G answers with what the sampler said of their tokens.
    completions = recorded_completions(record)
    rewards = tensors["rewards"]
    valid = tensors["valid"]
    size = rewards.shape[1]
    groups = []
    for number, prompt in enumerate(prompts):
        first = number * size
        own = completions[first : first + size]
        group = Group(prompt, own, rewards[number], {}, valid[number])
        groups.append(group)
    return Batch(prompts, groups=groups)


def recorded_completions(record: StepRecord) -> list[Completion]:
    """The completions of an RL step, with what the engine said of their tokens."""
    tensors = record.tensors
    answers = recorded_continuations(record)
    logps = tensors["sampler_logp"].split([answer.num_sampled for answer in answers])
    completions = []
    for number, (answer, logp) in enumerate(zip(answers, logps, strict=True)):
        fields = {field.name: getattr(answer, field.name) for field in dataclasses.fields(answer)}
        experts: dict[str, Any] = {name: tensors.get(f"{name}.{number}") for name in EXPERTS}
        completions.append(Completion(**fields, logprobs=logp, text="", finish_reason="stop", **experts))
    return completions


def recorded_continuations(record: StepRecord, prompts: Sequence[Prompt] = ()) -> list[Continuation]:
    """What followed the prompts of a step, as the update read it.

    Args:
        record: of the step.
        prompts: rendered again; media of their targets have pixels that a record has not.
    """
    rendered = {item.key: item for prompt in prompts for target in prompt.targets for item in target.media}
    made = []
    for number in range(record.facts["num_completions"]):
        fields: dict[str, Any] = {name: record.tensors.get(f"{name}.{number}") for name in SHOWN}
        media = []
        for saved in record.facts.get("media", {}).get(str(number), ()):
            item = restored_media(saved, FULL_SHARD)  # a record is replayed on one rank
            media.append(rendered.get(item.key, item))
        made.append(Continuation(record.tensors[f"completions.{number}"], media=tuple(media), **fields))
    return made
