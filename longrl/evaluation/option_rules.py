"""Answer reading of the benchmarks of configs/eval/, as their authors' released code has it (`protocol.rule`).

As `published_rules.py`: each is a function `(completion, row) -> 1.0 or 0.0`, stated with its quirks. All read what
follows the thinking, for released code knows answers alone. Where it draws an option at random because it reads none,
or asks a judge model, the answer is wrong here.
"""

from __future__ import annotations

import re

from longrl.rewards.answers import after_thinking
from longrl.rewards.options import parse_options
from longrl.types import Completion, Row

LEAD_INS = (
    "The best answer is", "The correct answer is", "The answer is", "The answer", "The best option is",
    "The correct option is", "Best answer:", "Best option:",
)  # fmt: skip
"""What LongVideoBench's reading takes out of an answer wherever it stands, one after the other."""
MME_V2_LEAD_INS = ("Final Answer:", *LEAD_INS, "Answer:", "Option:")
FEWEST_WORDS = 5
EGO_MARKS = ",.!?;:'"
OPENING, CLOSING = "<answer>", "</answer>"


def lvbench_letter(completion: Completion, row: Row) -> float:
    """LVBench (`lvbench/utils/answer_util.py`): first character of what stands before the first ")", and behind "(".

    "(B) a dog", "B) a dog", "B. a dog" and "Blue" are B; "The answer is B" is T, and wrong.
    """
    text = after_thinking(completion.text).strip().split(")")[0].strip()
    if "(" in text:
        text = text.split("(")[1].strip()
    return float(text.split(" ")[0][:1] == row.answer)


def mlvu_option(completion: Completion, row: Row) -> float:
    """MLVU (`choice_bench.py`): the character before the first ")", or else the whole answer, must be the letter.

    "B", "B) a dog" and "(B) a dog" are B; "B." and "B. a dog" are wrong.
    """
    text = after_thinking(completion.text).strip()
    at = text.find(")")
    said = text if at < 0 else text[max(at - 1, 0) : at]
    return float(said == row.answer)


def longvideobench_letter(completion: Completion, row: Row) -> float:
    """LongVideoBench (lmms-eval's task, "same as original"): the first capital A to E once lead-ins are taken out.

    Any capital counts, that of "Because" too.
    """
    return float(_first_capital(after_thinking(completion.text), LEAD_INS, "ABCDE") == row.answer)


def video_mme_v2_letter(completion: Completion, row: Row) -> float:
    """Video-MME-v2 (`extract_characters_regex_v2`): the first capital A to H once lead-ins are taken out.

    Of a long reasoning that may be any capital before its "Final Answer:", as there.
    """
    return float(_first_capital(after_thinking(completion.text), MME_V2_LEAD_INS, "ABCDEFGH") == row.answer)


def _first_capital(text: str, lead_ins: tuple[str, ...], letters: str) -> str:
    text = text.strip()
    for lead_in in lead_ins:
        text = text.replace(lead_in, "")
    found = re.search(f"[{letters}]", text)
    return found[0] if found else ""


def mvbench_option(completion: Completion, row: Row) -> float:
    """MVBench (`check_ans` of `mvbench.ipynb`): the first word of the first line, a "(" before it, and the option.

    The prompt ends in "Best option:(", so that is put before the answer. One must lie within the other, without stops:
    "B", "B.", "B) a dog" and "(B) a dog" are "(b)". So is an answer of no word at all, whatever is right.
    """
    said = "(" + after_thinking(completion.text).strip().split("\n")[0]
    first = said.lower().split(" ")[0]
    option = f"({row.answer.lower()})"
    return float(first.replace(".", "") in option or option in first)


def temp_compass(completion: Completion, row: Row) -> float:
    """TempCompass (`eval_*.py --disable_llm`): what its rules match, by the kind of question.

    Yes or no must begin the answer. An option is its letter, alone or before "." or ")". A caption is
    named by its line, its sentence, its label ("Caption A") or letter, a stop behind it being of no account. The
    released code asks GPT-3.5 what its rules leave open.
    """
    text = after_thinking(completion.text).replace("</s>", "").strip()
    kind = row.metadata.get("task_type")
    if kind == "yes_no":
        said = next((word for word in ("yes", "no") if text.lower().startswith(word)), "")
        return float(said == row.answer)
    if kind == "caption_matching":
        return float(_names_caption(text, row.problem, row.answer))
    return float(text == row.answer or text.startswith((f"{row.answer}.", f"{row.answer})")))


def _names_caption(text: str, problem: str, answer: str) -> bool:
    lines = [line for line in problem.split("\n")[1:] if ": " in line]
    said = None
    for line in lines:
        said = line if line == text else said
    for line in lines:
        sentence = line.split(": ")[1]
        behind = text.split(") ")[1] if ") " in text else None
        said = sentence if sentence in (text, behind) else said
    labels = [line.split(": ")[0] for line in lines]
    short = [re.sub(r"Sentence |Option |Caption ", "", label) for label in labels]
    for label in (*labels, *short):
        said = label if label in (text, text.replace(".", "")) else said
    label, sentence = answer.split(":")[0], answer.split(": ")[1]
    return said in (answer, label, sentence, label.split()[-1])


def ego_schema_option(completion: Completion, row: Row) -> float:
    """EgoSchema as lmms-eval reads it (MMMU's rule): the first of "(B)", "B " and "B.", each at its last place.

    In an answer of more than five words without any, an option whose line is there with a small letter. EgoSchema has
    no code of its own for models that answer in words.
    """
    options = parse_options(row.problem)
    text = after_thinking(completion.text)
    for mark in EGO_MARKS:
        text = text.strip(mark)
    text = f" {text} "
    forms = ("({})", "{} ", "{}.")
    found = {form.format(letter): letter for form in forms for letter in options if form.format(letter) in text}
    if not found and len(text.split()) > FEWEST_WORDS:
        text = text.lower()
        lines = {f"{letter}. {wording}".lower(): letter for letter, wording in options.items()}
        found = {line: letter for line, letter in lines.items() if line in text}
    return float(bool(found) and found[min(found, key=text.rfind)] == row.answer)


def video_holmes_letter(completion: Completion, row: Row) -> float:
    """Video-Holmes (`evaluate.py`): a capital A to F in the last `<answer>`, or in the whole text without one.

    The first letter of the alphabet counts that has a blank or colon behind it or a "[" before it, or else that is
    there at all: "B, not A" is A, and so is "All of B".
    """
    said = _last_tagged(completion.text)
    marked = (letter for letter in "ABCDEF" if any(form in said for form in (f"{letter} ", f"{letter}:", f"[{letter}")))
    return float(next(marked, next((letter for letter in "ABCDEF" if letter in said), "")) == row.answer)


def _last_tagged(text: str) -> str:
    """The last of what `<answer>(.*?)</answer>` finds, or the text where it finds nothing; in a time linear in it."""
    said, start = text, text.find(OPENING)
    while start >= 0 and (end := text.find(CLOSING, start)) >= 0:
        said = text[start + len(OPENING) : end].strip()
        start = text.find(OPENING, end)
    return said
