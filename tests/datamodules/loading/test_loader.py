import json
from collections import Counter
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings, strategies as st

from longrl.datamodules.loading import loader
from longrl.datamodules.loading.batches import EvalLoader, TrainLoader
from longrl.datamodules.loading.loader import LoaderOptions, PromptStream, RenderedRows, usable_items
from longrl.datamodules.loading.row_order import RowOrder, permutation
from longrl.datamodules.loading.skips import SkipLog
from longrl.datamodules.loading.workers import IPCPayload, SharedMemoryFull
from longrl.types import Media, Prompt, Row, UnusableSample


@dataclass(frozen=True)
class FakeRender:
    """Prompts without tokens; rows whose number is in `broken` cannot be used."""

    broken: frozenset[int] = frozenset()

    def __call__(self, row: Row) -> Prompt:
        if int(row.id) in self.broken:
            raise UnusableSample(f"{row.id}.mp4", "no such stream")
        empty = torch.zeros(0, dtype=torch.long)
        return Prompt(id=row.id, input_ids=empty, position_ids=empty[None], media=(), row=row)


def rows(count: int) -> list[Row]:
    return [Row(id=str(number), problem="?", answer="1", task="math") for number in range(count)]


def dataset(count: int, broken=()) -> RenderedRows:
    return RenderedRows(rows(count), FakeRender(frozenset(broken)))


def skip_log(tmp_path, count: int, **options) -> SkipLog:
    return SkipLog(tmp_path / "skipped.jsonl", split="train", num_rows=count, **{"max_share": 1.0, **options})


def stream(tmp_path, count: int = 7, broken=(), workers: int = 0, max_share: float = 1.0, **order) -> PromptStream:
    options = LoaderOptions(num_workers=workers, prefetch_prompts=3)
    skips = skip_log(tmp_path, count, max_share=max_share)
    return PromptStream(dataset(count, broken), RowOrder(count, **order), skips, options)


def ids(prompts: list[Prompt]) -> list[int]:
    return [int(prompt.id) for prompt in prompts]


def listed(tmp_path) -> list[dict]:
    path = tmp_path / "skipped.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_row_that_an_earlier_release_listed_in_other_words_is_listed_once(tmp_path):
    unusable = UnusableSample("a.mp4", "the file does not exist", 3, "r3")
    skip_log(tmp_path, 9).add_known([unusable])
    (line,) = listed(tmp_path)
    old = json.dumps({**line, "reason": "the file a.mp4 does not exist"}) + "\n"
    (tmp_path / "skipped.jsonl").write_text(old)
    skip_log(tmp_path, 9).add_known([unusable, UnusableSample("b.mp4", "the file is empty", 4, "r4")])
    assert [line["id"] for line in listed(tmp_path)] == ["r3", "r4"]


# ---- the order ----


@given(num_rows=st.integers(1, 40), seed=st.integers(0, 99), epoch=st.integers(0, 5))
def test_an_epoch_is_a_permutation(num_rows, seed, epoch):
    assert sorted(permutation(num_rows, seed, epoch)) == list(range(num_rows))


def test_epochs_and_seeds_differ_and_the_order_is_pinned():
    assert permutation(8, 0, 0) == (0, 2, 1, 4, 6, 7, 3, 5)  # a change here breaks the resume of every old run
    assert len({permutation(8, seed, epoch) for seed in range(3) for epoch in range(3)}) == 9


@given(num_rows=st.integers(1, 30), world_size=st.integers(1, 5), epochs=st.integers(1, 3), seed=st.integers(0, 9))
def test_ranks_share_no_row_and_cover_every_epoch(num_rows, world_size, epochs, seed):
    places = num_rows * epochs
    read = []
    for rank in range(world_size):
        order = RowOrder(num_rows, seed, rank, world_size)
        of_rank = len(range(rank, places, world_size))
        read += [next(order.after(position)) for position in range(of_rank)]
    assert Counter(read) == dict.fromkeys(range(num_rows), epochs)


