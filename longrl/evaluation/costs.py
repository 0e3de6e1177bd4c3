"""What answers cost: operations of the encoder and of the text stack, and what was measured while they came about.

Operations follow from model, prompt and answer alone, and are part of samples.jsonl and results.json, which are the
same in every run of an evaluation. What is measured, and what caches spared, differs from run to run: it has files of
its own (`longrl.evaluation.timings`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from longrl.models.base import CausalFamily
from longrl.models.cell_order import in_order
from longrl.models.encode_flops import EncodeCost
from longrl.models.step_flops import GroupTokens, TextCost
from longrl.types import Completion, Media, Prompt

ENCODE, PREFILL, GENERATE = "encode_flops", "prefill_flops", "generate_flops"
OPERATIONS = (ENCODE, PREFILL, GENERATE)
"""Of a question with all its answers: media that go through the encoder, the prompt that is read once, and the tokens
behind it, sampled or shown."""
DECODE_S, DECODE_SPENT_S, ENCODE_SPENT = "decode_s", "decode_spent_s", "encode_spent_flops"
MEASURED = (DECODE_S, DECODE_SPENT_S, ENCODE_SPENT)
"""Seconds in which the question's media are decoded by themselves, and those that this run spent on it; operations of
the encoder that this run spent on it, for features that were there cost nothing."""
COUNTED = ("frames", "prompt_tokens", "media_tokens", "completion_tokens")


@dataclass(frozen=True)
class ModelCost:
    """What questions and answers cost a model in this process."""

    family: CausalFamily
    encoder: EncodeCost
    text: TextCost
    generating: TextCost
    """The same where tokens are read one by one."""

    @classmethod
    def of(cls, family: CausalFamily, model: Any) -> ModelCost:
        """Counted on a model."""
        text = TextCost.of(family, model)
        delta = family.planning_sizes()[0].delta_nets
        one_by_one = replace(text, rule_flops=delta.num_layers * delta.rule_flops(1)) if delta else text
        return cls(family, EncodeCost.of(family, model), text, one_by_one)

    def encode_flops(self, media: Iterable[Media]) -> float:
        """Operations of the encoder for media, each once."""
        distinct = {in_order(item).key: item for item in media}
        return sum(self.encoder.flops(self.family, item) for item in distinct.values())

    def of_answers(self, prompt: Prompt, completions: Sequence[Completion]) -> dict[str, float]:
        """`OPERATIONS` of a question and its answers."""
        length = len(prompt.input_ids)
        shown = sum(len(completion.token_ids) - completion.num_sampled for completion in completions)
        lengths = [len(completion.token_ids) for completion in completions]
        alone = self.generating.forward_flops([GroupTokens(length, ())])
        return {
            ENCODE: self.encode_flops(all_media(prompt, completions)),
            PREFILL: self.text.forward_flops([GroupTokens(length, ())]),
            GENERATE: self.generating.forward_flops([GroupTokens(length, lengths, shown)]) - alone,
        }


def all_media(prompt: Prompt, completions: Sequence[Completion]) -> list[Media]:
    """What a question shows, and what its answers were shown."""
    return [*prompt.media, *(item for completion in completions for item in completion.media)]


def measured(prompt: Prompt, cost: ModelCost | None = None, encoded: Iterable[Media] | None = None) -> dict[str, Any]:
    """`MEASURED` of a question, None where nobody measured.

    Args:
        prompt: as its loader made it.
        cost: of the model.
        encoded: media that went through the encoder for this question; None where that is not known.
    """
    reading = prompt.reading
    spent = None if cost is None or encoded is None else cost.encode_flops(encoded)
    return {
        DECODE_S: reading and reading.alone_s,
        DECODE_SPENT_S: reading and reading.spent_s,
        ENCODE_SPENT: spent,
    }


def costs_of(line: Mapping[str, Any], blind: bool = False) -> dict[str, float | None]:
    """What a question cost by a line of samples.jsonl, of any release; None where it does not say.

    A server that tells no usage has counted 0 tokens, and one that is sent whole videos does not tell their frames.

    Args:
        line: of a question that was answered.
        blind: nothing was shown.
    """
    sampled = sum(line["num_completion_tokens"])
    is_usage_told = line["num_prompt_tokens"] > 0
    are_frames_known = line["frame_indices"] or blind or line["num_media_tokens"] == 0
    counted = {
        "frames": line["num_frames"] if are_frames_known else None,
        "prompt_tokens": line["num_prompt_tokens"] or None,
        "media_tokens": line["num_media_tokens"],
        "completion_tokens": sampled if sampled or is_usage_told else None,
    }
    operations = line.get("costs") or {}
    return counted | {name: operations.get(name) for name in OPERATIONS}


def mean_costs(costs: Sequence[Mapping[str, float | None]]) -> dict[str, dict[str, float] | None]:
    """Mean of a question, total, and how many questions say it, of each cost; None of one that none says."""
    summary: dict[str, dict[str, float] | None] = {}
    for name in dict.fromkeys(name for one in costs for name in one):
        values = [value for one in costs if (value := one.get(name)) is not None]
        total = sum(values)
        summary[name] = {"mean": total / len(values), "total": total, "n": len(values)} if values else None
    return summary
