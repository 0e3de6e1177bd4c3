"""Inputs that strangers might send: mutations of good ones, long runs, deep nesting, odd characters.

Everything follows from the random generator that is given, so an input can be made again from its seed.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from typing import Any

LENGTHS = ((3, 40), (30, 30), (300, 20), (3_000, 8), (30_000, 1.5), (100_000, 0.5))
"""Repeats of a run, and how often of 100: mostly short, now and then 100 kB."""
ODD = (
    "\u0000", "\u0007", "\u001b[31m", "\ud800", "\udfff", "\ufdd0", "\ufeff", "\u200b", "\u202e", "\u0300", "\ufdfa",
    "\u0661\u0662", "\u0be7", "\u00b2", "\u2460", "\u4e00\u767e", "\U0001d7d9", "\U0001f600", "\u00bd", "\u2028",
    "\x85",
)  # fmt: skip
RUNS = (
    "-", "_", "*", "=", "~", "`", "#", ">", "<", " ", "\n", "\t", ".", ",", ";", ":", "/", "\\", "'", '"', "$", "%",
    "&", "(", "[", "{", "<!", "</", "<a", "0", "9", "1,", "1.", "1 ", "- ", "A", "A ", "a b ", "e", "\u2014", "\u0660",
    "\r\n", "<think>", "</think>", "<answer>", "</answer>", "<answer>A", "x^", "^{", "\\frac{", "\\sqrt{", "\\boxed{",
    '{"a":', '[{"a":', "&amp;", "&#0;", "<video>", "<|im_start|>", "00:", "1:00 ", "1e9", "one ", "and ", "not ",
    "or ", "A or ",
)  # fmt: skip
PAIRS = ("()", "[]", "{}", "<>", '""', "$$")
NUMBERS = (0, -1, 1, 2**63, 10**400, -(10**400), 1e308, -1e308, 5e-324, float("inf"), float("nan"), True, 0.1)


def length(rng: random.Random) -> int:
    """A number of repeats, most often a small one."""
    top = rng.choices([size for size, _ in LENGTHS], [share for _, share in LENGTHS])[0]
    return rng.randint(1, top)


def text(rng: random.Random, seeds: Sequence[str], words: Sequence[str] = ()) -> str:
    """A text of one of several kinds.

    Args:
        rng: decides everything.
        seeds: texts as they are meant to be.
        words: of the parser's own language.
    """
    kind = rng.random()
    if kind < 0.4:
        return mutated_text(rng, rng.choice(seeds), words)
    if kind < 0.6:
        tokens = [*words, *ODD, *RUNS]
        glue = rng.choice(("", " ", "\n", ", "))
        return glue.join(rng.choice(tokens) for _ in range(rng.randint(0, 60)))
    if kind < 0.85:
        return with_run(rng, rng.choice(seeds), words)
    if kind < 0.95:
        pair = rng.choice(PAIRS)
        count = length(rng)
        inner = rng.choice(("", *words, rng.choice(seeds)))
        return pair[0] * count + inner + pair[1] * rng.choice((count, 0, count // 2))
    top = rng.choice((0x7F, 0x2FF, 0xFFFF, 0x10FFFF))
    return "".join(chr(rng.randint(0, top)) for _ in range(rng.randint(0, 300)))


def with_run(rng: random.Random, seed: str, words: Sequence[str]) -> str:
    """A text with a long run of one token before, within or behind it: what makes a regular expression go back."""
    token = rng.choice((*RUNS, *words, *ODD))
    run = (token * length(rng))[:100_000]
    at = rng.choice((0, rng.randint(0, len(seed)), len(seed)))
    return seed[:at] + run + rng.choice(("", "!", "\n", "a")) + seed[at:]


def mutated_text(rng: random.Random, seed: str, words: Sequence[str]) -> str:
    """A text with a few pieces left out, doubled, swapped or put in."""
    for _ in range(rng.randint(1, 6)):
        start = rng.randint(0, len(seed))
        stop = min(len(seed), start + rng.randint(0, 12))
        kind = rng.randrange(5)
        if kind == 0:
            seed = seed[:start] + seed[stop:]
        elif kind == 1:
            seed = seed[:stop] + seed[start:stop] * rng.randint(1, 4) + seed[stop:]
        elif kind == 2:
            seed = seed[:start] + rng.choice((*ODD, *RUNS, *words)) + seed[stop:]
        elif kind == 3:
            seed = seed[start:] + seed[:start]
        else:
            seed = seed[:stop] + str(rng.choice(NUMBERS)) + seed[stop:]
    return seed


def mutated_bytes(rng: random.Random, seed: bytes) -> bytes:
    """Bytes with bits flipped, pieces cut, doubled or put in, or cut off."""
    content = bytearray(seed)
    for _ in range(rng.randint(1, 5)):
        at = rng.randint(0, len(content))
        kind = rng.randrange(5)
        if kind == 0 and at < len(content):
            content[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del content[at : at + rng.randint(1, 16)]
        elif kind == 2:
            content[at:at] = rng.randbytes(rng.randint(1, 16))
        elif kind == 3:
            content[at:at] = content[at : at + rng.randint(1, 64)]
        elif rng.random() < 0.3:
            del content[at:]
    return bytes(content)


def value(rng: random.Random, strings: Callable[[], str], depth: int = 3) -> Any:
    """A value that JSON can hold."""
    kind = rng.randrange(8 if depth else 5)
    if kind == 0:
        return rng.choice(NUMBERS)
    if kind == 1:
        return rng.randint(-5, 100)
    if kind == 2:
        return None
    if kind in (3, 4):
        return strings()
    if kind == 5:
        return {strings()[:20]: value(rng, strings, depth - 1) for _ in range(rng.randint(0, 3))}
    return [value(rng, strings, depth - 1) for _ in range(rng.randint(0, 4))]


def mutated_value(rng: random.Random, seed: Any, strings: Callable[[], str], depth: int = 5) -> Any:
    """A JSON value with some of its parts replaced, left out or put in."""
    if rng.random() < 0.04:
        return value(rng, strings)
    if isinstance(seed, dict) and depth:
        kept = {name: mutated_value(rng, item, strings, depth - 1) for name, item in seed.items()}
        if kept and rng.random() < 0.06:
            del kept[rng.choice(list(kept))]
        return kept
    if isinstance(seed, list) and depth:
        kept_items = [mutated_value(rng, item, strings, depth - 1) for item in seed]
        return kept_items * rng.choice((1, 1, 1, 1, 1, 2)) if rng.random() > 0.05 else kept_items[1:]
    return seed


def with_hostile_text(rng: random.Random, seed: Any, strings: Callable[[], str]) -> Any:
    """A JSON value with one of its texts replaced."""
    if isinstance(seed, dict) and seed:
        name = rng.choice(list(seed))
        return {**seed, name: with_hostile_text(rng, seed[name], strings)}
    if isinstance(seed, list) and seed:
        at = rng.randrange(len(seed))
        return [*seed[:at], with_hostile_text(rng, seed[at], strings), *seed[at + 1 :]]
    return strings()


def json_bytes(rng: random.Random, seed: Any, strings: Callable[[], str]) -> bytes:
    """A JSON text of a mutated value, at times itself mutated, in another encoding, or nested without end."""
    kind = rng.random()
    if kind < 0.03:
        count = length(rng)
        opening = rng.choice(('{"a":', "[", '{"choices":[', '[{"text":'))
        return opening.encode() * count
    dumped = json.dumps(mutated_value(rng, seed, strings), ensure_ascii=rng.random() < 0.5)
    content = dumped.encode("utf-8", "surrogatepass")
    if kind < 0.25:
        return mutated_bytes(rng, content)
    if kind < 0.28:
        return dumped.encode(rng.choice(("utf-16", "utf-8-sig", "latin-1")), "replace")
    return content