# ---- the stream ----


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_reads_epoch_after_epoch(tmp_path, workers):
    taken = ids(stream(tmp_path, 7, workers=workers, seed=3).take(17))
    assert taken == [*permutation(7, 3, 0), *permutation(7, 3, 1), *permutation(7, 3, 2)[:3]]


@settings(max_examples=50)
@given(
    num_rows=st.integers(2, 12),
    broken=st.sets(st.integers(0, 11), max_size=3),
    takes=st.lists(st.integers(0, 5), max_size=6),
    world_size=st.integers(1, 3),
    more=st.integers(1, 15),
)
def test_a_resumed_stream_goes_on_as_the_uninterrupted_one(tmp_path_factory, num_rows, broken, takes, world_size, more):
    tmp_path = tmp_path_factory.mktemp("skips")
    broken = {number for number in broken if number < num_rows - 1}  # one row at least can be used
    ranks = [{"rank": rank, "world_size": world_size, "seed": 1} for rank in range(world_size)]
    first = [stream(tmp_path, num_rows, broken, **rank) for rank in ranks]
    for rank, count in enumerate(takes):
        first[rank % world_size].take(count)  # ranks drift apart
    state = {**first[0]._identity(), "positions": [one.position for one in first]}
    for rank, one in zip(ranks, first, strict=True):
        again = stream(tmp_path, num_rows, broken, **rank)
        again.load_state_dict(json.loads(json.dumps(state)))
        assert ids(again.take(more)) == ids(one.take(more))
        assert again.position == one.position


@pytest.mark.parametrize("workers", [0, 2])
def test_the_state_counts_what_was_taken_not_what_workers_rendered_ahead(tmp_path, workers):
    first = stream(tmp_path, 9, workers=workers)
    first.take(4)
    assert first.state_dict()["positions"] == [4]
    again = stream(tmp_path, 9, workers=2 - workers)
    again.load_state_dict(first.state_dict())
    assert ids(again.take(6)) == [*permutation(9, 0, 0)[4:], permutation(9, 0, 1)[0]]


def test_a_closed_stream_goes_on_where_it_stood(tmp_path):
    plain, closed = stream(tmp_path, 5), stream(tmp_path, 5)
    taken = ids(closed.take(3))
    closed.close()
    assert taken + ids(closed.take(4)) == ids(plain.take(7))


def test_the_global_random_state_is_left_alone(tmp_path):
    before = torch.random.get_rng_state()
    for workers in (0, 1):
        stream(tmp_path, 5, workers=workers).take(2)
        list(EvalLoader(dataset(3), skip_log(tmp_path, 3), 2, options=LoaderOptions(num_workers=workers)))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": 8}, "number of rows was 7 and is now 8"),
        ({"seed": 5}, "seed was 0 and is now 5"),
    ],
)
def test_a_state_of_other_data_is_refused(tmp_path, changes, message):
    state = stream(tmp_path).state_dict()
    with pytest.raises(ValueError, match=f"its {message}; restore data.train and data.seed.* --model.init_from"):
        stream(tmp_path, **changes).load_state_dict(state)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 5))
