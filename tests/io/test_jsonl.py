import json

import pytest

from longrl.io.jsonl import drop_records, parse_json, read_jsonl, write_jsonl


def test_records_are_written_and_read_back(tmp_path):
    records = [{"id": "1", "nested": {"a": [1.5, None]}}, {"id": "\u00e9\n\u2028"}, {"half a character": "\ud800"}]
    path = write_jsonl(tmp_path / "new" / "samples.jsonl", records)
    assert read_jsonl(path) == records
    assert len(path.read_text(encoding="utf-8").split("\n")) == 4
    json.loads(path.read_text(encoding="utf-8").split("\n")[0])


def test_a_failed_write_leaves_the_old_file_and_no_remains(tmp_path):
    path = write_jsonl(tmp_path / "samples.jsonl", [{"id": 1}])
    with pytest.raises(TypeError):
        write_jsonl(path, [{"id": 2}, {"id": object()}])
    assert read_jsonl(path) == [{"id": 1}]
    assert [file.name for file in tmp_path.iterdir()] == ["samples.jsonl"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": ', r"line 3 of .* is no JSON"),
        ("[1]", r"line 3 of .* must hold a record, got list"),
        ('{"a":' * 100_000, r"line 3 of .* is no JSON: more than 100 lists and objects"),
        ('{"a":' + "[" * 200 + "]" * 200 + "}", r"line 3 of .* is no JSON: more than 100 lists and objects"),
        ('{"a": ' + "9" * 5000 + "}", r"line 3 of .* is no JSON: Exceeds the limit"),
    ],
)
def test_a_bad_line_is_an_error_with_its_number(tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(f'{{"id": 1}}\n\n{line}\n')
    with pytest.raises(ValueError, match=message):
        read_jsonl(path)


def test_records_are_taken_out_and_others_keep_their_bytes(tmp_path):
    path = tmp_path / "samples.jsonl"
    path.write_bytes(b'{"step":1,  "x": "\xc3\xa4"}\n{"step": 3}\n\x00\x00\n{"step": 2}\n{"step": 2, "x": "ha')
    assert drop_records(path, lambda record: record["step"] > 2) == 3
    assert path.read_bytes() == b'{"step":1,  "x": "\xc3\xa4"}\n{"step": 2}\n'
    before = path.stat().st_ino
    assert drop_records(path, lambda record: record["step"] > 2) == 0
    assert path.stat().st_ino == before
    assert drop_records(tmp_path / "none.jsonl", lambda record: True) == 0


def test_many_values_beside_each_other_are_not_deep():
    assert parse_json("[" + "[[1]]," * 300 + "{}]")[-1] == {}
    assert parse_json(b'{"a": [' + b"{}," * 300 + b"1]}")["a"][-1] == 1


def test_bytes_in_no_encoding_are_no_json():
    with pytest.raises(json.JSONDecodeError):
        parse_json(b'{"a": "\xff\xfe\xfa"}')
