"""Templates of questions and answers: texts that name what a row says, `{problem}` and the like."""

from __future__ import annotations

import re
from collections.abc import Collection

from longrl.datamodules.media.subtitles import Subtitles

DEFAULT_QUESTION = (
    "{subtitles}{problem}\n\nReason first, between <think> and </think>. Then give your final answer between <answer> "
    "and </answer>: for a question with options its letter alone, else the answer and nothing more."
)
QUESTION_NAMES = ("problem", "asked", "instruction", "subtitles", "num_frames", "frame_times")
"""What `data.question_template` may name."""
DEFAULT_RESPONSE = "<think>{reasoning}</think><answer>{answer}</answer>"


def fill_template(template: str, **values: str) -> str:
    r"""The template with each `{name}` replaced; other braces stay, as in `\boxed{}`."""
    parts = re.split(r"\{(\w+)\}", template)  # texts and names in turn
    for i in range(1, len(parts), 2):
        parts[i] = values.get(parts[i], f"{{{parts[i]}}}")
    return "".join(parts)


def check_template(option: str, template: str, names: Collection[str]) -> None:
    """Raises ValueError if nothing fills a `{name}` of a template: it would be shown, or learned, as it is."""
    unknown = [name for name in re.findall(r"\{(\w+)\}", template) if name.isidentifier() and name not in names]
    if unknown:
        raise ValueError(
            f"data.{option} may name {', '.join(f'{{{name}}}' for name in names)}, got {{{unknown[0]}}} in "
            f"{template!r}; correct the name, or write it without braces"
        )


def check_templates(question: str, response: str, answer: str, subtitles: Subtitles) -> None:
    """Raises ValueError for templates of `data` that say too little, or name what no row has.

    Args:
        question: `data.question_template`.
        response: `data.response_template`.
        answer: `data.answer_template`.
        subtitles: `data.subtitles`.
    """
    if "{problem}" not in question and "{asked}" not in question:
        raise ValueError(f"data.question_template must contain {{problem}} or {{asked}}, got {question!r}")
    check_template("question_template", question, QUESTION_NAMES)
    if subtitles.source and "{subtitles}" not in question:
        raise ValueError(
            f"data.subtitles.source={subtitles.source} is shown where data.question_template says {{subtitles}}, "
            f"got {question!r}; add it"
        )
    check_template("response_template", response, ("reasoning", "answer", "option"))
    check_template("answer_template", answer, ("reasoning", "answer", "option"))
