"""The command line of `compare`: a table, and everything as JSON."""

import json

import pytest

from longrl.commands.main import main
from longrl.evaluation.comparison import compare_folders
from longrl.evaluation.protocol import list_protocol_facts
from longrl.io.jsonl import read_jsonl
from tests.evaluation.scripted import evaluated


def test_the_gain_is_printed_and_written(tmp_path, capsys):
    a, b = tmp_path / "a", tmp_path / "b"
    evaluated(a, policy="Mixed")
    evaluated(b, "--data.selection=longrl.datamodules.selection.KeyFrames", says="<answer>{gold}</answer>")
    capsys.readouterr()
    main(["compare", str(a), str(b), "--out", str(tmp_path / "c.json")])
    printed = capsys.readouterr().out
    assert "b minus a (video)" in printed
    assert "+75.0 [" in printed
    found = compare_folders(a, b)["video"]
    assert json.loads((tmp_path / "c.json").read_text())["video"]["won"] == found.won
    assert f"won: {', '.join(found.won)}" in printed
    results = json.loads((b / "results.json").read_text())
    assert "; selection: name KeyFrames, candidates_fps 1.0" in list_protocol_facts(results)["frames of a question"]
    assert {line["selection"] for line in read_jsonl(b / "samples.jsonl")} == {"KeyFrames"}
    assert 'not asked alike: reading.selection was null, is {"name": "KeyFrames", ' in printed

    # The same once more is no loss, another one would be.
    main(["compare", str(a), str(b), "--out", str(tmp_path / "c.json")])
    with pytest.raises(ValueError, match=r"^--out=\S+c\.json exists and holds another result; name another file"):
        main(["compare", str(b), str(a), "--out", str(tmp_path / "c.json")])
    assert json.loads((tmp_path / "c.json").read_text())["video"]["won"] == found.won
