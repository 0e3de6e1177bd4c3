"""Which rows come by their pass rates: weights and bands by hand, and what a pool promises whatever the rates are."""

import json
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from longrl.datamodules.loading.pass_rates import EVERY_ROW, PassRates, RowPool, initial_rates, pool_metrics
from longrl.types import Row

NAN = math.nan
RATES = st.lists(st.sampled_from([NAN, 0.0, 0.25, 0.5, 0.75, 1.0]), min_size=1, max_size=12)
RULES = st.builds(
    PassRates,
    low=st.sampled_from([0.0, 0.2]),
    high=st.sampled_from([0.8, 1.0]),
    weight=st.sampled_from(["equal", "variance", "failure"]),
    pass_share=st.sampled_from([None, 0.5, 1.0]),
    retry_after=st.integers(2, 4),
    memory=st.sampled_from([0.0, 0.5]),
)


def drawn(pool, count, seed=0):
    uniform = np.random.default_rng(seed).random(count)
    return [pool.draw(float(one)) for one in uniform]


# ---- by hand ----


def test_weights_by_hand():
    rates = np.array([0.0, 0.25, 0.5, 1.0, NAN])
    assert PassRates().weights(rates).tolist() == [1, 1, 1, 1, 1]
    variance = PassRates(weight="variance", floor=0.01).weights(rates)
    assert variance.tolist() == [0.01, 0.1875, 0.25, 0.01, 0.25]
    failure = PassRates(weight="failure", floor=0.01).weights(rates)
    assert failure.tolist() == [1, 0.75, 0.5, 0.01, 1]
    band = PassRates(low=0.25, high=0.5).in_band(rates)
    assert band.tolist() == [False, True, True, False, True]


def test_a_rate_follows_what_is_observed():
    pool = RowPool(PassRates(memory=0.75), [NAN, 0.5])
    pool.observe(0, 1.0)
    pool.observe(0, 0.0)
    pool.observe(1, 1.0)
    assert pool.rates.tolist() == [0.75, 0.625]
    last = RowPool(PassRates(memory=0), [0.5])
    last.observe(0, 1.0)
    assert last.rates.tolist() == [1.0]


def test_rows_outside_the_band_are_left_out_until_they_are_retried():
    pool = RowPool(PassRates(low=0.1, high=0.9, retry_after=3), [0.0, 0.5, 1.0, 0.4])
    passes = [sorted(drawn(pool, 2, seed)) for seed in range(3)]
    assert passes == [[1, 3]] * 3
    assert sorted(drawn(pool, 4)) == [0, 1, 2, 3]
    assert pool.number == 3
    # Of the retried rows one is answered right half of the time now: it stays.
    pool.observe(0, 1.0)
    assert sorted(drawn(pool, 3)) == [0, 1, 3]


def test_new_rows_come_first_and_a_known_one_outside_the_band_not_at_all():
    pool = RowPool(PassRates(low=0.1, high=0.9), [NAN, 0.5, NAN, 1.0, NAN])
    assert sorted(drawn(pool, 3)) == [0, 2, 4]
    assert drawn(pool, 1) == [1]
    assert pool.number == 0
    drawn(pool, 1)
    assert pool.number == 1


def test_a_band_without_a_row_brings_the_retry_nearer_and_without_retries_is_an_error():
    pool = RowPool(PassRates(high=0.5, retry_after=4), [1.0, 1.0])
    assert sorted(drawn(pool, 2)) == [0, 1]
    assert pool.number == 4
    never = RowPool(PassRates(high=0.5, retry_after=0), [1.0, 1.0])
    with pytest.raises(
        ValueError, match=r"of 2 training rows none has a pass rate from 0\.0 to 0\.5, .*widen the band"
    ):
        never.draw(0.5)


@pytest.mark.parametrize(("weight", "wanted"), [("variance", (0.05, 0.25, 0.05)), ("failure", (1.0, 0.5, 0.05))])
def test_rows_are_drawn_as_often_as_their_weights_say(weight, wanted):
    """Of many rows with three rates, the first draws of a pass: no rate has run short yet."""
    rates = [0.0, 0.5, 1.0] * 400
    pool = RowPool(PassRates(weight=weight, retry_after=0), rates)
    count = Counter(rates[row] for row in drawn(pool, 120))
    total = sum(wanted)
    for rate, share in zip((0.0, 0.5, 1.0), wanted, strict=True):
        # Four standard deviations, and a little for rows that are gone.
        error = 4 * math.sqrt(120 * share / total * (1 - share / total)) + 3
        assert abs(count[rate] - 120 * share / total) < error


# ---- promises ----


