"""Mathematics: equal in value, as math-verify sees it.

math-verify guards itself by SIGALRM, which works in a main thread only and cannot stop one long integer power. So it
runs in a process of its own, which is asked over a pipe and killed when it does not answer in time. That also keeps
sympy out of the trainer's memory. What needs no algebra (`math_statements.py`) never gets there, and neither does what
would take for ever (`math_text.is_absurd`).
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import re
import select
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from longrl.rewards.answers import after_thinking, answer_text
from longrl.rewards.math_statements import compare_statements
from longrl.rewards.math_text import is_absurd, plain_formula
from longrl.rewards.plain_numbers import end_of_text, last_boxed
from longrl.types import Completion, Row

logger = logging.getLogger(__name__)

TIMEOUT_S = 10.0
"""For one comparison; an answer that takes longer to evaluate counts as wrong."""
START_TIMEOUT_S = 120.0
"""For the process to import sympy."""
MAX_ANSWER_CHARS = 1000
"""Of a longer answer only the end is read, as text: for a number, not for a formula, of which a part is another one."""
MAX_FORMULA_CHARS = 300
"""A longer formula is wrong unasked: math-verify takes seconds for some of a few thousand characters."""
MAX_PROSE_CHARS = 200
"""Of running text so much of the end is searched for a formula."""


def math(completion: Completion, row: Row) -> float:
    r"""1.0 when the `<answer>` content, else the last `\boxed{}`, equals `row.answer` in value, else 0.0.

    Raises:
        ValueError: math-verify cannot read `row.answer`.
    """
    text = answer_text(completion.text) or last_boxed(after_thinking(completion.text))
    return float(text is not None and is_equal(row.answer, text))


def math_lenient(completion: Completion, row: Row) -> float:
    """As `math`; without either, the last expression that math-verify finds after the thinking counts."""
    rest = after_thinking(completion.text).strip()
    text = answer_text(completion.text) or last_boxed(rest)
    if text is None:
        return float(bool(rest) and is_equal(row.answer, rest, prose=True))
    return float(is_equal(row.answer, text))


def is_equal(gold: str, answer: str, *, prose: bool = False) -> bool:
    """Whether two expressions in LaTeX or plain notation have one value; callable from any thread.

    Args:
        gold: the ground truth.
        answer: an expression, which may stand in a few words; one that offers two values ("12 or 13"), denies its value
            ("not 12") or bounds it ("at least 12") is not equal, and neither is an equation that is untrue ("4=5").
        prose: `answer` is running text, whose last expression counts.

    Raises:
        ValueError: `gold` cannot be read as an expression.
    """
    if gold.strip() == answer.strip():
        return True
    # 1. Numbers and words need no algebra.
    is_whole = len(answer) <= MAX_ANSWER_CHARS
    answer = end_of_text(answer, MAX_ANSWER_CHARS)
    verdict = compare_statements(gold, answer, prose=prose)
    if verdict is not None:
        return verdict
    # 2. Formulas do.
    truth = plain_formula(gold)
    said = end_of_text(answer, MAX_PROSE_CHARS) if prose else plain_formula(answer)
    if "," in truth or r"\pm" in truth:
        said = re.sub(r"\s+or\s+", ", ", said)
    is_long = len(said) > max(MAX_FORMULA_CHARS, 2 * len(truth)) or not (is_whole or prose)
    if is_long or (is_absurd(said) and not is_absurd(truth)):
        return False
    reply = _WORKER.ask({"gold": truth or gold, "answer": said, "prose": prose})
    if reply is None:
        logger.warning("math answer took over %g s to evaluate and counts as wrong: %r", TIMEOUT_S, answer[-200:])
        return False
    if "error" in reply:
        raise ValueError(
            f"math-verify cannot compare with the ground truth {gold!r}: {reply['error']}; correct the row"
        )
    return bool(reply["equal"])


class _Worker:
    """The process that runs math_worker.py, started on first use, again after a kill and in a forked child."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def ask(self, request: dict[str, Any]) -> dict[str, Any] | None:
        """The reply, or None when the process was killed because none came in time."""
        with self._lock:
            try:
                reply = self._exchange(self._started(), request, TIMEOUT_S)
            except BaseException:  # stopped while it waited: the reply would be taken for the next request's
                self.stop()
                raise
            if reply is None:
                self.stop()
            return reply

    def stop(self) -> None:
        """Ends the process, if this process started it."""
        if self._process is not None and self._owner == os.getpid():
            self._process.kill()
            self._process.communicate()
        self._process = None

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._owner == os.getpid() and self._process.poll() is None:
            return self._process
        # -P keeps this folder off sys.path: its math.py would hide the standard library's.
        command = [sys.executable, "-P", str(Path(__file__).with_name("math_worker.py"))]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        self._owner = os.getpid()
        if self._exchange(self._process, {"gold": "1", "answer": "1"}, START_TIMEOUT_S) is None:
            self.stop()
            raise RuntimeError("the math-verify process did not start; check that `import math_verify` works")
        return self._process

    @staticmethod
    def _exchange(process: subprocess.Popen[bytes], request: dict[str, Any], timeout_s: float) -> dict[str, Any] | None:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
        except BrokenPipeError:
            return None
        ready, _, _ = select.select([process.stdout], [], [], timeout_s)
        line = process.stdout.readline() if ready else b""
        return json.loads(line) if line else None


_WORKER = _Worker()
atexit.register(_WORKER.stop)
