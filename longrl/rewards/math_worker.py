"""The process behind `longrl.rewards.math`: reads one JSON request per line, writes one JSON reply per line."""

from __future__ import annotations

import json
import logging
import re
import sys


def compare(gold: str, answer: str, prose: bool = False) -> dict[str, object]:
    """`{"equal": bool}`, or `{"error": str}` when the ground truth cannot be read."""
    from math_verify import parse, verify

    truth = parse(_delimited(gold))
    if not truth:
        return {"error": "no expression found in it"}
    said = parse(answer if prose or _is_sentence(answer) else _delimited(answer))
    return {"equal": bool(said) and verify(truth, said)}


def _delimited(expression: str) -> str:
    r"""In a box, unless it has delimiters: math-verify then reads all of it, and a bare \sqrt{2} at all."""
    if "$" in expression or "\\boxed" in expression:
        return expression
    latex = re.sub(r"(?<!\\)\bsqrt\(([^()]*)\)", r"\\sqrt{\1}", expression)  # as Python writes it
    return f"\\boxed{{{latex}}}"


def _is_sentence(answer: str) -> bool:
    """Whether the answer is one number among words ("12 apples"): math-verify finds the last number of a text."""
    values = re.findall(r"\d+(?:[.,/]\d+)*", answer)
    return len(set(values)) == 1 and "\\" not in answer and re.search(r"[A-Za-z]{3}\b(?!\()", answer) is not None


def main() -> None:
    """Answers until standard input ends, which it does when the parent process dies."""
    logging.disable()  # an answer that math-verify cannot read is no news
    for line in sys.stdin:
        try:
            reply = compare(**json.loads(line))
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        sys.stdout.write(json.dumps(reply) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
