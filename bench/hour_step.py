"""One GRPO step of `fit` on one GPU, on a long video, with Qwen2.5-VL-3B's true shapes and random weights.

configs/qwen2_5_vl_3b_hour_grpo_lora.yaml as it is, but for the weights (random, made on the GPU), the data (one
generated mp4, one question, no KL), the engine (the trainer's own model, not vLLM) and 64 new tokens:

- lora: 1,820 frames, 131k tokens; adapters under autocast, layer inputs on the host.
- sharded: 224 frames, 16k tokens; all weights trained, float32 sharded by MRSPStrategy (FSDP2 over NCCL), computed in
  bfloat16.
- offload: the same strategy with `sharding.offload`, a tiny model.

Each is a command of its own: what fails or runs out of time is a row too, and the file is written after every row.
Needs no network, no weights, no vllm and no flash-attn.

    python bench/hour_step.py --json bench/results/hour_step.json
    python bench/hour_step.py --cpu --tiny     # the same code, to try it; its numbers mean nothing
    python bench/hour_step.py --quick          # the tiny model, on a GPU if there is one
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
import yaml
from common import ROOT, console, import_path, print_table, provenance, write_json

from longrl.testing.drawing import Clip, write_video
from longrl.testing.stories import sample_story
from longrl.testing.synthetic_videos import SyntheticConfig
from longrl.testing.tiny import tiny_qwen2_5_vl

RECIPE = ROOT / "configs" / "qwen2_5_vl_3b_hour_grpo_lora.yaml"
SHAPES = ROOT / "configs" / "shapes" / "Qwen" / "Qwen2.5-VL-3B-Instruct" / "config.json"
PHASES = ("data", "encode", "generate", "update")
LAST_LINES = 5
"""Of the output of a step that failed, in the table."""


@dataclass(frozen=True)
class Step:
    """One command."""

    case: str
    frames: int
    limit_s: float
    is_sharded: bool = False
    is_offloaded: bool = False
    is_tiny: bool = False
    """A model of a few thousand parameters instead of 3B's shapes."""


@dataclass(frozen=True)
class Sizes:
    """What a run measures."""

    steps: tuple[Step, ...]
    frame_size: int
    """Pixels along a side."""
    completions: int = 8
    new_tokens: int = 64


FULL = Sizes(
    steps=(
        Step("offload", 16, 60, is_sharded=True, is_offloaded=True, is_tiny=True),
        Step("lora", 1820, 170),
        Step("sharded", 224, 100, is_sharded=True),
    ),
    frame_size=336,
)
TINY = Sizes(
    steps=(
        Step("offload", 16, 120, is_sharded=True, is_offloaded=True, is_tiny=True),
        Step("lora", 16, 120, is_tiny=True),
        Step("sharded", 16, 120, is_sharded=True, is_tiny=True),
    ),
    frame_size=56, new_tokens=4,
)  # fmt: skip


# ---- inputs ----


def make_inputs(folder: Path, sizes: Sizes) -> None:
    """A video, a question about it, and two models without weights: `tiny`, and `true` of the 3B's shapes."""
    seconds = max(step.frames for step in sizes.steps)
    story = sample_story(Random(0), num_scenes=4)
    write_video(
        folder / "hour.mp4",
        Clip("hour", story, "0"),
        SyntheticConfig(scene_s=seconds / 4, fps=1, size=sizes.frame_size),
    )
    record = {"problem": "What happens first? A. a circle B. a square", "answer": "A", "videos": ["hour.mp4"]}
    (folder / "train.jsonl").write_text(json.dumps(record) + "\n")
    tiny = json.loads((tiny_qwen2_5_vl(folder / "tiny") / "config.json").read_text())
    shape = json.loads(SHAPES.read_text())
    marks = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    shape |= {name: tiny[name] for name in marks}  # the tokenizer is the tiny model's
    (tiny_qwen2_5_vl(folder / "true") / "config.json").write_text(json.dumps(shape))


def changes_of(step: Step, sizes: Sizes, folder: Path, is_cpu: bool) -> dict[str, Any]:
    """What is laid over the recipe."""
    sharded = {
        "class_path": "longrl.strategies.mr_sp.MRSPStrategy",
        "init_args": {
            "sequence_parallel_size": "auto",
            "sharding": {"compute_dtype": "float32" if is_cpu else "bfloat16", "offload": step.is_offloaded},
        },
    }
    family = {
        "model": str(folder / ("tiny" if step.is_tiny else "true")), "random_init": True,
        "init_device": "cpu" if is_cpu else "cuda", "min_pixels": min(3136, sizes.frame_size**2),
        "max_pixels": sizes.frame_size**2, "max_video_pixels": step.frames * sizes.frame_size**2,
    }  # fmt: skip
    if step.is_sharded:
        family |= {"dtype": "float32", "lora": None, "offload_checkpoints": False}
    return {
        "run_dir": str(folder / f"run_{step.case}"),
        "trainer": {
            "accelerator": "cpu" if is_cpu else "gpu", "devices": 1, "max_steps": 1, "limit_val_batches": 0,
            "precision": "32-true" if is_cpu or step.is_sharded else "bf16-mixed", "enable_progress_bar": False,
            **({"strategy": sharded} if step.is_sharded else {}),
        },
        "rollout": {
            "reward": {"terms": [{"function": "hour_long.is_odd"}]},
            "sampling": {"num_generations": sizes.completions, "max_completion_tokens": sizes.new_tokens},
            "engine": {"class_path": "longrl.engines.hf.HFEngine", "init_args": {"max_sequences": sizes.completions}},
        },
        "checkpoint": {"save_last": False},
        "model": {"family": {"init_args": family}, "algorithm": {"kl_coef": 0.0}},
        "data": {
            "train": str(folder / "train.jsonl"), "val": None, "test": None, "media_root": str(folder),
            "prompts_per_batch": 1, "num_workers": 2,
            "video": {"fps": None, "num_frames": step.frames, "min_frames": 1, "max_frames": step.frames},
        },
    }  # fmt: skip


