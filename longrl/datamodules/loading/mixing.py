"""Training rows of several sources in given shares.

Of any number of prompts read by all ranks together, a source has its share to within three (`MixedOrder`). Each source
has epochs of its own: no row of it comes again before all of them came once, so a small source with a large weight is
read several times while a large one is read once.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from math import gcd, lcm
from pathlib import Path
from typing import Any, TypeVar

from typing_extensions import override

from longrl.datamodules.loading.row_order import RowOrder, permutation
from longrl.datamodules.rows.sources import Record, read_records, stream_records

T = TypeVar("T")
LONGEST_CYCLE = 100_000
"""Prompts after which the shares are exact; more would be held in memory."""
WINDOW = 8
"""Prompts that are shuffled among themselves, so that a rank does not always read the same source."""


@dataclass(frozen=True)
class DataSource:
    """One of several sources of rows.

    Example:
        `train: [{source: sft.jsonl, weight: 2}, {source: "hiyouga/math12k:train", weight: 1, row_function:
        longrl.datamodules.rows.text_math_row}]`
    """

    source: str
    """A file or a hub id."""
    weight: float | None = None
    """Share of the prompts, relative to the other sources': all of them have one, or none, and then rows count alike.
    For training alone."""
    row_function: str | None = None
    """Instead of `data.row_function`."""
    media_root: str | None = None
    """Instead of `data.media_root`."""
    fields: dict[str, str] | None = None
    """Fields that each of its records gets, for sets whose files say by their names what is in them (MVBench's tasks);
    a record's own fields stay."""
    streaming: bool = False
    """Of a hub id: read its records as they arrive, in place of storing the set first. Rows stay in memory, and their
    media are written below `media_root`, so that every epoch and a resumed run read the same."""
    max_records: int | None = None
    """Read only so many records, the first ones: a streamed set is not fetched any further."""

    def __post_init__(self) -> None:
        if self.max_records is not None and self.max_records < 1:
            raise ValueError(f"max_records of {self.source} must be at least 1, got {self.max_records}; null reads all")


def records_of(one: DataSource) -> Iterable[Record]:
    """The records of a source, with the fields that it adds; see `read_records` and `stream_records`."""
    fields = one.fields
    if one.streaming:
        records: Iterable[Record] = stream_records(one.source, one.max_records)
    else:
        records = read_records(one.source)
        if one.max_records is not None:
            records = islice(records, one.max_records)
    return ({**fields, **record} for record in records) if fields else records


def source_list(sources: str | Path | Sequence[str | DataSource] | None) -> list[DataSource]:
    """The sources of a split, each as a `DataSource`."""
    listed = [str(sources)] if isinstance(sources, str | Path) else list(sources or ())
    return [DataSource(one) if isinstance(one, str) else one for one in listed]


def weights_of(option: str, sources: Sequence[DataSource]) -> tuple[int, ...] | None:
    """The weights of sources as whole numbers without a common factor; None where no source has one.

    Args:
        option: name of the split, for messages.
        sources: of the split.

    Raises:
        ValueError: some sources have a weight and some have none, one is not above 0, or they have too many digits.
    """
    given = [one.weight for one in sources if one.weight is not None]
    if not given:
        return None
    names = ", ".join(f"{one.source}: {one.weight}" for one in sources)
    if len(given) < len(sources):
        raise ValueError(f"of data.{option} all sources have a weight or none, got {names}; give each one a weight")
    if not all(0 < weight < float("inf") for weight in given):
        raise ValueError(f"weights of data.{option} must be above 0, got {names}; leave a source out to not read it")
    fractions = [Fraction(str(weight)) for weight in given]
    multiple = lcm(*(fraction.denominator for fraction in fractions))
    counts = [int(fraction * multiple) for fraction in fractions]
    counts = [count // gcd(*counts) for count in counts]
    if sum(counts) > LONGEST_CYCLE:
        raise ValueError(
            f"weights of data.{option} must come out even within {LONGEST_CYCLE} prompts, got {names}, which do within "
            f"{sum(counts)}; give them fewer digits"
        )
    return tuple(counts)


def first_rows(by_source: Iterable[list[T]], limit: int | None, *, of_each: bool) -> list[list[T]]:
    """At most `limit` rows of all sources together, the first ones, or of each; None for all."""
    if of_each or limit is None:
        return [rows[:limit] for rows in by_source]
    kept: list[list[T]] = []
    for rows in by_source:
        kept.append(rows[: limit - sum(map(len, kept))])
    return kept


@functools.lru_cache(maxsize=4)
def source_cycle(weights: tuple[int, ...]) -> tuple[int, ...]:
    """Sources in an order in which each always has its share to within one: of two with weights 2 and 1, (0, 1, 0).

    The k-th prompt of a source with weight w out of W comes at index k W / w or later and before (k + 1) W / w; taking
    of those that may come the one that must come first keeps all of these promises (Liu and Layland 1973).

    Args:
        weights: of the sources.

    Returns:
        sum(weights) indices of sources, each as often as its weight says.
    """
    total = sum(weights)
    taken = [0] * len(weights)
    order: list[int] = []
    for index in range(total):
        # Until when the next prompt of each source must come, and from when on it may.
        due = [-(-(count + 1) * total // weight) for count, weight in zip(taken, weights, strict=True)]
        ready = [n for n, count in enumerate(taken) if count * total // weights[n] <= index]
        source = min(ready, key=lambda n: (due[n], taken[n] * total // weights[n]))
        taken[source] += 1
        order.append(source)
    return tuple(order)


@functools.lru_cache(maxsize=8)
def _window(weights: tuple[int, ...], seed: int, number: int) -> tuple[list[int], list[int]]:
    """Sources of the positions from `number * WINDOW` on, and prompts of each source before them."""
    order = source_cycle(weights)
    cycles, rest = divmod(number * WINDOW, len(order))
    before = [cycles * weight + order[:rest].count(source) for source, weight in enumerate(weights)]
    sources = [order[(rest + offset) % len(order)] for offset in range(WINDOW)]
    random.Random(f"{seed}/mix/{number}").shuffle(sources)
    return sources, before


@dataclass(frozen=True)
class MixedOrder(RowOrder):
    """Which rows a rank reads where the sources have weights; a row's index follows from its position alone.

    Position c of the sequence that all ranks share is a source's: `source_cycle`, over and over, every eight places
    shuffled among themselves. So it is the n-th position of its source, whose rows come in permutations of its own. Any
    number of ranks reads the same sequence, and the number of rows consumed says all about where a rank stands.
    """

    sizes: tuple[int, ...] = ()
    """Rows of each source, which follow one another in the data set; they add up to `num_rows`."""
    weights: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not all(self.sizes):
            raise ValueError(
                f"every source of data.train with a weight needs a row that can be used, got {self.sizes} rows; leave "
                "the empty one out"
            )

    @override
    def at(self, position: int) -> int:
        # 1. Which source the position is.
        number, inside = divmod(position, WINDOW)
        window, before_window = _window(self.weights, self.seed, number)
        source = window[inside]
        # 2. How many positions before are the same source's.
        before = before_window[source] + window[:inside].count(source)
        # 3. The source's row whose turn it is, behind the rows of the sources before it.
        epoch, turn = divmod(before, self.sizes[source])
        order = permutation(self.sizes[source], f"{self.seed}/{source}", epoch)
        return sum(self.sizes[:source]) + order[turn]

    @override
    def identity(self) -> dict[str, Any]:
        return super().identity() | {"rows_of_the_sources": [*self.sizes], "weights_of_the_sources": [*self.weights]}