@settings(max_examples=60, deadline=None)
@given(rule=RULES, rates=RATES, data=st.data())
def test_no_row_comes_twice_in_a_pass_and_every_row_comes_in_time(rule, rates, data):
    pool = RowPool(rule, rates)
    passes: list[list[int]] = [[]]
    last_seen = dict.fromkeys(range(len(rates)), 0)
    # New rows and retries may be more than a pass has room for: then it takes as many passes as they fill.
    in_time = rule.retry_after + 2 * math.ceil(len(rates) / pool.per_pass)
    uniform = np.random.default_rng(data.draw(st.integers(0, 99))).random(60)
    scores = np.random.default_rng(data.draw(st.integers(0, 99))).choice([0.0, 0.5, 1.0], 60)
    stubborn = data.draw(st.booleans())  # draws always the first of what may come
    for one, score in zip(uniform, scores, strict=True):
        before = pool.number
        row = pool.draw(0.0 if stubborn else one)
        passes += [[] for _ in range(pool.number - before)]
        passes[-1].append(row)
        last_seen[row] = pool.number
        pool.observe(row, score)
        assert all(pool.number - seen <= in_time for seen in last_seen.values())
    for of_pass in passes:
        assert len(set(of_pass)) == len(of_pass) <= pool.per_pass


@given(rates=RATES)
def test_without_a_rule_every_pass_is_a_permutation(rates):
    pool = RowPool(EVERY_ROW, rates)
    for seed in range(3):
        assert sorted(drawn(pool, len(rates), seed)) == list(range(len(rates)))


@settings(max_examples=40)
@given(rule=RULES, rates=RATES, count=st.integers(0, 30))
def test_a_pool_goes_on_from_its_state(rule, rates, count):
    pool = RowPool(rule, rates)
    for row in drawn(pool, count):
        pool.observe(row, 0.5)
    again = RowPool(rule, rates)
    again.load_state_dict(pool.state_dict())
    assert drawn(again, 20, seed=1) == drawn(pool, 20, seed=1)
    assert np.array_equal(again.rates, pool.rates, equal_nan=True)


@given(RATES)
def test_the_last_number_below_one_draws_a_row(rates):
    pool = RowPool(PassRates(weight="variance"), rates)
    assert pool.draw(math.nextafter(1.0, 0.0)) in range(len(rates))


def test_metrics_by_hand():
    pools = [RowPool(PassRates(low=0.1, high=0.9), [0.0, 0.5, NAN]), RowPool(PassRates(low=0.1, high=0.9), [1.0])]
    assert pool_metrics(pools) == {
        "data/pass_rate_mean": 0.5,
        "data/rows_known": 3,
        "data/rows_in_band": 1,
        "data/rows_new": 1,
        "data/passes": 0,
    }
    assert math.isnan(pool_metrics([RowPool(EVERY_ROW, [NAN])])["data/pass_rate_mean"])


# ---- rates of before ----

ROWS = [Row("a", "?", "1", metadata={"policy_right": 0.5}), Row("b", "?", "1"), Row("c", "?", "1")]


def test_rates_of_a_file_of_an_evaluation_and_of_the_rows_themselves(tmp_path):
    def written(*records):
        path = tmp_path / "rates.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return initial_rates(str(path), ROWS)

    plain = written({"id": "c", "pass_rate": 0.25}, {"id": "other", "pass_rate": 1})
    assert np.array_equal(plain, [NAN, NAN, 0.25], equal_nan=True)
    samples = written(
        {"id": "a", "accuracy": [1.0, 0.0, None]}, {"id": "b", "accuracy": []}, {"id": "c", "accuracy": 1}
    )
    assert np.array_equal(samples, [0.5, NAN, 1.0], equal_nan=True)
    of_rows = initial_rates("metadata:policy_right", ROWS)
    assert np.array_equal(of_rows, [0.5, NAN, NAN], equal_nan=True)
    assert np.isnan(initial_rates(None, ROWS)).all()
    for records, message in [
        ([{"id": "x", "pass_rate": 0.5}], "has no pass rate of any row of data.train; name records with their ids"),
        ([{"id": "a", "pass_rate": 1.5}], "record 0 of .* must be a number from 0 to 1, got 1.5"),
        (
            [{"id": "a", "accuracy": [1], "condition": name} for name in ("video", "no video")],
            "initial=.* has answers of several conditions, 'video', 'no video'; keep the lines of one",
        ),
        ([{"id": "a"}], "record 0 of .* must have id, and pass_rate or accuracy, got id"),
    ]:
        with pytest.raises(ValueError, match=message):
            written(*records)
    with pytest.raises(ValueError, match=r"data\.curriculum\.pass_rates\.initial .* 'no\.jsonl' does not exist"):
        initial_rates("no.jsonl", ROWS)
    with pytest.raises(ValueError, match="the pass rate of row 'a' must be a number from 0 to 1, got 'half'"):
        initial_rates("metadata:right", [Row("a", "?", "1", metadata={"right": "half"})])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"low": 0.5, "high": 0.5}, "low must be below high, got 0.5 and 0.5"),
        ({"low": 0.9, "high": 0.1}, "low must be below high"),
        ({"retry_after": 1}, "retry_after=1 draws every row in every pass"),
        ({"memory": 1.0}, "memory must be below 1"),
        ({"weight": "hard"}, "weight must be equal, variance or failure, got 'hard'"),
        ({"online": False}, "online=false keeps the rates of data.curriculum.pass_rates.initial, which is not set"),
    ],
)
def test_a_rule_that_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PassRates(**options)
