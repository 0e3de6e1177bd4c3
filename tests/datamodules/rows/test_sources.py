"""Data files that nobody can read end in one line with the file, the place and the remedy."""

import codecs
import json

import pyarrow as pa
import pytest
from pyarrow import parquet

from longrl.datamodules.rows.sources import read_records

RECORD = {"problem": "Wer f\u00e4hrt?", "answer": "Ann"}
LINE = json.dumps(RECORD, ensure_ascii=False)


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv"])
def test_a_byte_order_mark_and_windows_lines_are_read(tmp_path, suffix):
    text = {"jsonl": f"{LINE}\r\n\r\n{LINE}\r\n", "json": f"[{LINE},\r\n{LINE}]", "csv": "problem,answer\r\n" + 2 *
            "Wer f\u00e4hrt?,Ann\r\n"}[suffix]  # fmt: skip
    file = tmp_path / f"rows.{suffix}"
    file.write_bytes(codecs.BOM_UTF8 + text.encode())
    assert list(read_records(file)) == [RECORD, RECORD]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "tsv"])
@pytest.mark.parametrize(
    ("encoding", "reason"),
    [
        ("latin-1", r"line 2 of .*rows\.{suffix} is no UTF-8 \(byte 0xe4 at place \d+\); save the file anew, .*iconv"),
        ("utf-16", r"rows\.{suffix} is UTF-16, and must be UTF-8; save it anew"),
        ("utf-32", r"rows\.{suffix} is UTF-32, and must be UTF-8; save it anew"),
    ],
)
def test_another_encoding_is_named_with_its_line(tmp_path, suffix, encoding, reason):
    file = tmp_path / f"rows.{suffix}"
    file.write_bytes(f"\n{LINE}\n".encode(encoding))
    with pytest.raises(ValueError, match=reason.replace("{suffix}", suffix)) as caught:
        read_records(file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is no parquet file: .*is it cut off"),
        (b"no table at all", "is no parquet file: .*is it cut off"),
        ("cut", "is no parquet file: .*is it cut off"),
        ("torn", "is damaged: its records from 0 on cannot be read"),
    ],
)
def test_a_parquet_file_that_is_broken_is_named(tmp_path, content, reason):
    file = tmp_path / "rows.parquet"
    parquet.write_table(pa.Table.from_pylist([RECORD | {"problem_id": str(n)} for n in range(2000)]), file)
    whole = file.read_bytes()
    if content == "cut":
        content = whole[: len(whole) // 2]
    if content == "torn":
        content = whole[:40] + bytes(byte ^ 255 for byte in whole[40:400]) + whole[400:]
    file.write_bytes(content)
    with pytest.raises(ValueError, match=reason) as caught:
        list(read_records(file))
    assert "\n" not in str(caught.value)
    assert "rows.parquet" in str(caught.value)


@pytest.mark.parametrize("line", ['{"problem": "a', "[1, 2]", "nothing", '{"a": 1} {"b": 2}'])
def test_a_line_that_is_no_record_is_named(tmp_path, line):
    file = tmp_path / "rows.jsonl"
    file.write_text(f"{LINE}\n{line}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"line 2 of .*rows\.jsonl"):
        read_records(file)


def test_a_table_between_semicolons_is_named(tmp_path):
    (tmp_path / "rows.csv").write_text("problem;answer\nWho drives?;Ann\n")
    with pytest.raises(ValueError, match=r"rows\.csv must have its columns between ',', got 'problem;answer'; save it"):
        read_records(tmp_path / "rows.csv")
