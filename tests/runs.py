"""Tiny runs of the real command line that several tests share: configs, callbacks, and what their folders hold."""

from __future__ import annotations

import csv
import functools
import inspect
import itertools
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import yaml
from lightning.pytorch import Callback

from longrl.commands.main import main
from longrl.models.base import CausalFamily
from longrl.models.lora import add_adapters, to_checkpoint
from longrl.testing.synthetic_videos import SyntheticConfig, generate_videos
from tests.tiny import text_folder, vl_folder

ROOT = Path(__file__).parents[1]
TIMINGS = ("time/", "throughput/", "memory/")
"""Metrics that differ from run to run."""


# ---- configs ----


@functools.cache
def videos() -> Path:
    """3 training videos of 4 questions and 1 for evaluation; 56 x 56 pixels, 8 to 10 seconds."""
    folder = Path(tempfile.mkdtemp(prefix="longrl-videos-")) / "synthetic"
    generate_videos(folder, SyntheticConfig(3, 1, scene_s=2.0, size=56))
    return folder


def config(stage: str = "sft", **family: Any) -> dict[str, Any]:
    """A run on 12 video questions: 2 prompts per step, 6 steps per epoch."""
    folder = videos()
    return {
        "seed_everything": 3,
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "precision": "32-true",
            "log_every_n_steps": 1,
            "num_sanity_val_steps": 0,
            "enable_model_summary": False,
            "enable_progress_bar": False,
            "callbacks": [
                {"class_path": "longrl.callbacks.throughput.Throughput"},
                {"class_path": "tests.runs.DataOrder"},
            ],
        },
        "rollout": rollouts() if stage == "rl" else {},
        "model": {
            "family": {
                "class_path": "longrl.models.qwen_vl.Qwen2_5_VLFamily",
                "init_args": {
                    "model": vl_folder(),
                    "random_init": True,
                    "min_pixels": 784,
                    "max_pixels": 784,
                    **family,
                },
            },
            "optimizer": {"lr": 1e-3, "schedule": "cosine", "warmup_steps": 2},
            "max_tokens_per_micro_batch": 400,
        },
        "data": {
            "train": str(folder / "train.jsonl"),
            "stage": stage,
            "video": {"fps": 1.0},
            "prompts_per_batch": 2,
        },
        "checkpoint": {},
    }


def text_config(source: Path, stage: str = "sft") -> dict[str, Any]:
    """A run on text rows: quick, and it needs no video."""
    values = config(stage)
    values["model"]["family"] = {
        "class_path": "longrl.models.text.TextFamily",
        "init_args": {"model": text_folder(), "random_init": True},
    }
    values["data"]["train"] = str(source)
    return values


def rollouts(reward: str = "tests.runs.rare", **options: Any) -> dict[str, Any]:
    """The group `rollout` of a config."""
    return {
        "reward": {"terms": [{"function": reward}]},
        "sampling": {"num_generations": 2, "max_completion_tokens": 5},
        "max_resample_rounds": 20,
        **options,
    }


def rare(completion: Any, row: Any) -> float:
    """Right for about one in five completions, decided by the tokens alone."""
    return float(int(completion.token_ids.sum()) % 5 == 0)


def arguments(folder: Path, values: dict[str, Any], *more: str, command: str = "fit") -> list[str]:
    """Command line of a run in `folder` with a config of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "given.yaml"
    file.write_text(yaml.safe_dump(values))
    return [*command.split(), "--config", str(file), f"--run_dir={folder}", *more]


# ---- running ----


def run(folder: Path, values: dict[str, Any], *more: str, command: str = "fit") -> Path:
    """A run in this process."""
    args = arguments(folder, values, *more, command=command)
    with mock.patch.object(sys, "argv", ["longrl", *args]):
        main(args)
    return folder


def run_in_child(folder: Path, values: dict[str, Any], *more: str, command: str = "fit") -> int:
    """A run in a forked process, which spares the imports.

    Returns its exit status, or minus the signal that ended it, once all processes that it started have ended too.
    """
    sys.stdout.flush()
    child = start_in_child(folder, values, *more, command=command)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    wait_for_session(child)
    return status


def start_in_child(folder: Path, values: dict[str, Any], *more: str, command: str = "fit") -> int:
    """Starts a run in a forked process, the leader of a session of its own; returns the process."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os.setsid()
        status = 1
        try:
            run(folder, values, *more, command=command)
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
        except KeyboardInterrupt:  # once the command has given the signals back
            status = 128 + signal.SIGINT
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    return child


def wait_for_group(leader: int, timeout_s: float = 20.0) -> None:
    """Returns when no process of a group is left."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            os.killpg(leader, 0)
        except ProcessLookupError:
            return
        assert time.monotonic() < deadline, f"processes of group {leader} outlive the one that started them"
        time.sleep(0.02)


def wait_for_session(leader: int, timeout_s: float = 20.0) -> None:
    """Returns when no process of a session is left; loader workers are in process groups of their own."""
    deadline = time.monotonic() + timeout_s
    while left := session_members(leader):
        assert time.monotonic() < deadline, f"processes {left} outlive {leader}, which started them"
        time.sleep(0.02)


def session_members(leader: int) -> list[int]:
    """Processes of a session that have not ended."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = stat.read_text()
        except OSError:  # it has ended meanwhile
            continue
        state, _, _, session = text.rpartition(")")[2].split()[:4]
        if int(session) == leader and state not in "ZX":
            found.append(int(stat.parent.name))
    return found


