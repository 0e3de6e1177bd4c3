"""Texts right by degrees: transcriptions by their word error rate, free answers by ROUGE, as Video-R1 rewards them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from longrl.rewards.answers import lenient_text, strict_text
from longrl.rewards.porter_stem import stem_word
from longrl.types import Completion, Row

MAX_FREE_FORM_CHARS = 5000
"""Of a longer free answer only the beginning is compared; its share of right words is small by then anyway."""


def transcription_accuracy(completion: Completion, row: Row) -> float:
    """1 - word error rate of the content of `<answer>` against `row.answer`, at least 0 (Video-R1, arXiv:2503.21776).

    Words are what space parts, compared as they are written: case and punctuation count.
    """
    return max(0.0, 1.0 - word_error_rate(row.answer, strict_text(completion.text)))


def transcription_accuracy_lenient(completion: Completion, row: Row) -> float:
    """As `transcription_accuracy`; without an `<answer>` the text after the thinking is compared instead."""
    return max(0.0, 1.0 - word_error_rate(row.answer, lenient_text(completion.text)))


def free_form_accuracy(completion: Completion, row: Row) -> float:
    """Mean of ROUGE-1, 2 and L of the content of `<answer>` with `row.answer`, in [0, 1] (Video-R1, arXiv:2503.21776).

    It counts words in common, not meaning: "not a cat" is close to "a cat", and of one word, which has no pairs, the
    right answer earns 2/3. `longrl.rewards.judge.Judge` asks a model.
    """
    return mean_rouge(row.answer, strict_text(completion.text))


def free_form_accuracy_lenient(completion: Completion, row: Row) -> float:
    """As `free_form_accuracy`; without an `<answer>` the text after the thinking is compared instead."""
    return mean_rouge(row.answer, lenient_text(completion.text))


def check_reference(row: Row) -> None:
    """Checks that ROUGE finds words in a reference.

    Raises:
        ValueError: it has none.
    """
    if not rouge_words(row.answer):
        raise ValueError(
            f"row {row.id!r}: a free_form answer needs words of a to z or digits, all that ROUGE compares, got "
            f"{row.answer!r}; give the row task='open_ended' or 'exact'"
        )


def word_error_rate(reference: str, text: str) -> float:
    """Words to insert, delete or replace, by the words of the reference; 1.0 stands for anything above."""
    wanted, said = reference.split(), text.split()
    num_wanted = max(1, len(wanted))
    # Twice as many words as wanted are at least so many too many: no need to look at them.
    if len(said) >= 2 * num_wanted:
        return 1.0
    return min(1.0, edit_distance(wanted, said) / num_wanted)


def mean_rouge(reference: str, text: str) -> float:
    """Mean F1 of ROUGE-1, ROUGE-2 and ROUGE-L (Lin 2004) over stems, as google's rouge-score computes them.

    Words are runs of a to z and digits, so that a text in another script scores 0.
    """
    wanted, said = rouge_words(reference), rouge_words(text[:MAX_FREE_FORM_CHARS])
    if not wanted or not said:
        return 0.0
    common = common_subsequence_length(wanted, said)
    scores = [_ngram_f1(wanted, said, 1), _ngram_f1(wanted, said, 2), _f1(common, len(wanted), len(said))]
    return sum(scores) / len(scores)


def rouge_words(text: str) -> list[str]:
    """Words in lower case; those of more than three letters by their stems."""
    words = re.findall(r"[a-z0-9]+", text.lower())
    return [stem_word(word) if len(word) > 3 else word for word in words]


def _ngram_f1(wanted: Sequence[str], said: Sequence[str], n: int) -> float:
    counts = [Counter(zip(*(words[start:] for start in range(n)), strict=False)) for words in (wanted, said)]
    common = (counts[0] & counts[1]).total()
    return _f1(common, counts[0].total(), counts[1].total())


def _f1(common: int, num_wanted: int, num_said: int) -> float:
    """Harmonic mean of recall and precision."""
    return 2 * common / (num_wanted + num_said) if common else 0.0


# Whole columns of the usual tables at once, as the bits of one integer: linear in the longer text for references of
# usual length, and few lines.


def edit_distance(first: Sequence[str], second: Sequence[str]) -> int:
    """Levenshtein distance of two sequences of words, by Myers' bit vectors (JACM 46(3), 1999)."""
    if not first:
        return len(second)
    places = _places(first)
    full = (1 << len(first)) - 1
    last = 1 << (len(first) - 1)
    # Bits where the next row of the current column is one more, or one less.
    more, less, distance = full, 0, len(first)
    for word in second:
        same = places.get(word, 0)
        vertical = same | less
        horizontal = (((same & more) + more) ^ more) | same
        higher = (less | ~(horizontal | more)) & full
        lower = more & horizontal
        distance += bool(higher & last) - bool(lower & last)
        higher = (higher << 1) | 1
        more = ((lower << 1) | ~(vertical | higher)) & full
        less = higher & vertical & full
    return distance


def common_subsequence_length(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence of words, by Hyyro's bit vectors (2004)."""
    places = _places(first)
    full = (1 << len(first)) - 1
    row = full
    for word in second:
        matches = row & places.get(word, 0)
        row = ((row + matches) | (row - matches)) & full
    return len(first) - row.bit_count()


def _places(words: Sequence[str]) -> dict[str, int]:
    """Word -> the bits of the places where it stands."""
    places: dict[str, int] = {}
    for index, word in enumerate(words):
        places[word] = places.get(word, 0) | 1 << index
    return places
