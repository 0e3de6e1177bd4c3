"""The published protocol that an evaluation follows, and what it shows of its own: frames, budget, prompts."""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from longrl.evaluation.averages import QuestionGroups
from longrl.evaluation.outcomes import FiguresFunction, Outcome
from longrl.io.functions import import_function
from longrl.rewards.reward_sum import RewardFn
from longrl.types import Row

SubmissionForm = Callable[[Sequence[Row], Sequence[str | None]], Any]
"""What a server wants to be sent of questions and answers."""


@dataclass(frozen=True)
class PublishedProtocol:
    """Whose way of asking and scoring an evaluation follows; its options say what that way is.

    Example:
        `PublishedProtocol("lmms-eval VideoMME", rule="longrl.evaluation.published_rules.lmms_eval_letter")`
    """

    name: str = "longrl"
    """Shown in reports: `longrl` for questions in its own wording, sampled and scored its own way."""
    source: str | None = None
    """Where the protocol is published."""
    rule: str | None = None
    """Its own scoring, a second score beside strict and robust: import path (or `file.py:function`) of a function
    `(completion, row) -> float` as rewards are; `longrl/evaluation/published_rules.py` has those of released code."""
    rule_name: str | None = None
    """Name of that score in reports, by default the function's."""
    figures: str | None = None
    """What its benchmark reports of all answers together, such as an average over tasks or a gain: import path of a
    function `(records) -> {name: value}`; `longrl/evaluation/benchmark_figures.py` has those of published ones."""
    mean_over: str | None = None
    """Also report the mean over tasks of the mean of each: `category`, or the field of the metadata that names them."""
    groups: QuestionGroups | None = None
    """Also score groups of questions that count together."""
    submission: str | None = None
    """Also write `submission.json`, for a server that knows the answers: import path (or `file.py:function`) of a
    function `(rows, answers) -> JSON` of the questions and the texts of their first answers, None where there is none;
    `longrl/evaluation/submissions.py` has published forms."""

    @property
    def score_name(self) -> str | None:
        """Name of the second score; None without one."""
        return self.rule_name or (self.rule and self.rule.rpartition(":")[2].rpartition(".")[2])

    def scoring_rule(self) -> RewardFn | None:
        """The function that `rule` names.

        Raises:
            ValueError: there is none.
        """
        return None if self.rule is None else import_function(self.rule, "protocol.rule")

    def figures_function(self) -> FiguresFunction | None:
        """The function that `figures` names.

        Raises:
            ValueError: there is none.
        """
        return None if self.figures is None else import_function(self.figures, "protocol.figures")

    def submission_form(self) -> SubmissionForm | None:
        """The function that `submission` names.

        Raises:
            ValueError: there is none.
        """
        return None if self.submission is None else import_function(self.submission, "protocol.submission")

    def to_dict(self) -> dict[str, Any]:
        """Returns its fields as results.json has them; those that came later where they are set."""
        fields = {**asdict(self), "rule_name": self.score_name}
        later = ("figures", "mean_over", "groups", "submission")
        return {name: value for name, value in fields.items() if value is not None or name not in later}


OWN_PROTOCOL = PublishedProtocol()


def is_limit(option: str) -> bool:
    """True of the name of a family's option that bounds what it shows: `max_pixels`, `max_video_tokens`."""
    return option.startswith(("min_", "max_")) and option.endswith(("pixels", "tokens", "frames"))


def list_limits(policy: Mapping[str, Any], max_prompt_tokens: int | None, max_completion_tokens: int) -> dict[str, Any]:
    """All that bounds what a policy is shown and says: pixels, frames and tokens, by the names of their options.

    Args:
        policy: its identity; a model in this process has its family's options there, an endpoint what is sent.
        max_prompt_tokens: `data.max_prompt_tokens`.
        max_completion_tokens: `sampling.max_completion_tokens`.
    """
    settings = policy.get("settings", {})
    known = {name: value for name, value in settings.items() if is_limit(name) and value is not None}
    sent = {"frames": policy["frames"]} if "frames" in policy else {}
    given = {"max_prompt_tokens": max_prompt_tokens, "max_completion_tokens": max_completion_tokens}
    return known | sent | given


def describe_shown(outcome: Outcome, rows: Sequence[Row], reading: Mapping[str, Any]) -> dict[str, Any]:
    """What a condition showed, in numbers that two evaluations can be compared by.

    Args:
        outcome: of the condition.
        rows: all questions.
        reading: how questions were shown, from results.json.

    Returns:
        `frames`, `prompt_tokens` and `media_tokens`: least, median and most of a question, None where nothing is
        known; `template_sha256` of the question template; `prompt_sha256`, of the text of the first answered question,
        which `prompt_of` names.
    """
    answers = [outcome.answers[index] for index in sorted(outcome.answers)]
    frames = [sum(map(len, answer.frame_indices)) for answer in answers if answer.frame_indices]
    media = [answer.num_media_tokens for answer in answers if answer.num_media_tokens is not None]
    first = min(outcome.answers, default=None)
    return {
        "frames": _spread(frames),
        "prompt_tokens": _spread([answer.num_prompt_tokens for answer in answers]),
        "media_tokens": _spread(media),
        "template_sha256": _sha256(reading["question_template"]),
        "prompt_of": None if first is None else rows[first].id,
        "prompt_sha256": None if first is None else _sha256(outcome.answers[first].input),
    }


def list_protocol_facts(results: Mapping[str, Any]) -> dict[str, str]:
    """What results.json says of protocol, frames, budget and prompts, in words: name -> text.

    Args:
        results: of a finished evaluation.
    """
    protocol = results["protocol"]
    source = f" ({protocol['source']})" if protocol["source"] else ""
    facts = {"protocol": f"{protocol['name']}{source}", "sampling": list_values(results["sampling"])}
    unknown = "sampled by the server" if results["policy"].get("video_as") == "video" else "none"
    frames, tokens, prompts = [], [], []
    for name, condition in results["conditions"].items():
        reading, shown = condition["reading"], condition["shown"]
        if not reading["blind"]:
            chosen = f"; selection: {list_values(reading['selection'])}" if "selection" in reading else ""
            frames.append(f"{name}: {_in_words(shown['frames']) or unknown} ({list_values(reading['video'])}{chosen})")
        if shown["prompt_tokens"]:
            media = f", {_in_words(shown['media_tokens'])} of media" if shown["media_tokens"] else ""
            tokens.append(f"{name}: {_in_words(shown['prompt_tokens'])}{media}")
        if shown["prompt_sha256"]:
            prompts.append(f"{name}: question {shown['prompt_of']} {shown['prompt_sha256'][:16]}")
    template = next(iter(results["conditions"].values()))["shown"]["template_sha256"]
    facts |= {
        "frames of a question": "; ".join(frames) or "none",
        "budget": list_values(results["budget"]),
        "prompt tokens": "; ".join(tokens) or "unknown",
        "prompt sha256": "; ".join([f"template {template[:16]}", *prompts]),
    }
    return facts


def list_values(options: Mapping[str, Any]) -> str:
    """Options that are set, in a line."""
    return ", ".join(f"{name} {value}" for name, value in options.items() if value is not None)


def _spread(counts: Sequence[int]) -> dict[str, float] | None:
    """Least, median and most."""
    return {"min": min(counts), "median": statistics.median(counts), "max": max(counts)} if counts else None


def _in_words(spread: Mapping[str, float] | None) -> str:
    if spread is None:
        return ""
    if spread["min"] == spread["max"]:
        return f"{spread['max']:g}"
    return f"{spread['min']:g} to {spread['max']:g}, median {spread['median']:g}"


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