def test_other_numbers_of_ranks_go_on_behind_the_same_rows(ranks_before, ranks_after, steps):
    """A step reads 12 rows over all ranks, whatever their number."""
    read = [
        next(RowOrder(100, 0, rank, ranks_before).after(place))
        for rank in range(ranks_before)
        for place in range(steps * 12 // ranks_before)
    ]
    state = {"positions": [steps * 12 // ranks_before] * ranks_before}
    for rank in range(ranks_after):
        own = PromptStream(dataset(100), RowOrder(100, 0, rank, ranks_after), skips=None)
        own.load_state_dict(own._identity() | state)
        read += [next(own.order.after(own.position + place)) for place in range(12 // ranks_after)]
    assert sorted(read) == sorted(RowOrder(100, 0).at(place) for place in range((steps + 1) * 12))


def test_rows_that_come_again_after_a_change_of_ranks_are_told(tmp_path, caplog):
    state = stream(tmp_path).state_dict() | {"positions": [5, 8]}
    other = stream(tmp_path)
    other.load_state_dict(state)
    assert other.position == 13
    assert "up to 3 training rows come again or are left out" in caplog.text


def test_ranks_that_share_samples_skip_what_one_of_them_cannot_read(tmp_path):
    bad = UnusableSample("c.mp4", "broken", 3, "c")

    class TwoRanks:
        size = 2

        def gather(self, items):
            return [[(None, ()), (bad, ()), (None, ())], items]

    skips = skip_log(tmp_path, 9)
    assert usable_items(["a", "c", "d"], skips, TwoRanks()) == ["a", "d"]
    assert [line["id"] for line in listed(tmp_path)] == ["c"]

    class OtherFrames(TwoRanks):
        def gather(self, items):
            return [[(None, ((1, 2),))], items]

    with pytest.raises(
        ValueError, match=r"chose different frames of one video: .*data\.selection\.init_args\.cache_dir"
    ):
        usable_items(["a"], skips, OtherFrames())


def test_a_state_of_other_questions_is_refused_but_moved_media_are_not(tmp_path):
    here = [Row(id="0", problem="?", answer="1", videos=("/here/a.mp4",))]
    moved = [Row(id="0", problem="?", answer="1", videos=("/there/a.mp4",))]
    other = [Row(id="0", problem="?", answer="2", videos=("/here/a.mp4",))]
    prints = [RenderedRows(found, FakeRender()).fingerprint for found in (here, moved, other)]
    assert prints[0] == prints[1] != prints[2]


def test_tensors_of_any_size_arrive_from_workers_as_they_were():
    patches = torch.rand(2, 300, 1000)  # 1.2 MB each: in shared memory
    media = tuple(Media("video", each, (1, 2, 2), 1.0, (0.0,), "key") for each in patches)
    prompt = replace(FakeRender()(rows(1)[0]), input_ids=torch.arange(5), media=media)
    parcel = IPCPayload.pack(prompt)
    assert [tensor.data_ptr() for tensor in parcel.shared] == [item.patches.data_ptr() for item in media]
    (found,) = LoaderOptions(num_workers=1).render(RenderedRows([prompt.row], lambda _: prompt), [0])
    assert torch.equal(found.input_ids, prompt.input_ids)
    assert all(torch.equal(one.patches, other) for one, other in zip(found.media, patches, strict=True))
    assert replace(found, input_ids=0, position_ids=0, media=()) == replace(
        prompt, input_ids=0, position_ids=0, media=()
    )


def test_patches_of_workers_are_pinned_where_they_go_to_a_gpu(monkeypatch):
    """By PyTorch's loader, which does so only where it finds a GPU: here its part is played."""
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor.data_ptr()) or tensor.clone())
    patches = torch.rand(300, 1000)
    media = (Media("video", patches, (1, 2, 2), 1.0, (0.0,), "key"),)
    prompt = replace(FakeRender()(rows(1)[0]), media=media)
    found = IPCPayload.pack(prompt).pin_memory().unpack()
    assert pinned == [patches.data_ptr()]
    assert found.media[0].patches.data_ptr() != patches.data_ptr()
    assert torch.equal(found.media[0].patches, patches)
    broken = UnusableSample("a.mp4", "no such stream")
    assert str(IPCPayload.pack(broken).pin_memory().unpack()) == str(broken)
    with pytest.raises(SharedMemoryFull, match="no room"):
        IPCPayload.pack(SharedMemoryFull("no room")).pin_memory().unpack()

    made = []
    monkeypatch.setattr(loader, "DataLoader", lambda *args, **options: made.append(options["pin_memory"]))
    monkeypatch.setattr(loader, "items_of_workers", lambda *args: iter(()))
    for pin_memory in (False, True):
        LoaderOptions(num_workers=1, pin_memory=pin_memory).render(RenderedRows([prompt.row], FakeRender()), [0])
    assert made == [False, True]


# ---- skipping ----


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_row_is_listed_once_and_the_next_row_takes_its_place(tmp_path, workers):
    broken = permutation(7, 0, 0)[2]
    found = stream(tmp_path, 7, {broken}, workers)
    taken = ids(found.take(12))
    wanted = [row for epoch in range(2) for row in permutation(7, 0, epoch) if row != broken]
    assert taken == wanted
    assert listed(tmp_path) == [
        {"split": "train", "id": str(broken), "path": f"{broken}.mp4", "reason": f"{broken}.mp4: no such stream"}
    ]
    assert found.position in (13, 14)  # 12 prompts and the broken row of each epoch that was passed


def test_the_state_is_exact_around_a_broken_row(tmp_path):
    order = permutation(6, 0, 0)
    for taken in range(5):
        first = stream(tmp_path, 6, {order[2]})
        first.take(taken)
        assert first.position == taken + (taken > 2)
        again = stream(tmp_path, 6, {order[2]})
        again.load_state_dict(first.state_dict())
        assert ids(again.take(1)) == [[row for row in (*order, permutation(6, 0, 1)[0]) if row != order[2]][taken]]


def test_more_than_the_share_of_broken_rows_is_an_error(tmp_path):
    with pytest.raises(
        ValueError,
        match=r"data.max_skipped_share=0.05 of the train rows may be skipped, but 4 of all 20 cannot be used, the last "
        r"\(row '\d+'\) because: \d+\.mp4: no such stream. All are listed in .*skipped.jsonl; .* raise "
        r"data.max_skipped_share",
    ):
        stream(tmp_path, 20, {1, 5, 11, 17}, max_share=0.05).take(40)
    assert len(listed(tmp_path)) == 4


def test_broken_rows_within_the_share_go_on_for_ever(tmp_path):
    found = stream(tmp_path, 100, range(5), max_share=0.05)
    found.take(1000)
    assert len(found.skips) == 5


def test_three_broken_rows_are_forgiven_whatever_the_share(tmp_path):
    assert set(ids(stream(tmp_path, 6, {0, 1, 2}, max_share=0.05).take(30))) == {3, 4, 5}


def test_a_share_of_zero_forgives_none(tmp_path):
    with pytest.raises(ValueError, match="1 of all 6 cannot be used"):
        stream(tmp_path, 6, {0}, max_share=0.0).take(6)


def test_rows_that_are_all_broken_end_a_small_data_set(tmp_path):
    with pytest.raises(ValueError, match="2 of all 2 cannot be used"):
        stream(tmp_path, 2, {0, 1}).take(1)


def test_media_that_never_decode_end_a_large_data_set_at_once(tmp_path):
    with pytest.raises(ValueError, match="6 of the first 6 cannot be used"):
        stream(tmp_path, 10_000, range(10_000), max_share=0.05).take(1)


@settings(max_examples=20)
@given(seed=st.integers(0, 10_000))
def test_a_share_that_is_kept_does_not_trip_the_early_check(tmp_path_factory, seed):
    tmp_path = tmp_path_factory.mktemp("skips")
    found = stream(tmp_path, 400, range(0, 400, 20), max_share=0.05, seed=seed)
    found.take(800)
    assert len(found.skips) == 20


def test_a_resumed_run_lists_no_row_again(tmp_path):
    for _ in range(2):
        stream(tmp_path, 7, {1, 2}).take(10)
    assert sorted(line["id"] for line in listed(tmp_path)) == ["1", "2"]


def test_rows_known_to_be_missing_are_listed_by_one_rank_and_never_again(tmp_path):
    for writes in (True, False):
        skips = skip_log(tmp_path, 9, writes_known=writes)
        skips.add_known([UnusableSample("4.mp4", "the file does not exist", 4, "4")])
        PromptStream(dataset(9, {4}), RowOrder(9), skips).take(20)
        assert len(skips) == 1
    assert [line["id"] for line in listed(tmp_path)] == ["4"]


# ---- loaders ----


def test_a_lightning_epoch_has_whole_batches_and_the_next_goes_on(tmp_path):
    loader = TrainLoader(stream(tmp_path, 7), prompts_per_batch=3)
    epochs = [[ids(batch.prompts) for batch in loader] for _ in range(2)]
    order = [*permutation(7, 0, 0), *permutation(7, 0, 1)]
    assert epochs == [[order[0:3], order[3:6]], [order[6:9], order[9:12]]]


def test_a_refill_takes_the_following_prompts(tmp_path):
    source = stream(tmp_path, 7)
    batches = iter(TrainLoader(source, prompts_per_batch=2))
    taken = ids(next(batches).prompts) + ids(source.take(3)) + ids(next(batches).prompts)
    assert taken == list(permutation(7, 0, 0))


def test_a_batch_larger_than_the_data_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"prompts_per_batch=4 prompts on each of 2 .* has 7 rows; lower .* most 3"):
        TrainLoader(stream(tmp_path, 7, world_size=2), prompts_per_batch=4)


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_reads_every_row_in_order_and_leaves_broken_ones_out(tmp_path, workers):
    loader = EvalLoader(dataset(7, {1, 4, 5}), skip_log(tmp_path, 7), 2, options=LoaderOptions(num_workers=workers))
    for _ in range(2):
        assert [ids(batch.prompts) for batch in loader] == [[0], [2, 3], [6]]  # rows 4 and 5 would make an empty batch
    assert [line["id"] for line in listed(tmp_path)] == ["1", "4", "5"]


@given(num_rows=st.integers(1, 20), world_size=st.integers(1, 4), size=st.integers(1, 5))
def test_evaluation_ranks_read_all_rows_once_in_equally_many_batches(tmp_path_factory, num_rows, world_size, size):
    skips = skip_log(tmp_path_factory.mktemp("skips"), num_rows)
    ranks = [{"rank": rank, "world_size": world_size} for rank in range(world_size)]
    loaders = [EvalLoader(dataset(num_rows), skips, size, **rank) for rank in ranks]
    batches = [[ids(batch.prompts) for batch in loader] for loader in loaders]
    assert sorted(row for of_rank in batches for batch in of_rank for row in batch) == list(range(num_rows))
    assert {len(of_rank) for of_rank in batches} == {len(loaders[0])}
    assert all(len(batch) <= size for of_rank in batches for batch in of_rank)


def test_too_many_broken_rows_end_an_evaluation_too(tmp_path):
    with pytest.raises(ValueError, match="of the train rows may be skipped, but"):
        list(EvalLoader(dataset(40, range(20)), skip_log(tmp_path, 40, max_share=0.05), 8))


def test_a_repaired_row_is_no_other_data_and_any_other_change_is(tmp_path):
    first = stream(tmp_path, broken=(2, 5))
    first.take(6)  # a whole epoch and more
    state = json.loads(json.dumps(first.state_dict()))
    assert state["unusable_rows"] == [2, 5]

    def resumed(*changed: int) -> PromptStream:
        again = stream(tmp_path)
        for number in changed:
            again.dataset.rows[number] = replace(again.dataset.rows[number], problem="repaired")
        again.load_state_dict(state)
        return again

    for changed in ((), (2,), (2, 5)):
        again = resumed(*changed)
        assert again.position == first.position
        assert again.state_dict()["unusable_rows"] == [2, 5]
    for changed in ((3,), (2, 3)):
        with pytest.raises(ValueError, match="fingerprint of the rows"):
            resumed(*changed)


def test_a_checkpoint_of_before_repaired_rows_were_known_is_resumed(tmp_path):
    first = stream(tmp_path)
    first.take(3)
    state = first.state_dict()
    old = {name: state[name] for name in ("positions", "seed", "number_of_rows", "fingerprint_of_the_rows")}
    again = stream(tmp_path)
    again.load_state_dict(old)
    assert again.position == 3
