"""examples/own_videos: from a folder of videos and questions to an exported model that transformers asks."""

import re
import runpy
import sys
from pathlib import Path
from unittest import mock

import pytest

from longrl.commands.main import main
from longrl.datamodules.longvideo_reason import LongVideoReason
from longrl.io.jsonl import write_jsonl
from longrl.models.qwen_vl import Qwen2_5_VLFamily

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "own_videos"


def run(*args):
    """A command in this process, as if typed."""
    args = [str(arg) for arg in args]
    with mock.patch.object(sys, "argv", ["longrl", *args]):
        main(args)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Lightning, which no user sees
def test_the_whole_walk_from_another_folder(tmp_path, monkeypatch, capsys):
    """SFT, RL, test, compare, export and a question by plain transformers, with a step of each stage."""
    monkeypatch.chdir(tmp_path)
    clips = tmp_path / "my clips"
    runpy.run_path(str(EXAMPLE / "make_clips.py"))["main"](["--out", str(clips), "--num_videos", "3"])
    run("init", "start", "--cpu", "--videos", clips, "--questions", clips / "questions.jsonl")
    assert "12 of 12 records are read" in capsys.readouterr().out

    short = ("--trainer.max_steps=1", "--data.prompts_per_batch=2", "--rollout.sampling.max_completion_tokens=12")
    run("test", "--config", "start/sft.yaml", "--base_weights=true", "--run_dir=start/runs/base", short[2])
    run("fit", "--config", "start/sft.yaml", *short)
    run("fit", "--config", "start/rl.yaml", *short)
    run("test", "--ckpt_path", "start/runs/rl/checkpoints/last.ckpt")
    run("compare", "start/runs/base", "start/runs/rl")
    run("export", "--run", "start/runs/rl", "--out", "start/exported")
    assert (tmp_path / "start" / "runs" / "rl" / "test" / "results.json").is_file()

    capsys.readouterr()
    ask = runpy.run_path("start/ask.py")["main"]
    ask("start/exported", str(clips / "train_000000.mp4"), "What comes next?")
    assert capsys.readouterr().out.strip()


SHARE = "data.max_skipped_share=0.05 of the train rows may be skipped, but "
OUTSIDE = "1 of 1 rows name media that may not be read"


@pytest.mark.parametrize(
    ("changes", "said", "in_docs"),
    [
        ({"question": None}, "needs 'question', which is empty", "needs 'question', which is missing"),
        (
            {"answer": "beer"},
            "must be one of the options A, B, C, D, got 'beer'",
            "the answer must be one of the options",
        ),
        ({"video": "gone.mp4"}, f"{SHARE}1 of all 1 cannot be used", SHARE),
        ({"video": "gone.mp4"}, "gone.mp4: the file does not exist", "the file does not exist"),
        ({"video": "/etc/hostname"}, OUTSIDE, OUTSIDE),
    ],
)
def test_the_messages_that_the_page_explains_are_those_that_come(changes, said, in_docs, tmp_path):
    record = {"video": "clip.mp4", "question": "What?", "options": ["tea", "milk", "oil", "water"], "answer": "tea"}
    (tmp_path / "clip.mp4").write_bytes(b"")
    file = write_jsonl(tmp_path / "train.jsonl", [record | changes])
    family = Qwen2_5_VLFamily(str(ROOT / "configs" / "demo" / "base"))
    row_function = "longrl.datamodules.rows.canonical_row"
    data = LongVideoReason(family, train=str(file), row_function=row_function, skipped_dir=str(tmp_path))
    with pytest.raises(ValueError, match=re.escape(said)):
        data.setup("fit")
    assert in_docs in (ROOT / "docs" / "own_videos.md").read_text()
