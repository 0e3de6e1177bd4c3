"""An hour of video through one GRPO step on a CPU: seconds and memory of every phase, for growing lengths.

A one-hour mp4 is made once. A run is `longrl fit` itself, for one step on one question about it: 112 frames give 8k
tokens, 3,600 frames 259k. Every rank is a process of its own with gloo between them; the ranks of `sp` share frames and
rows. The model is a Qwen2.5-VL of one text layer: all that grows with the length is there, arithmetic is kept small.

- data: the loader decodes its share of the frames and resizes them to the encoder's size, chunk by chunk.
- encode: patches and features, call by call.
- generate: G completions of one prefilled prompt (HFEngine, prefilled in chunks).
- update: forward and backward of prompt and completions in one sequence, and AdamW.

`peak_mib` is the most physical memory held in a phase by all ranks together (their own peaks added), Python and its
libraries included.

    python bench/hour_long.py --json bench/results/hour_long.json
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import yaml
from common import Row, import_path, parse_arguments, peak_memory_mib, report
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from longrl import types
from longrl.modules.phase_times import PhaseTimes
from longrl.testing.drawing import Clip, write_video
from longrl.testing.stories import sample_story
from longrl.testing.synthetic_videos import SyntheticConfig
from longrl.testing.tiny import tiny_qwen2_5_vl
from longrl.types import Batch, Completion

FRAME_SIZE = 336
"""Pixels along a side: two frames are 144 tokens."""
PHASES = ("data", "encode", "generate", "update")
NUM_SCENES = 6


@dataclass(frozen=True)
class Sizes:
    """What a run measures."""

    frames: tuple[int, ...] = (112, 448, 1780, 3600)
    sp: tuple[int, ...] = (1, 2)
    seconds: int = 3600
    completions: int = 8
    response_tokens: int = 8
    threads: int = 2
    """Of all ranks together."""


FULL = Sizes()
QUICK = Sizes(frames=(16, 64), seconds=64)


# -------------------------------------------------------------------------------------------- inside the measured run


class Peaks(PhaseTimes):
    """Seconds and the most physical memory of each phase, in MiB."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, dict[str, float]] = {name: {"seconds": 0.0, "peak_mib": 0.0} for name in PHASES}

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = self.begin()
        with super().__call__(phase):
            yield
        self.end(phase, start)

    def begin(self) -> float:
        """Forgets the peak that the process has had; the clock."""
        Path("/proc/self/clear_refs").write_text("5")
        return time.perf_counter()

    def end(self, phase: str, start: float) -> None:
        """What began at `start` was (a part of) this phase."""
        if phase in self.found:
            own = self.found[phase]
            own["seconds"] += time.perf_counter() - start
            own["peak_mib"] = max(own["peak_mib"], peak_memory_mib())


