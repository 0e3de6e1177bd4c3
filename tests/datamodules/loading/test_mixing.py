import json
from collections import Counter

import pytest
from hypothesis import given, settings, strategies as st

from longrl.datamodules.loading.loader import PromptStream, RenderedRows
from longrl.datamodules.loading.mixing import DataSource, MixedOrder, first_rows, source_cycle, source_list, weights_of
from longrl.datamodules.longvideo_reason import LongVideoReason
from tests.datamodules.loading.test_loader import FakeRender, rows, skip_log
from tests.tiny import text_family

WEIGHTS = st.lists(st.integers(1, 12), min_size=1, max_size=5).map(tuple)


def mixed(sizes, weights, seed=0, rank=0, world_size=1) -> MixedOrder:
    return MixedOrder(sum(sizes), seed, rank, world_size, tuple(sizes), tuple(weights))


def source_of(row: int, sizes) -> int:
    return next(n for n in range(len(sizes)) if row < sum(sizes[: n + 1]))


# ---- weights ----


def test_weights_become_whole_numbers():
    def named(*weights):
        return [DataSource(f"{n}.jsonl", weight) for n, weight in enumerate(weights)]

    assert weights_of("train", named(0.7, 0.2, 0.1)) == (7, 2, 1)
    assert weights_of("train", named(2, 4)) == (1, 2)
    assert weights_of("train", named(1 / 8)) == (1,)
    assert weights_of("train", named(None, None)) is None
    for weights, message in [
        ((1, None), r"all sources have a weight or none, got 0\.jsonl: 1, 1\.jsonl: None; give each one"),
        ((1, 0), r"must be above 0, got 0\.jsonl: 1, 1\.jsonl: 0; leave a source out"),
        ((1, float("nan")), "must be above 0"),
        ((1 / 3, 0.5), r"must come out even within 100000 prompts, .* fewer digits"),
    ]:
        with pytest.raises(ValueError, match=message):
            weights_of("train", named(*weights))


def test_a_cycle_by_hand():
    assert source_cycle((2, 1)) == (0, 1, 0)
    assert source_cycle((1, 1)) == (0, 1)
    assert source_cycle((3,)) == (0, 0, 0)


@given(WEIGHTS)
def test_a_cycle_has_every_share_to_within_one_all_the_way(weights):
    total, taken = sum(weights), [0] * len(weights)
    for place, source in enumerate(source_cycle(weights), start=1):
        taken[source] += 1
        assert all(abs(count - place * weight / total) < 1 for count, weight in zip(taken, weights, strict=True))
    assert tuple(taken) == weights


# ---- the order ----

PINNED = [0, 1, 3, 4, 2, 6, 3, 5, 5, 1, 2, 0]


@settings(max_examples=60)
@given(weights=WEIGHTS, seed=st.integers(0, 9), data=st.data())
def test_shares_are_kept_to_within_three_prompts_and_no_row_comes_twice_before_all_of_its_source(weights, seed, data):
    sizes = data.draw(st.lists(st.integers(1, 9), min_size=len(weights), max_size=len(weights)))
    order, total = mixed(sizes, weights, seed), sum(weights)
    seen: list[list[int]] = [[] for _ in weights]
    for place in range(150):
        row = order.at(place)
        seen[source_of(row, sizes)].append(row)
        for taken, weight in zip(seen, weights, strict=True):
            assert abs(len(taken) - (place + 1) * weight / total) < 3
    for source, taken in enumerate(seen):
        first = sum(sizes[:source])
        for epoch in range(len(taken) // sizes[source]):
            of_epoch = taken[epoch * sizes[source] : (epoch + 1) * sizes[source]]
            assert sorted(of_epoch) == list(range(first, first + sizes[source]))


@given(weights=WEIGHTS, world_size=st.integers(1, 6))
def test_any_number_of_ranks_reads_the_same_sequence(weights, world_size):
    sizes = [5] * len(weights)
    alone = mixed(sizes, weights)
    for place in range(60):
        rank = place % world_size
        assert next(mixed(sizes, weights, rank=rank, world_size=world_size).after(place // world_size)) == alone.at(
            place
        )


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_every_rank_reads_every_source(world_size):
    for rank in range(world_size):
        order = mixed((50, 50), (1, 1), rank=rank, world_size=world_size)
        found = Counter(source_of(next(order.after(position)), (50, 50)) for position in range(200))
        assert min(found.values()) > 60


def test_orders_differ_by_seed_and_the_order_is_pinned():
    assert [mixed((4, 3), (2, 1)).at(place) for place in range(12)] == PINNED  # a change breaks the resume of old runs
    assert len({tuple(mixed((4, 3), (2, 1), seed).at(place) for place in range(12)) for seed in range(4)}) == 4


def test_a_source_without_rows_is_refused():
    with pytest.raises(ValueError, match=r"needs a row that can be used, got \(3, 0\) rows; leave the empty one out"):
        mixed((3, 0), (1, 1))


def test_the_first_rows_are_of_all_sources_or_of_each():
    by_source = [[1, 2, 3], [4, 5], [6]]
    assert first_rows(by_source, 4, of_each=False) == [[1, 2, 3], [4], []]
    assert first_rows(by_source, 1, of_each=True) == [[1], [4], [6]]
    assert first_rows(by_source, None, of_each=False) == by_source


# ---- resuming ----


def stream(tmp_path, order: MixedOrder, broken=()) -> PromptStream:
    dataset = RenderedRows(rows(order.num_rows), FakeRender(frozenset(broken)))
    return PromptStream(dataset, order, skip_log(tmp_path, order.num_rows))


def ids(prompts) -> list[int]:
    return [int(prompt.id) for prompt in prompts]


@pytest.mark.parametrize("taken", [0, 1, 7, 8, 25, 61])
def test_a_resumed_mix_goes_on_as_the_uninterrupted_one(tmp_path, taken):
    first = stream(tmp_path, mixed((9, 4, 2), (5, 3, 1)), broken={3, 11})
    first.take(taken)
    again = stream(tmp_path, mixed((9, 4, 2), (5, 3, 1)), broken={3, 11})
    again.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert ids(again.take(40)) == ids(first.take(40))
    assert again.position == first.position


def test_a_mix_resumes_with_another_number_of_ranks(tmp_path):
    sizes, weights = (9, 4), (2, 1)
    state = stream(tmp_path, mixed(sizes, weights)).state_dict() | {"positions": [6, 6]}
    alone = mixed(sizes, weights)
    read = []
    for rank in range(3):
        one = stream(tmp_path, mixed(sizes, weights, rank=rank, world_size=3))
        one.load_state_dict(state)
        read += ids(one.take(4))
    assert sorted(read) == sorted(alone.at(place) for place in range(12, 24))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (mixed((9, 4), (1, 1)), r"weights of the sources was \[2, 1\] and is now \[1, 1\]"),
        (mixed((8, 5), (2, 1)), r"rows of the sources was \[9, 4\] and is now \[8, 5\]"),
    ],
)
def test_a_state_of_another_mix_is_refused(tmp_path, other, message):
    state = stream(tmp_path, mixed((9, 4), (2, 1))).state_dict()
    with pytest.raises(ValueError, match=f"its {message}; restore data.train"):
        stream(tmp_path, other).load_state_dict(state)