# ---- one step ----


def measure(step: Step, sizes: Sizes, folder: Path, is_cpu: bool) -> dict[str, Any]:
    """The row of one step."""
    config = folder / f"{step.case}.yaml"
    config.write_text(yaml.safe_dump(changes_of(step, sizes, folder, is_cpu)))
    command = [sys.executable, "-m", "longrl", "fit", "--config", str(RECIPE), "--config", str(config)]
    start = time.perf_counter()
    status = run(command, step.limit_s)
    row = {
        "case": step.case, "model": "tiny" if step.is_tiny else "3B", "frames": step.frames,
        "video_tokens": step.frames // 2 * (sizes.frame_size // 28) ** 2, "command_s": time.perf_counter() - start,
    }  # fmt: skip
    return row | numbers_of(folder / f"run_{step.case}") | {"status": status}


def run(command: Sequence[str], limit_s: float) -> str:
    """`ok`, or how the command ended and its last lines."""
    environment = os.environ | {"PYTHONPATH": import_path()}
    try:
        done = subprocess.run(
            command, env=environment, cwd=ROOT, timeout=limit_s, check=False, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"not over after {limit_s:g} s"
    if done.returncode == 0:
        return "ok"
    return f"status {done.returncode}: " + " / ".join(done.stdout.strip().splitlines()[-LAST_LINES:])


def numbers_of(run_dir: Path) -> dict[str, Any]:
    """What the run logged of its step; None for what it did not come to."""
    logged: dict[str, float] = {}
    for file in run_dir.rglob("metrics.csv"):
        with file.open() as lines:
            for line in csv.DictReader(lines):
                logged |= {name: float(value) for name, value in line.items() if value}
    peaks = [value for name, value in logged.items() if name.startswith("memory/")]
    return {
        **{f"{phase}_s": logged.get(f"time/{phase}") for phase in PHASES},
        "mfu": logged.get("throughput/mfu"), "peak_gib": max(peaks, default=None),
        "loss": logged.get("train/loss"), "grad_norm": logged.get("train/grad_norm"),
    }  # fmt: skip


# ---- the command ----


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; refuses to run without a GPU unless told to try things on a CPU."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="written after every row")
    parser.add_argument("--cpu", action="store_true", help="on the CPU; needs --tiny")
    parser.add_argument("--tiny", action="store_true", help="a model of a few thousand parameters, few frames")
    parser.add_argument("--quick", action="store_true", help="--tiny, and --cpu where there is no GPU")
    parser.add_argument("--only", metavar="CASE", help="one of lora, sharded, offload")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.tiny = True
        arguments.cpu = arguments.cpu or not torch.cuda.is_available()
    if not arguments.cpu and not torch.cuda.is_available():
        parser.error(f"bench/hour_step.py needs a GPU, but torch {torch.__version__} sees none; try --cpu --tiny")
    if arguments.cpu and not arguments.tiny:
        parser.error("--cpu needs --tiny: a step of 131k tokens takes hours on a CPU")
    return arguments


def main(argv: Sequence[str] | None = None, sizes: Sizes | None = None) -> list[dict[str, Any]]:
    """The command; `sizes` replaces what `--tiny` or its absence choose. Exits with 1 if a step failed."""
    arguments = parse(argv)
    if argv is None:  # a process of its own, which `timeout` may end: then the step that is on ends, too
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sizes = sizes or (TINY if arguments.tiny else FULL)
    rows: list[dict[str, Any]] = []
    given = [f"--{name}" for name in ("cpu", "tiny", "quick") if getattr(arguments, name)]
    origin = provenance("hour_step", arguments) | {"command": " ".join(["python bench/hour_step.py", *given])}
    with tempfile.TemporaryDirectory(prefix="longrl-hour-step-", ignore_cleanup_errors=True) as name:
        make_inputs(Path(name), sizes)
        for step in sizes.steps:
            if arguments.only in (None, step.case):
                rows.append(measure(step, sizes, Path(name), arguments.cpu))
                console.print(rows[-1], soft_wrap=True, highlight=False, markup=False)
                if arguments.json:
                    write_json(arguments.json, {**origin, "rows": rows})
    shown = [row | {"status": row["status"][:60]} for row in rows]  # the whole is printed above, and in the file
    print_table("hour_step", [{key: "" if value is None else value for key, value in row.items()} for row in shown])
    failed = [row["case"] for row in rows if row["status"] != "ok"]
    if failed and argv is None:
        sys.exit(f"failed: {', '.join(failed)}")
    return rows


if __name__ == "__main__":
    main()
