"""The process behind `longrl.rewards.math`: reads one JSON request per line, writes one JSON reply per line."""

from __future__ import annotations

import json
import logging
import signal
import sys


def compare(gold: str, answer: str, prose: bool = False) -> dict[str, object]:
    """`{"equal": bool}`, or `{"error": str}` when the ground truth cannot be read."""
    from math_verify import parse, verify

    truth = parse(_delimited(gold))
    if not truth:
        return {"error": "no expression found in it"}
    said = parse(answer if prose else _delimited(answer))
    return {"equal": bool(said) and verify(truth, said)}


def _delimited(expression: str) -> str:
    r"""In a box, unless it has delimiters: math-verify then reads all of it, and a bare \sqrt{2} at all."""
    return expression if "$" in expression or "\\boxed" in expression else f"\\boxed{{{expression}}}"


def main() -> None:
    """Answers until standard input ends, which it does when the parent process dies."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):  # meant for the run, which ends at a point of its own
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
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