PORTS = itertools.count(20_000 + 1_000 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]))
"""For the ranks of a run to meet at. Two runs that look for a free port at the same moment may find the same."""


def saved_run(folder: Path, family: CausalFamily) -> Path:
    """As much of a run as `export` reads: its config, and a checkpoint of the family's model, adapters included."""
    names = inspect.signature(type(family)).parameters.keys() & {"freeze_vision_encoder", "freeze_projector"}
    options = {"model": family.model_path, "random_init": True, **{name: getattr(family, name) for name in names}}
    if family.lora is not None:
        options["lora"] = to_checkpoint(family.lora)
    described = {"class_path": f"{type(family).__module__}.{type(family).__name__}", "init_args": options}
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": {"family": described}}))
    model = family.build() if family.lora is None else add_adapters(family, family.build())
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    torch.save({"state_dict": state, "lora": to_checkpoint(family.lora)}, folder / "checkpoints" / "last.ckpt")
    return folder


# ---- callbacks ----


class DataOrder(Callback):
    """Writes which prompts and completions each step read, also in runs that are killed."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        read = [prompt.id for prompt in batch.prompts]
        groups = [[group.prompt.id, *(c.token_ids.tolist() for c in group.completions)] for group in batch.groups or []]
        with (Path(trainer.default_root_dir) / "order.jsonl").open("a") as file:
            file.write(json.dumps([pl_module.global_step, read, groups]) + "\n")


class FirstWeights(Callback):
    """Keeps the weights that training starts from."""

    def on_train_start(self, trainer, pl_module):
        torch.save(pl_module.state_dict(), Path(trainer.default_root_dir) / "first.pt")


class Kill(Callback):
    """Sends its process a signal at a certain place of the first step that reaches `step` optimizer steps.

    Args:
        step: optimizer steps that are to be done.
        where: a callback hook; `saving` for the middle of writing a checkpoint, `saved` for right after one, `pruning`
            for before the one that it replaces is deleted.
        sends: the signal; one that does not end the process is sent once.
    """

    def __init__(self, step: int, where: str, sends: str = "SIGKILL") -> None:
        self.step, self.where = step, where
        self.sends = signal.Signals[sends]
        self.is_sent = False

    def _die(self, trainer) -> None:
        if trainer.global_step >= self.step and not self.is_sent:
            self.is_sent = True
            os.kill(os.getpid(), self.sends)

    def on_fit_start(self, trainer, pl_module):
        if self.where == "saving":
            self._break_save(trainer)
        if self.where == "saved":
            self._break_after_save(trainer)
        if self.where == "pruning":
            self._break_pruning(trainer)

    def _break_save(self, trainer) -> None:
        """Half of the file's bytes are written wherever the checkpoint goes first, then the process dies."""
        save = torch.save

        def half(checkpoint, file, *args, **kwargs):
            save(checkpoint, file, *args, **kwargs)
            if trainer.global_step >= self.step:
                if hasattr(file, "write"):
                    file.truncate(file.tell() // 2)
                    file.flush()
                else:
                    os.truncate(file, os.path.getsize(file) // 2)
            self._die(trainer)

        torch.save = half

    def _break_after_save(self, trainer) -> None:
        save = trainer.save_checkpoint

        def then_die(*args, **kwargs):
            save(*args, **kwargs)
            self._die(trainer)

        trainer.save_checkpoint = then_die

    def _break_pruning(self, trainer) -> None:
        remove = trainer.strategy.remove_checkpoint

        def die_first(path):
            self._die(trainer)
            remove(path)

        trainer.strategy.remove_checkpoint = die_first

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.where == "on_train_batch_start":
            self._die(trainer)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self.where == "on_train_batch_end":
            self._die(trainer)

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        if self.where == "on_validation_batch_end":
            self._die(trainer)

    def on_train_epoch_end(self, trainer, pl_module):
        if self.where == "on_train_epoch_end":
            self._die(trainer)


# ---- what a run left ----


def checkpoint(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def metrics(folder: Path, logs: str = "logs", timings: bool = False) -> dict[tuple[int, str], str]:
    """{(step, metric): value as written}, of all that the parts of a run logged; what a later part says counts.

    Args:
        folder: of the run.
        logs: folder in it.
        timings: also what no two runs have alike.
    """
    found = {}
    files = folder.glob(f"{logs}/version_*/metrics.csv")
    for file in sorted(files, key=lambda file: int(file.parent.name.removeprefix("version_"))):
        with file.open() as lines:
            for row in csv.DictReader(lines):
                found |= {
                    (int(row["step"]), name): value
                    for name, value in row.items()
                    if value != "" and name != "step" and (timings or not name.startswith(TIMINGS))
                }
    return found


def data_order(folder: Path) -> list[Any]:
    """Prompts and completions of every step; steps that were done twice count once."""
    lines = [json.loads(line) for line in (folder / "order.jsonl").read_text().splitlines()]
    return list({step: [step, *rest] for step, *rest in lines}.values())
