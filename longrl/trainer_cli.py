"""fit, validate, test and predict on LightningCLI: what longrl adds to its parser and its trainer."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, Logger
from typing_extensions import override

from longrl.callbacks.checkpoint import AtomicCheckpointIO, Checkpoint
from longrl.callbacks.random_state import RandomState
from longrl.datamodules.longvideo_reason import LongVideoReason
from longrl.modules.policy import PolicyModule

WandbMode = Literal["off", "offline", "online"]


class SaveRunConfig(SaveConfigCallback):
    """Writes the composed config of a training run to `run_dir/config.yaml`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "save_to_log_dir": False})

    @override
    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            path = Path(trainer.default_root_dir) / "config.yaml"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(self.parser.dump(self.config, skip_none=False))


class LongRLCLI(LightningCLI):
    """`run_dir` decides where a run leaves everything: config, checkpoints, logs, samples."""

    @classmethod
    def run(cls, args: Sequence[str]) -> LongRLCLI:
        """Parses `args`, the command first, and runs it."""
        return cls(
            PolicyModule,
            LongVideoReason,
            save_config_callback=SaveRunConfig,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            args=None if list(args) == sys.argv[1:] else list(args),
        )

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--run_dir", type=str, default="runs/default", help="folder of everything a run leaves")
        parser.add_argument("--wandb", type=WandbMode, default="off", help="log to Weights & Biases as well")
        parser.add_argument("--wandb_project", type=str, default="longrl")
        parser.add_lightning_class_args(Checkpoint, "checkpoint")
        parser.set_defaults({"checkpoint.save_last": True, "checkpoint.save_top_k": 0})
        # Without a counter `last.ckpt` is always the last one, also in a run that was moved or started anew.
        parser.set_defaults({"checkpoint.every_n_train_steps": 50, "checkpoint.enable_version_counter": False})
        parser.link_arguments("run_dir", "trainer.default_root_dir")
        parser.link_arguments("run_dir", "checkpoint.dirpath", compute_fn=checkpoint_folder)
        parser.link_arguments("model.family", "data.family", apply_on="instantiate")

    @override
    def before_instantiate_classes(self) -> None:
        trainer = self._get(self.config, "trainer")
        by_batch = "data.prompts_per_batch and model.max_tokens_per_micro_batch"
        remedies = {"gradient_clip_val": (0, "model.max_grad_norm"), "accumulate_grad_batches": (1, by_batch)}
        for name, (neutral, instead) in remedies.items():
            if trainer.get(name) not in (None, neutral):
                raise ValueError(
                    f"trainer.{name}={trainer.get(name)} has no effect, for longrl optimizes manually; "
                    f"set {instead} instead"
                )

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        if self._get(self.config_init, "trainer.logger", True) in (None, True):
            kwargs.setdefault("logger", self._loggers())
        kwargs.setdefault("plugins", [*(self._get(self.config_init, "trainer.plugins") or []), AtomicCheckpointIO()])
        trainer = super().instantiate_trainer(**kwargs)
        trainer.callbacks.append(RandomState())
        return trainer

    def _loggers(self) -> list[Logger]:
        run_dir, mode = self._get(self.config_init, "run_dir"), self._get(self.config_init, "wandb")
        loggers: list[Logger] = [CSVLogger(run_dir, name="logs", flush_logs_every_n_steps=1)]
        if mode != "off":
            from lightning.pytorch.loggers import WandbLogger

            project = self._get(self.config_init, "wandb_project")
            Path(run_dir).mkdir(parents=True, exist_ok=True)
            loggers.append(
                WandbLogger(project=project, name=Path(run_dir).name, save_dir=run_dir, offline=mode == "offline")
            )
        return loggers


def checkpoint_folder(run_dir: str) -> str:
    """Where a run keeps its checkpoints."""
    return str(Path(run_dir) / "checkpoints")
