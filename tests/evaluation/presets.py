"""Rows of a config of configs/eval/ from released records, as an evaluation reads them."""

import json
from dataclasses import replace
from pathlib import Path

from longrl.commands.evaluate import parse_evaluation
from longrl.datamodules.rows.question_rows import make_rows
from longrl.datamodules.rows.sources import read_records
from longrl.evaluation.endpoint_policy import ChatReader
from longrl.types import Row
from tests.datamodules.media.test_video import write
from tests.runs import ROOT


def read_preset(name, files):
    """(config, rows of all its sources, renderer) of a config; files, path -> content, are written where one is."""
    for path, content in files.items():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        if path.endswith(".mp4"):
            write(Path(path), content, rate=4, size=(32, 32))
        else:
            Path(path).write_text(content if isinstance(content, str) else json.dumps(content))
    config, data = parse_evaluation([f"--config={ROOT / 'configs' / 'eval' / name}.yaml"])
    rows = []
    for one in data.sources["test"]:
        function = data.row_functions[one.row_function or data.row_function]
        rows += make_rows(read_records(one.source), function, data.media_root)
    assert not [row for row in rows if not isinstance(row, Row)], rows
    return config, rows, replace(data.renderer, family=ChatReader(64))
