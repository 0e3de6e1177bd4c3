"""`check_family`: what README claims of a model family, as far as a tiny model of it shows that.

The report also names what it cannot show: training from YAML, RL, released files, vLLM itself.

    from longrl.testing import check_family

    print(check_family(MyFamily("tiny_folder", random_init=True)))

The folder holds config and tokenizer of a small model, as `longrl.testing.tiny` writes them; random weights will do.
Ranks are processes, so a script that calls this needs `if __name__ == "__main__":`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from longrl.models.base import CausalFamily, EncodesMedia, TextStack
from longrl.models.building import BuildsModel
from longrl.models.engine_adapter import EngineAdapter
from longrl.models.family import hooks_of, own_hooks
from longrl.models.patching import PatchesMedia
from longrl.models.planning_sizes import HasPlanningSizes
from longrl.models.reading import RendersPrompts
from longrl.testing import family_claims as claims
from longrl.testing.family_claims import Case, DoesNotApply
from longrl.testing.plain_forward import MediaInputs, qwen_media_inputs, stock_model
from longrl.testing.sample_prompts import sample_prompts
from longrl.types import FrameShard, Prompt

CLAIMS: dict[str, tuple[Callable[[Case], str], tuple[type, ...]]] = {
    "identity": (claims.check_identity, (RendersPrompts,)),
    "prompts": (claims.check_prompts, (RendersPrompts, PatchesMedia)),
    "patches": (claims.check_patches, (PatchesMedia,)),
    "planning sizes": (claims.check_planning_sizes, (HasPlanningSizes, EncodesMedia)),
    "features": (claims.check_features, (EncodesMedia, PatchesMedia)),
    "same logits": (claims.check_same_logits, (TextStack, RendersPrompts, EncodesMedia)),
    "shared prefix": (claims.check_shared_prefix, (TextStack, RendersPrompts, EncodesMedia)),
    "observations": (claims.check_observations, (TextStack, RendersPrompts, EncodesMedia)),
    "SFT": (claims.check_sft, (RendersPrompts, TextStack)),
    "generation": (claims.check_generation, (TextStack, RendersPrompts)),
    "cached features": (claims.check_cached_features, (EncodesMedia, PatchesMedia)),
    "engine": (claims.check_engine, (EngineAdapter,)),
    "export": (claims.check_export, (BuildsModel,)),
    "SP": (claims.check_sequence_parallel, (TextStack, PatchesMedia, EncodesMedia)),
}
"""Claim -> its check, and the capabilities behind it; a check comes behind those that it builds on."""
NOT_RUN = {
    "training from YAML": "it needs data; train with your own by `python -m longrl fit --model.family YOURS`",
    "RL": "it needs data and a reward; go on from an SFT run's checkpoint with a recipe of RL",
    "released files": "the model is tiny; `plan` and the first step of `fit` with the released folder read them",
    "vLLM": "it runs in a process of its own; rollouts by it are compared with the trainer before the first step",
}
"""Claims of docs/families.md that `check_family` does not run -> why, and what shows it."""


@dataclass
class FamilyReport:
    """Claims that were compared, and those that were not and why."""

    family: str
    checked: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.family}:"]
        lines += [f"  {claim}: {text}" for claim, text in self.checked.items()]
        lines += [f"  {claim}: not checked, {reason}" for claim, reason in self.skipped.items()]
        return "\n".join(lines)


def check_family(
    family: CausalFamily,
    *,
    prompts: Callable[[CausalFamily, FrameShard], list[Prompt]] = sample_prompts,
    plain_model: Callable[[nn.Module, CausalFamily], nn.Module] = stock_model,
    media_inputs: MediaInputs = qwen_media_inputs,
    num_ranks: int = 2,
) -> FamilyReport:
    """Checks every capability of a family against plain transformers, in float32 on a CPU.

    Not everything that docs/families.md has a column for: the report lists `NOT_RUN` as not checked.

    Args:
        family: of a tiny model.
        prompts: made for it, three or more; the shard says which part of the media a rank decodes.
        plain_model: a model with the same weights that is called as transformers models are; by default transformers'
            own class with eager attention.
        media_inputs: keywords by which that model takes the media of a prompt; by default those of Qwen's models.
        num_ranks: processes that share a sequence; 1 leaves sequence parallelism out.

    Returns:
        What was checked and what was skipped.

    Raises:
        AssertionError: with the claim that does not hold, the capabilities behind it, and the family's own hooks.
    """
    name = type(family).__name__
    report = FamilyReport(name)
    with tempfile.TemporaryDirectory(prefix="longrl-family-") as folder:
        case = Case(family, prompts, plain_model, media_inputs, num_ranks, Path(folder))
        for claim, (check, capabilities) in CLAIMS.items():
            try:
                report.checked[claim] = check(case)
            except DoesNotApply as reason:
                report.skipped[claim] = str(reason)
            except Exception as error:
                raise AssertionError(
                    f"{name} fails {claim!r}: {error or repr(error)}\n{_suspects(family, capabilities)}\n"
                    f"checked before: {', '.join(report.checked) or 'nothing'}"
                ) from error
    report.skipped |= NOT_RUN
    return report


def _suspects(family: CausalFamily, capabilities: tuple[type, ...]) -> str:
    """The capabilities behind a claim, the hooks that the family wrote, and where the defaults are."""
    lines = []
    for capability in capabilities:
        written = own_hooks(family, capability)
        hooks = f"its own {', '.join(written)}" if written else f"none of its own; {', '.join(hooks_of(capability))}"
        lines.append(f"  {capability.__name__} ({capability.__module__}), hooks: {hooks}")
    return "\n".join(lines)
