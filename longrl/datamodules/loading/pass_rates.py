"""How often the policy answers each row right, and which rows are drawn by it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from longrl.datamodules.rows.sources import read_records
from longrl.io.number_ranges import LEAST, SHARE, check_ranges
from longrl.types import Metrics, Row

Floats = NDArray[np.float64]
NEVER = -1
"""In place of the pass in which a row was drawn."""


@dataclass(frozen=True)
class PassRates:
    """Draws rows by their pass rate: the mean accuracy of their completions, 0 to 1.

    Rows come in passes, in each of which a row is drawn at most once. First come rows that nothing is known of, then
    those whose rate lay outside the band for `retry_after` passes, then rows within the band by weight.

    Example:
        `PassRates(low=0.1, high=0.9)` leaves out what is too hard or too easy; `PassRates(weight="variance")` draws
        most often what is answered right half of the time.
    """

    low: float = 0.0
    """Rows with a lower rate, too hard, are not drawn until they are retried."""
    high: float = 1.0
    """Rows with a higher rate, too easy, are not drawn until they are retried."""
    weight: Literal["equal", "variance", "failure"] = "equal"
    """Of a row with rate p: 1; p (1 - p), the variance of its reward, which a group's advantages are made of; or 1 - p
    (prioritized sampling of Kimi k1.5, arXiv:2501.12599)."""
    floor: float = 0.05
    """Least weight of a row in the band."""
    pass_share: float | None = None
    """A pass draws this share of all rows, so that weights decide which; None: 1 with equal weights, else a quarter."""
    retry_after: int = 4
    """A row is drawn, whatever its rate, where it was not in so many passes; 0: never."""
    memory: float = 0.5
    """Share of the old rate in the new one, when a row's completions were scored again; 0 keeps the last alone."""
    online: bool = True
    """Rates follow the run's own rewards; else they stay what `initial` says."""
    initial: str | None = None
    """Rates before the first step: a file or hub id whose records have `id`, and `pass_rate` or a list `accuracy`
    (samples.jsonl of an evaluation has); or `metadata:NAME`, a number in the metadata of the rows, as `policy_right` of
    a data set that `pipeline` made."""

    def __post_init__(self) -> None:
        where = "data.curriculum.pass_rates."
        check_ranges(self, where, low=SHARE, high=SHARE, floor=(LEAST, 1), pass_share=(LEAST, 1))
        check_ranges(self, where, retry_after=(0, 1e6), memory=SHARE)
        if not self.low < self.high:
            raise ValueError(f"{where}low must be below high, got {self.low} and {self.high}; 0 and 1 draw every row")
        if self.retry_after == 1:
            raise ValueError(
                f"{where}retry_after=1 draws every row in every pass, whatever the band; raise it to 2 at least, or "
                "set it to 0 for never"
            )
        if self.memory == 1:
            raise ValueError(f"{where}memory must be below 1, got {self.memory}; 1 would learn no rate")
        if self.weight not in ("equal", "variance", "failure"):
            raise ValueError(f"{where}weight must be equal, variance or failure, got {self.weight!r}")
        if not self.online and self.initial is None:
            raise ValueError(f"{where}online=false keeps the rates of {where}initial, which is not set; name a file")

    @property
    def share(self) -> float:
        """Of all rows that a pass draws."""
        if self.pass_share is not None:
            return self.pass_share
        return 1.0 if self.weight == "equal" else 0.25

    def weights(self, rates: Floats) -> Floats:
        """[n] weights of rows with rates [n]; an unknown one, NaN, has the largest that there is."""
        if self.weight == "equal":
            return np.ones_like(rates)
        wrong = 1 - np.where(np.isnan(rates), 0.5 if self.weight == "variance" else 0.0, rates)
        weights = wrong * (1 - wrong) if self.weight == "variance" else wrong
        return np.maximum(weights, self.floor)

    def in_band(self, rates: Floats) -> NDArray[np.bool_]:
        """[n] True of rows whose rate lies in the band, or is unknown."""
        return np.isnan(rates) | ((self.low <= rates) & (rates <= self.high))


EVERY_ROW = PassRates()
"""Passes over all rows, each of which comes once in every pass."""