# ---- the data module ----


def write(folder, name: str, records: list[dict]) -> str:
    (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(folder / name)


@pytest.fixture
def sources(tmp_path) -> list[DataSource]:
    """Twenty rows with reasoning and four of another schema without."""
    taught = [{"problem_id": f"t{n}", "problem": f"{n} + 1?", "answer": f"{n + 1}", "reasoning": "I count."}
              for n in range(20)]  # fmt: skip
    bare = [{"id": f"b{n}", "question": f"{n} + 2?", "answer": f"#### {n + 2}"} for n in range(4)]
    row_function = "longrl.datamodules.rows.text_math_row"
    return [
        DataSource(write(tmp_path, "taught.jsonl", taught), 3),
        DataSource(write(tmp_path, "bare.jsonl", bare), 1, row_function),
    ]


def test_rows_with_and_without_reasoning_come_in_their_shares(sources):
    module = LongVideoReason(text_family(), train=sources, stage="sft", prompts_per_batch=8)
    module.setup("fit")
    family = module.renderer.family
    for batch in (module.draw_prompts(8) for _ in range(5)):
        taught = [prompt for prompt in batch if prompt.id.startswith("t")]
        assert len(taught) == 6
        assert all("I count." in family.decode(prompt.response.token_ids) for prompt in taught)
        bare = [prompt for prompt in batch if prompt not in taught]
        assert [family.decode(prompt.response.token_ids) for prompt in bare] == [prompt.row.answer for prompt in bare]
    assert len(module.train_dataloader()) == 3  # 24 rows in all


def test_a_mixed_module_resumes_exactly(sources):
    def module() -> LongVideoReason:
        made = LongVideoReason(text_family(), train=sources, prompts_per_batch=4)
        made.setup("fit")
        return made

    first, again = module(), module()
    first.draw_prompts(13)
    again.load_state_dict(first.state_dict())
    assert [one.id for one in again.draw_prompts(30)] == [one.id for one in first.draw_prompts(30)]


def test_sources_without_weights_are_read_as_one_each_by_its_own_function(sources):
    plain = [DataSource(one.source, None, one.row_function) for one in sources]
    module = LongVideoReason(text_family(), train=plain, prompts_per_batch=4, max_train_rows=22)
    module.setup("fit")
    assert Counter(prompt.id[0] for prompt in module.draw_prompts(22)) == {"t": 20, "b": 2}


def test_weights_belong_to_training(sources):
    with pytest.raises(ValueError, match=r"weights are for data\.train alone, got some in data\.val"):
        LongVideoReason(text_family(), val=sources)


def test_plain_names_and_sources_may_be_listed_together():
    assert source_list(["a.json", DataSource("b.json")]) == [DataSource("a.json"), DataSource("b.json")]
    assert source_list("a.json") == [DataSource("a.json")]
    assert source_list(None) == []