class Record(Callback):
    """Writes what each phase of the first step took, a file per rank; named in the run's config.

    Args:
        folder: where to.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.phases = Peaks()
        self._start = 0.0

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.phases = self.phases
        self._start = self.phases.begin()

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        self.phases.end("data", self._start)
        self.tokens = len(batch.prompts[0].input_ids)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        found = {"tokens": self.tokens, "phases": self.phases.found}
        (self.folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(found))


def is_odd(completion: Completion, row: types.Row) -> float:
    """A reward that some completions get."""
    return float(completion.token_ids.sum() % 2)


# ------------------------------------------------------------------------------------------------------- around it


def make_inputs(folder: Path, sizes: Sizes) -> None:
    """A video, a question about it, and a model without weights."""
    config = SyntheticConfig(scene_s=sizes.seconds / NUM_SCENES, fps=2, size=FRAME_SIZE)
    write_video(folder / "hour.mp4", Clip("hour", sample_story(Random(0), num_scenes=NUM_SCENES), "0"), config)
    record = {"problem": "What happens first? A. a circle B. a square", "answer": "A", "videos": ["hour.mp4"]}
    (folder / "train.jsonl").write_text(json.dumps(record) + "\n")
    text = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "max_position_embeddings": 1 << 19,
    }  # fmt: skip
    tiny_qwen2_5_vl(folder / "model", text=text, vision={"depth": 1, "fullatt_block_indexes": [0]})


def config_of(folder: Path, sizes: Sizes, num_frames: int, sp: int) -> dict[str, Any]:
    """One GRPO step on one prompt."""
    sampling = {"num_generations": sizes.completions, "max_completion_tokens": sizes.response_tokens}
    reward = {"terms": [{"function": "hour_long.is_odd"}]}
    return {
        "seed_everything": 0,
        "run_dir": str(folder / f"run_{num_frames}_{sp}"),
        "trainer": {
            "accelerator": "cpu", "devices": sp, "precision": "32-true", "max_steps": 1, "enable_progress_bar": False,
            "strategy": {
                "class_path": "longrl.strategies.mr_sp.MRSPStrategy",
                "init_args": {"sequence_parallel_size": sp},
            },
            "callbacks": [
                {"class_path": "hour_long.Record", "init_args": {"folder": str(folder)}},
            ],
        },
        "rollout": {"reward": reward, "sampling": sampling},
        "model": {
            "family": {
                "class_path": "longrl.models.qwen_vl.Qwen2_5_VLFamily",
                "init_args": {
                    "model": str(folder / "model"), "random_init": True, "min_pixels": FRAME_SIZE**2,
                    "max_pixels": FRAME_SIZE**2, "max_video_pixels": num_frames * FRAME_SIZE**2,
                },
            },
            "max_tokens_per_micro_batch": 1 << 19,
        },
        "data": {
            "train": str(folder / "train.jsonl"), "stage": "rl", "prompts_per_batch": 1, "num_workers": 0,
            "video": {"fps": None, "num_frames": num_frames, "min_frames": 1, "max_frames": num_frames},
        },
    }  # fmt: skip


def measure(folder: Path, sizes: Sizes, num_frames: int, sp: int) -> list[Row]:
    """The rows of one run: a phase each, seconds of the slowest rank, memory of all."""
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(config_of(folder, sizes, num_frames, sp)))
    threads = str(max(1, sizes.threads // sp))
    environment = {
        "OMP_NUM_THREADS": threads, "MALLOC_MMAP_THRESHOLD_": str(1 << 16), "PYTHONPATH": import_path()
    }  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={sp}", "-m", "longrl"]
    done = subprocess.run(
        [*command, "fit", "--config", str(config)], env=os.environ | environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"the run with {num_frames} frames on {sp} ranks failed:\n{done.stderr[-4000:]}")
    return rows_of([json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(sp)], num_frames)


def rows_of(ranks: Sequence[Mapping[str, Any]], num_frames: int) -> list[Row]:
    """What the ranks of a run wrote, as rows."""
    rows = []
    for phase in PHASES:
        own = [rank["phases"][phase] for rank in ranks]
        rows.append(
            {
                "tokens": ranks[0]["tokens"],
                "frames": num_frames,
                "sp": len(ranks),
                "phase": phase,
                "seconds": max(each["seconds"] for each in own),
                "peak_mib": sum(each["peak_mib"] for each in own),
            }
        )
    return rows


def main(argv: Sequence[str] | None = None, sizes: Sizes | None = None) -> None:
    """The command; `sizes` replaces what `--quick` or its absence choose."""
    arguments = parse_arguments(__doc__, argv)
    sizes = sizes or (QUICK if arguments.quick else FULL)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_inputs(folder, sizes)
        rows = [row for count in sizes.frames for sp in sizes.sp for row in measure(folder, sizes, count, sp)]
    settings = ", ".join(f"{name} {value}" for name, value in vars(sizes).items())
    report(__file__, arguments, rows, notes=[f"sizes: {settings}"])


if __name__ == "__main__":
    main()