class RowPool:
    """Rows of a source, and which of them is drawn next. What it draws follows from its state and a number alone.

    Args:
        rule: how rows are drawn.
        rates: [n] of the rows, NaN where nothing is known.
    """

    def __init__(self, rule: PassRates, rates: Sequence[float]) -> None:
        self.rule = rule
        self.rates: Floats = np.array(rates, dtype=np.float64)
        self.last_pass = np.full(len(self.rates), NEVER, dtype=np.int64)
        """[n] the pass in which a row was drawn last."""
        self.number = 0
        """Of the pass that is under way."""
        self.num_left = self.per_pass
        """Rows that it may still draw."""

    @property
    def per_pass(self) -> int:
        """Rows that a pass draws, at most."""
        return math.ceil(self.rule.share * len(self.rates))

    def draw(self, uniform: float) -> int:
        """Index of the next row.

        Args:
            uniform: in [0, 1), decides among rows that may come.

        Raises:
            ValueError: no row is in the band, and none is ever retried.
        """
        chosen, weights = self._candidates()
        # A pass in which nothing may come is over at once: that brings retries nearer.
        for _ in range(self.rule.retry_after + 2):
            if self.num_left and len(chosen):
                break
            self.number += 1
            self.num_left = self.per_pass
            chosen, weights = self._candidates()
        if not len(chosen):
            raise ValueError(
                f"of {len(self.rates)} training rows none has a pass rate from {self.rule.low} to {self.rule.high}, "
                "and data.curriculum.pass_rates.retry_after=0 retries none; widen the band, or raise retry_after"
            )
        sums = np.cumsum(weights)  # one after the other, so that all machines round alike
        place = min(int(np.searchsorted(sums, uniform * sums[-1], side="right")), len(chosen) - 1)
        row = int(chosen[place])
        self.last_pass[row] = self.number
        self.num_left -= 1
        return row

    def _candidates(self) -> tuple[NDArray[np.int64], Floats]:
        """Rows that may come next, and their weights: new ones, else those to be retried, else those in the band."""
        here = self.last_pass != self.number
        first = here & self.is_new
        if not first.any() and self.rule.retry_after:
            since = np.where(here, self.number - np.maximum(self.last_pass, 0), 0)
            # Of those to be retried the ones that waited longest, so that none waits for ever.
            first = (since >= self.rule.retry_after) & (since == since.max())
        if first.any():
            rows = np.flatnonzero(first)
            return rows, np.ones(len(rows))
        rows = np.flatnonzero(here & self.rule.in_band(self.rates))
        return rows, self.rule.weights(self.rates[rows])

    @property
    def is_new(self) -> NDArray[np.bool_]:
        """[n] True of rows that were never drawn, and of which nothing is known."""
        return (self.last_pass == NEVER) & np.isnan(self.rates)

    def observe(self, row: int, rate: float) -> None:
        """Takes the mean accuracy of a row's completions into its rate."""
        old = self.rates[row]
        self.rates[row] = rate if math.isnan(old) else self.rule.memory * old + (1 - self.rule.memory) * rate

    def state_dict(self) -> dict[str, Any]:
        """All that the next draws follow from, as tensors and numbers."""
        return {
            "rates": torch.from_numpy(self.rates.copy()),
            "last_pass": torch.from_numpy(self.last_pass.copy()),
            "number": self.number,
            "num_left": self.num_left,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where the state was saved."""
        self.rates = state["rates"].numpy().copy()
        self.last_pass = state["last_pass"].numpy().copy()
        self.number = state["number"]
        self.num_left = min(state["num_left"], self.per_pass)


def pool_metrics(pools: Sequence[RowPool]) -> Metrics:
    """What is known of the rows of all pools."""
    rates = np.concatenate([pool.rates for pool in pools])
    known = rates[~np.isnan(rates)]
    in_band = [pool.rule.in_band(pool.rates) & ~np.isnan(pool.rates) for pool in pools]
    return {
        "data/pass_rate_mean": float(known.mean()) if len(known) else math.nan,
        "data/rows_known": float(len(known)),
        "data/rows_in_band": float(sum(int(inside.sum()) for inside in in_band)),
        "data/rows_new": float(sum(int(pool.is_new.sum()) for pool in pools)),
        "data/passes": float(sum(pool.number for pool in pools)) / len(pools),
    }


def initial_rates(source: str | None, rows: Sequence[Row]) -> list[float]:
    """The rate of each row before the first step, NaN where the source does not say.

    Args:
        source: as `PassRates.initial`.
        rows: of the training data. Those with one id have one rate.

    Raises:
        ValueError: it says nothing of any row, or a rate that is none.
    """
    if source is None:
        return [math.nan] * len(rows)
    kind, _, name = source.partition(":")
    if kind == "metadata":
        rates = [_rate(row.metadata.get(name), f"row {row.id!r}") for row in rows]
    else:
        try:
            records = read_records(source)
        except ValueError as error:
            raise ValueError(f"data.curriculum.pass_rates.initial cannot be read: {error}") from error
        by_id = _rates_by_id(records, source)
        rates = [by_id.get(row.id, math.nan) for row in rows]
    if all(map(math.isnan, rates)):
        raise ValueError(
            f"data.curriculum.pass_rates.initial={source} has no pass rate of any row of data.train; name records with "
            f"their ids, as {rows[0].id!r}, and pass_rate, or metadata:NAME"
        )
    return rates


def _rates_by_id(records: Iterable[Mapping[str, Any]], source: str) -> dict[str, float]:
    """Mean rate of the records of each id."""
    found: dict[str, list[float]] = {}
    conditions: dict[str, None] = {}
    for number, record in enumerate(records):
        conditions |= {str(record["condition"]): None} if "condition" in record else {}
        where = f"record {number} of data.curriculum.pass_rates.initial={source}"
        if "id" not in record or not {"pass_rate", "accuracy"} & record.keys():
            raise ValueError(f"{where} must have id, and pass_rate or accuracy, got {', '.join(record)}")
        given = record["pass_rate"] if "pass_rate" in record else record["accuracy"]
        values = given if isinstance(given, list) else [given]
        rates = [_rate(value, where) for value in values]
        found.setdefault(str(record["id"]), []).extend(rate for rate in rates if not math.isnan(rate))
    if len(conditions) > 1:  # of `evaluate`: a rate without the video says nothing of one with it
        raise ValueError(
            f"data.curriculum.pass_rates.initial={source} has answers of several conditions, "
            f"{', '.join(map(repr, conditions))}; keep the lines of one"
        )
    return {row_id: math.fsum(rates) / len(rates) for row_id, rates in found.items() if rates}


def _rate(value: object, where: str) -> float:
    """A rate that a record gives, NaN of none."""
    if value is None or value == "":
        return math.nan
    try:
        rate = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        rate = math.nan
    if not 0 <= rate <= 1:
        raise ValueError(f"the pass rate of {where} must be a number from 0 to 1, got {value!r}; correct it")
    return rate
