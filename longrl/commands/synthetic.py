"""`python -m longrl synthetic`: generates long videos with known stories, and questions about them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from longrl.commands.closing import longrl, say_end

logger = logging.getLogger(__name__)


def main(args: Sequence[str]) -> None:
    """Command line: `--out`, `--workers` and one flag per field of `SyntheticConfig`."""
    from longrl.commands.parsers import ShortErrors
    from longrl.testing.synthetic_videos import SyntheticConfig, generate_videos

    text = "Generates long videos with known stories, and questions about them."
    parser = ShortErrors(prog="python -m longrl synthetic", description=text)
    parser.add_argument("--out", type=str, required=True, help="folder to write")
    parser.add_argument("--workers", type=int, default=2, help="processes that draw and encode")
    parser.add_class_arguments(SyntheticConfig)
    options = parser.parse_args(list(args)).as_dict()
    out, workers = options.pop("out"), options.pop("workers")
    logger.info("drawing and encoding videos in %d processes", workers)
    generate_videos(out, SyntheticConfig(**options), workers=workers)
    files = {name: Path(out, f"{name}.jsonl") for name in ("train", "eval")}
    configs = ("--config", "configs/demo/common.yaml", "--config", "configs/demo/sft.yaml")
    following = longrl("fit", *configs, "--train", files["train"], "--init_from", "configs/demo/base")
    say_end([f"questions: {files['train']} and {files['eval']}; videos: {Path(out, 'videos')}"], [following])
