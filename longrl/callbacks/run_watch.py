"""Follows a run's metrics: curves for whoever looks on, and alerts once something goes wrong."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from typing_extensions import override

from longrl.evaluation.alerts import REWARD, Alert, AlertWatch
from longrl.evaluation.sparklines import Curve

logger = logging.getLogger(__name__)

CURVES = (
    REWARD,
    "train/loss",
    "train/kl_ref",
    "train/entropy",
    "rollout/completion_tokens",
    "rollout/cut_off",
    "train/mismatch_mean",
    "train/grad_norm",
)
"""Metrics whose curves are kept, in the order in which they are shown."""


class RunWatch(Callback):
    """Keeps thinned curves, and warns once of each alert: in the log, and of an online run in W&B too.

    Curves and alerts are in checkpoints, so that a resumed run knows its start. `fit` adds one by itself, behind all
    callbacks that log.

    Args:
        ignore: alerts that are not told, such as "truncation"; docs/watching_runs.md has their names.
    """

    def __init__(self, ignore: Sequence[str] = ()) -> None:
        self.alerts = AlertWatch(ignore)
        self.curves: dict[str, Curve] = {}
        self._step = 0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step

    @override
    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        step = trainer.global_step
        # A batch without a step has the metrics of the one before.
        if step == self._step or not trainer.is_global_zero:
            return
        self._step = step
        metrics = self._watched(trainer)
        for name in CURVES:
            if name in metrics and math.isfinite(metrics[name]):
                curve = self.curves.setdefault(name, Curve())
                curve.add(metrics[name])
        for alert in self.alerts.update(step, metrics):
            tell(alert, trainer)

    def _watched(self, trainer: Trainer) -> dict[str, float]:
        """Those metrics alone that are kept or judged: on a GPU each costs a copy."""
        watched = {}
        for name, value in trainer.callback_metrics.items():
            if name in CURVES or self.alerts.reads(name):
                watched[name] = float(value)
        return watched

    @override
    def state_dict(self) -> dict[str, Any]:
        curves = {}
        for name, curve in self.curves.items():
            curves[name] = curve.state_dict()
        return {"curves": curves, "alerts": self.alerts.state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.alerts.load_state_dict(state_dict["alerts"])
        self.curves = {}
        for name, state in state_dict["curves"].items():
            self.curves[name] = Curve()
            self.curves[name].load_state_dict(state)


def tell(alert: Alert, trainer: Trainer) -> None:
    """Logs an alert, and sends it where W&B can send mails."""
    logger.warning("%s", alert)
    for one in trainer.loggers:
        if isinstance(one, WandbLogger) and not one.experiment.offline:
            one.experiment.alert(alert.rule.name, str(alert), level="WARN")
