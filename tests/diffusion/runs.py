"""Runs of flow models through the real command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests import runs
from tests.diffusion.tiny import sd3_folder, wan_folder

FAMILIES = {
    "sd3": lambda: ("longrl.diffusion.sd3.SD3Family", {"model": sd3_folder(), "height": 16, "width": 16}),
    "wan": lambda: (
        "longrl.diffusion.wan.WanFamily",
        {"model": wan_folder(), "height": 32, "width": 48, "num_frames": 5},
    ),
}
PROMPTS = ("a red picture", "a green picture", "a blue picture", "a small cat")


def run(folder: Path, values: dict[str, Any], *more: str) -> Path:
    """A run in this process."""
    return runs.run(folder, values, *more, command="diffusion fit")


def prompt_file(folder: Path) -> str:
    path = folder / "prompts.txt"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{text}\n" for text in PROMPTS))
    return str(path)


def config(folder: Path, name: str = "sd3", **family: Any) -> dict[str, Any]:
    """2 prompts per step, 2 steps per epoch, 4 optimizer steps per rollout, on windows of 2 of 4 denoising steps."""
    kind, init_args = FAMILIES[name]()
    window = {"class_path": "longrl.diffusion.windows.RandomWindow", "init_args": {"size": 2}}
    return {
        "seed_everything": 3,
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "precision": "32-true",
            "max_epochs": 99,
            "max_steps": 16,
            "val_check_interval": 2,
            "check_val_every_n_epoch": None,
            "log_every_n_steps": 1,
            "num_sanity_val_steps": 0,
            "enable_model_summary": False,
            "enable_progress_bar": False,
            "callbacks": [],
        },
        "rollout": {
            "reward": {"terms": [{"function": "tests.diffusion.tiny.redness"}]},
            "sampling": {"num_generations": 2, "num_steps": 4, "guidance_scale": 2.0, "window": window},
            "eval_sampling": {"num_generations": 1, "num_steps": 4, "guidance_scale": 2.0, "window": None},
        },
        "model": {
            "family": {"class_path": kind, "init_args": {**init_args, "max_text_tokens": 8, **family}},
            "algorithm": {
                "surrogate": "longrl.algorithms.clipped",
                "kl": "longrl.algorithms.gaussian_mean",
                "kl_coef": 0.01,
                "kl_control": {"target": 1e-4, "horizon": 100},
                "moving_reference": {"alpha": 0.5, "every_n_steps": 3},
                "clip_low": 1e-3,
                "clip_high": 1e-3,
            },
            "optimizer": {"lr": 1e-3, "schedule": "cosine", "warmup_steps": 2},
            "rows_per_micro_batch": 4,
            "mini_batches_per_rollout": 2,
            "epochs_per_rollout": 2,
            "ema": {"decay": 0.9, "every_n_steps": 3},
        },
        "data": {"train": prompt_file(folder), "val": prompt_file(folder), "prompts_per_batch": 2},
        "checkpoint": {"every_n_train_steps": 4},
    }  # fmt: skip
