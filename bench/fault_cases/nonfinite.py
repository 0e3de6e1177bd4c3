"""Losses and gradients that are not finite."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback

from fault_cases.fault import Fault, Outcome
from fault_cases.small_runs import Config, command, fit, kept_checkpoint, steps_lost, text_run
from longrl.modules.skipped_steps import FOLDER
from tests.runs import rollouts

LAST = "checkpoints/last.ckpt"
IN_A_ROW = "loss or gradient norm of 3 optimizer steps in a row was not finite"


class BadGradients(Callback):
    """Multiplies the gradient of the embeddings, in some steps.

    Args:
        factor: `nan` or `inf`.
        first: step from which on.
        count: so many batches.
    """

    def __init__(self, factor: str, first: int = 2, count: int = 99) -> None:
        self.factor, self.first, self.count = float(factor), first, count
        self.is_bad = False

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        weight = pl_module.model.get_input_embeddings().weight
        weight.register_hook(lambda gradient: (gradient + 1) * self.factor if self.is_bad else gradient)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.is_bad = self.first <= batch_idx < self.first + self.count


def bad_run(folder: Path, stage: str, **options: Any) -> Config:
    """A run with bad gradients."""
    values = text_run(folder, stage)
    if stage == "rl":
        values["rollout"] = rollouts(sampling={"num_generations": 2, "max_completion_tokens": 3})
    callback = {"class_path": "fault_cases.nonfinite.BadGradients", "init_args": options}
    values["trainer"]["callbacks"].append(callback)
    return values


def is_finite(folder: Path) -> bool:
    """Whether the weights of the last checkpoint are numbers."""
    saved = torch.load(folder / "run" / LAST, weights_only=True)
    return all(math.isfinite(float(value.sum())) for value in saved["state_dict"].values())


def every_step(stage: str, factor: str) -> Any:
    """All steps from the third on have bad gradients."""

    def does(folder: Path) -> Outcome:
        ended = fit(folder, bad_run(folder, stage, factor=factor))
        kept = f"{kept_checkpoint(folder)}, weights finite: {is_finite(folder)}, {len(records(folder))} batches"
        return Outcome(ended.line_with("RuntimeError"), ended.exit_code, kept, steps_lost(folder))

    return does


def one_step(folder: Path) -> Outcome:
    """A single step has bad gradients."""
    ended = fit(folder, bad_run(folder, "sft", factor="nan", count=1))
    kept = f"{kept_checkpoint(folder)}, weights finite: {is_finite(folder)}"
    return Outcome(ended.line_with("is left out"), ended.exit_code, kept, steps_lost(folder))


def records(folder: Path) -> list[Path]:
    """Batches that were kept."""
    return sorted((folder / "run" / FOLDER).glob("*.safetensors"))


def replayed(folder: Path) -> Outcome:
    """The kept batch, with a weight that is no number."""
    fit(folder, bad_run(folder, "sft", factor="nan", count=1))
    planted = folder / "planted.ckpt"
    saved = torch.load(folder / "run" / LAST, weights_only=True)
    saved["state_dict"]["model.model.layers.1.mlp.down_proj.weight"][0, 0] = math.nan
    torch.save(saved, planted)
    given = ["--weights", str(planted), "--trust_run_config", "true"]  # it names callbacks of the tests
    ended = command(["replay", str(records(folder)[0]), *given], folder)
    return Outcome(ended.line_with("first number"), ended.exit_code, "the batch", 0)


FAULTS = [
    Fault("non-finite", "nan gradients from a step on, SFT", every_step("sft", "nan"), 1, IN_A_ROW),
    Fault("non-finite", "infinite gradients from a step on, GRPO", every_step("rl", "inf"), 1, IN_A_ROW),
    Fault("non-finite", "nan gradients in one step, SFT", one_step, 0, "the optimizer step after 2 steps is left out"),
    Fault(
        "non-finite",
        "a batch left out is replayed with a weight that is nan",
        replayed,
        0,
        r"first number that is not finite, forward: the output .* of model\.layers\.1\.mlp\.down_proj$",
    ),
]
