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

from longrl.io.atomic import atomic_write
from longrl.modules.mini_batches import TokenLoss
from longrl.types import Batch, Completion, Group, Prompt, Row

logger = logging.getLogger(__name__)

FOLDER = "nonfinite_steps"
"""Folder of the run in which records lie."""
MAX_RECORDS = 8
"""Records that every rank writes in a run: the first ones say most."""


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
    """Of text `input_ids.p` [T] of each prompt and `completions.c` [S] of each completion; in RL also `advantages`,
    `old_logp`, `ref_logp`, `sampler_logp` [N] as far as there are any, `weights` [C], `rewards` and `valid` [P, G].
    Of a diffusion model these and `latents.c` [W + 1, ...] of each sample."""
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Plain values: step, rank, loss, gradient norm, temperature."""


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
        self.count += 1
        self.in_a_row += 1
        loss, grad_norm = facts["loss"], facts["grad_norm"]
        path = folder / FOLDER / f"step_{facts['global_step']:08d}_{self.count}_rank_{facts['rank']}.safetensors"
        made = record()
        kept = "not kept, for there are enough"
        if self.count <= MAX_RECORDS:
            kept = f"kept in {path}"
            try:
                write_step_record(path, dataclasses.replace(made, facts={**made.facts, **facts}))
            except OSError as error:  # a full disk must not part this rank from the others
                kept = f"lost ({error})"
        logger.warning(
            "the optimizer step after %d steps is left out, number %d of the run: its loss is %g and its gradient norm "
            "%g. Rows %s; their batch is %s",
            facts["global_step"], self.count, loss, grad_norm, [row.id for row in made.rows], kept,
        )  # fmt: skip
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


# -- records -----------------------------------------------------------------------------------------------------


def text_record(
    prompts: Sequence[Prompt], completions: Sequence[Sequence[Tensor]], loss: TokenLoss, **facts: Any
) -> StepRecord:
    """The record of a step on text: P prompts, the token ids of G completions of each, and what their loss reads."""
    named = loss.tensors()
    for number, prompt in enumerate(prompts):
        named[f"input_ids.{number}"] = prompt.input_ids
    answers = [ids for of_prompt in completions for ids in of_prompt]
    for number, ids in enumerate(answers):
        named[f"completions.{number}"] = ids
    return StepRecord([prompt.row for prompt in prompts], named, {"num_completions": len(answers), **facts})


def write_step_record(path: Path, record: StepRecord) -> None:
    """Writes a safetensors file, whole or not at all; rows and facts are JSON in its header."""
    from safetensors.torch import save

    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in record.tensors.items()}
    rows = [dataclasses.asdict(row) | {"metadata": dict(row.metadata)} for row in record.rows]
    header = {"rows": json.dumps(rows, default=str), "facts": json.dumps(record.facts, default=str)}
    atomic_write(path, save(tensors, header))


def load_step_record(path: str | Path) -> StepRecord:
    """The record in a file that a run wrote. Nothing in a file can run code: it holds numbers and JSON.

    Raises:
        FileNotFoundError: there is no such file.
    """
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
        header = file.metadata()
    rows = []
    for fields in json.loads(header["rows"]):
        media = {name: tuple(fields[name]) for name in ("videos", "images", "audios")}
        rows.append(Row(**{**fields, **media}))
    return StepRecord(rows, tensors, json.loads(header["facts"]))


def replay_batch(record: StepRecord, render: Callable[[Row], Prompt]) -> Batch:
    """The batch of a text step, to be given to `PolicyModule.update_policy` once its features are encoded.

    Args:
        record: of an SFT or RL step.
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
    answers = [tensors[f"completions.{number}"] for number in range(record.facts["num_completions"])]
    if "rewards" not in tensors:  # SFT: one answer of each
        pairs = zip(prompts, answers, strict=True)
        return Batch([dataclasses.replace(prompt, response_ids=ids) for prompt, ids in pairs])
    sampled = tensors["sampler_logp"].split([len(ids) for ids in answers])
    completions = [Completion(ids, logp, "", "stop") for ids, logp in zip(answers, sampled, strict=True)]
    size = tensors["rewards"].shape[1]
    groups = []
    for number, prompt in enumerate(prompts):
        own = completions[number * size : (number + 1) * size]
        groups.append(Group(prompt, own, tensors["rewards"][number], {}, tensors["valid"][number]))
    return Batch(prompts, groups=groups)
