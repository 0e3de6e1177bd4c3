"""examples/data_forms: each file writes a data set in its form, and shows the prompt that a model gets of it."""

import runpy
from pathlib import Path

import pytest

from longrl.datamodules.loading.mixing import DataSource
from longrl.datamodules.longvideo_reason import LongVideoReason
from longrl.datamodules.rows.sources import stream_records
from longrl.models.text import TextFamily
from tests.tiny import text_folder

FORMS = Path(__file__).parents[2] / "examples" / "data_forms"
TIMES = (1.0, 3.0, 5.0, 7.0, 9.0, 11.0, 13.0, 15.0, 17.0, 19.0)


@pytest.mark.parametrize("name", ["messages", "frame_list", "video_bytes", "streaming"])
def test_a_form_becomes_a_prompt_with_its_frames(name, tmp_path, monkeypatch, capsys):
    """A list of frames is seen at the same moments as the video that they are from."""
    monkeypatch.syspath_prepend(str(FORMS))
    prompt = runpy.run_path(str(FORMS / f"{name}.py"))["main"](str(tmp_path))
    said = capsys.readouterr().out
    assert "<answer>" in said
    assert prompt.frame_times[0] == pytest.approx(TIMES)
    assert f"rows:    {({'messages': 1, 'frame_list': 1, 'video_bytes': 8, 'streaming': 6})[name]}\n" in said


@pytest.fixture
def hub_set(tmp_path, monkeypatch):
    """A folder that `datasets` takes for the set `owner/sums`: nine records in three files."""
    import pyarrow as pa
    from pyarrow import parquet

    folder = tmp_path / "owner" / "sums" / "data"
    folder.mkdir(parents=True)
    records = [{"problem": f"{n} + 1?", "answer": f"{n + 1}", "problem_id": f"r{n}"} for n in range(9)]
    for part in range(3):
        table = pa.Table.from_pylist(records[3 * part : 3 * part + 3])
        parquet.write_table(table, folder / f"train-{part:05d}-of-00003.parquet")
    monkeypatch.chdir(tmp_path)
    return records


def test_a_streamed_set_gives_its_first_records_and_reads_no_further(hub_set, tmp_path):
    (tmp_path / "owner" / "sums" / "data" / "train-00002-of-00003.parquet").write_bytes(b"never fetched")
    assert list(stream_records("owner/sums:train", 5)) == hub_set[:5]


def test_a_run_on_a_streamed_set_resumes_exactly(hub_set):
    def module(source):
        made = LongVideoReason(TextFamily(text_folder(), random_init=True), train=[source], prompts_per_batch=2)
        made.setup("fit")
        return made

    first, again = (module(DataSource("owner/sums", streaming=True, max_records=7)) for _ in range(2))
    first.draw_prompts(5)
    again.load_state_dict(first.state_dict())
    following = [one.id for one in first.draw_prompts(9)]
    assert [one.id for one in again.draw_prompts(9)] == following
    assert set(following) <= {record["problem_id"] for record in hub_set[:7]}
    with pytest.raises(ValueError, match="the data of a resumed run must be the checkpoint's"):
        module(DataSource("owner/sums", streaming=True)).load_state_dict(first.state_dict())


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("rows.jsonl", "streaming is for a hub id owner/name:split, got 'rows.jsonl'; leave it out"),
        ("owner/sums:train[:5]", "a streamed split has no slices.*; give max_records in place of the slice"),
        ("owner/sums:test", "'owner/sums:test' could not be streamed from record 0 on: Bad split: test"),
        ("owner/none", "owner/none:train: it is not in the cache"),
    ],
)
def test_what_cannot_be_streamed_is_named(hub_set, source, reason):
    with pytest.raises(ValueError, match=reason):
        list(stream_records(source))


def test_a_limit_of_records_is_of_files_too_and_at_least_one(tmp_path):
    from longrl.datamodules.loading.mixing import records_of
    from longrl.io.jsonl import write_jsonl

    file = write_jsonl(tmp_path / "rows.jsonl", [{"n": n} for n in range(4)])
    assert list(records_of(DataSource(str(file), max_records=2))) == [{"n": 0}, {"n": 1}]
    with pytest.raises(ValueError, match="max_records of rows.jsonl must be at least 1, got 0"):
        DataSource("rows.jsonl", max_records=0)
