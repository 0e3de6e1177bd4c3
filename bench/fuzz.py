"""Feeds every parser with inputs that strangers might send: nothing may escape but its documented error, and time is
linear in the input.

An input is slow if it takes more than 50 ms for each 10 kB of it (of processor time, the least of four tries); what
takes longer than `HANGS_S` is stopped. `--only NAME --first N --inputs 1 --show` repeats one.
"""

from __future__ import annotations

import argparse
import gc
import logging
import random
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common import console, report
from fuzz_parsers import Input, Parser, all_parsers, shown

from longrl.rewards.time_limit import TimeIsUp, call_within

LIMIT_MS = 50.0
"""For each `PER_BYTES` of input, and for any shorter one."""
PER_BYTES = 10_000
HANGS_S = 5.0
RETRIES = 3
"""Further tries of an input that seems slow, against what else the machine does."""


@dataclass
class Outcome:
    """What became of a parser's inputs."""

    refused: int = 0
    uncaught: list[tuple[int, str]] = field(default_factory=list)
    """Number of the input, and the error's last lines."""
    slow: list[tuple[int, float]] = field(default_factory=list)
    """Number of the input, and its milliseconds per 10 kB."""
    slowest: tuple[float, int] = (0.0, 0)
    """Milliseconds per 10 kB, and the number of the input."""


def main(argv: Sequence[str] | None = None) -> list[dict[str, int | float | str]]:
    """Command line; exits with 1 if an error escaped or an input was slow."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--inputs", type=int, default=10_000, help="for each parser")
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--only", help="regular expression in the names of the parsers to feed")
    parser.add_argument("--show", action="store_true", help="print the inputs")
    parser.add_argument("--quick", action="store_true", help="300 inputs for each parser")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows, with command and hardware")
    arguments = parser.parse_args(argv)
    count = 300 if arguments.quick else arguments.inputs
    logging.disable()  # what a parser says of bad input is no news here
    rows, notes = [], []
    with tempfile.TemporaryDirectory() as folder:
        for each in all_parsers(Path(folder)):
            if arguments.only and not re.search(arguments.only, each.name):
                continue
            outcome = feed(each, range(arguments.first, arguments.first + count), show=arguments.show)
            rows.append(row_of(each, count, outcome))
            notes += notes_of(each, outcome)
    logging.disable(logging.NOTSET)
    report(__file__, arguments, rows, [*notes, "tool calls: nothing reads them; a record that has some is refused"])
    if argv is None:
        sys.exit(bool(any(row["uncaught"] or row["slow"] for row in rows)))
    return rows


def feed(parser: Parser, numbers: Sequence[int], *, show: bool = False) -> Outcome:
    """Reads the inputs of these numbers."""
    outcome = Outcome()
    gc.collect()
    gc.freeze()
    for number in numbers:
        made = input_of(parser, number)
        if show:
            console.print(number, size_of(made), shown(made), markup=False, highlight=False, soft_wrap=True)
        kilobytes = max(1.0, size_of(made) / PER_BYTES)
        milliseconds = one_call(parser, made, number, outcome) / kilobytes
        for _ in range(RETRIES):
            if milliseconds <= LIMIT_MS or milliseconds * kilobytes >= 1000 * HANGS_S:
                break
            milliseconds = min(milliseconds, one_call(parser, made, number, Outcome()) / kilobytes)
        outcome.slowest = max(outcome.slowest, (milliseconds, number))
        limit_ms = LIMIT_MS if parser.own_limit is None else 1000 * parser.own_limit
        if milliseconds > limit_ms:
            outcome.slow.append((number, milliseconds))
    gc.unfreeze()
    return outcome


def input_of(parser: Parser, number: int) -> Input:
    """The input of a number, the same in every run."""
    return parser.make(random.Random(f"{parser.name} {number}"))


def size_of(made: Input) -> int:
    """Bytes of an input; of values, of their text."""
    if isinstance(made, tuple):
        return max(map(size_of, made))
    if isinstance(made, bytes):
        return len(made)
    text = made if isinstance(made, str) else str(made)
    return len(text.encode("utf-8", "surrogatepass"))


def one_call(parser: Parser, made: Input, number: int, outcome: Outcome) -> float:
    """Milliseconds of one reading; what comes of it is added to the outcome."""
    started = time.process_time()
    try:
        if parser.own_limit is None:
            result = call_within(HANGS_S, parser.read, made)
        else:
            started = time.perf_counter()
            result = parser.read(made)
            return 1000 * (time.perf_counter() - started)
    except TimeIsUp:
        return 1000 * HANGS_S
    except parser.refusals:
        outcome.refused += 1
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        outcome.uncaught.append((number, f"{type(error).__name__}: {str(error)[:120]} ({frame.name}:{frame.lineno})"))
    else:
        refused = isinstance(result, ValueError) or (isinstance(result, list) and _has_error(result))
        outcome.refused += refused or result is None
    return 1000 * (time.process_time() - started)


def _has_error(result: list[object]) -> bool:
    return any(isinstance(item, ValueError) for item in result)


def row_of(parser: Parser, count: int, outcome: Outcome) -> dict[str, int | float | str]:
    """A parser's line of the table."""
    milliseconds, number = outcome.slowest
    return {
        "parser": parser.name,
        "inputs": count,
        "refused": outcome.refused,
        "uncaught": len(outcome.uncaught),
        "slow": len(outcome.slow),
        "slowest_ms_per_10kb": round(milliseconds, 1),
        "slowest_input": number,
        "limit": "50 ms per 10 kB" if parser.own_limit is None else f"{parser.own_limit:g} s, in a process of its own",
    }


def notes_of(parser: Parser, outcome: Outcome) -> list[str]:
    """Lines about the inputs that broke the rule, the first of each kind."""
    notes = []
    kinds: set[str] = set()
    for number, text in outcome.uncaught:
        kind = text.partition(":")[0] + text.rpartition("(")[2]
        if kind not in kinds:
            kinds.add(kind)
            notes.append(f"{parser.name}, input {number}: {text}")
    notes += [f"{parser.name}, input {number}: {ms:.0f} ms per 10 kB" for number, ms in outcome.slow[:8]]
    return notes


if __name__ == "__main__":
    main()
