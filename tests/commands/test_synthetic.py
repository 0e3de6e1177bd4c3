"""The command that generates videos; what it generates: tests/testing/test_synthetic.py."""

from longrl.commands.main import main
from longrl.io.jsonl import read_jsonl


def test_the_command_line_writes_a_dataset(tmp_path):
    flags = "--num_train_videos 1 --num_eval_videos 1 --scene_s 1 --fps 1 --size 32 --workers 1"
    main(["synthetic", "--out", str(tmp_path / "cli"), *flags.split()])
    assert len(read_jsonl(tmp_path / "cli" / "eval.jsonl")) == 4
