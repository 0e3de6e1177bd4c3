"""What every policy's LightningModule does alike: build and shard a model, step its optimizer, resume, log means."""

from __future__ import annotations

import abc
from typing import Any

from lightning.pytorch import LightningModule
from torch import nn
from typing_extensions import override

from longrl.algorithms import Algorithm
from longrl.models.lora import check_resumed, refuse_dropout, to_checkpoint
from longrl.modules.means import Means
from longrl.modules.optimizer import OptimizerSettings, clip_gradients, offload_state
from longrl.modules.phases import PhaseTimes
from longrl.strategies.fsdp import Entry
from longrl.strategies.parallel import Parallel


class TrainedModule(LightningModule, abc.ABC):
    """A model family under manual optimization; subclasses say how it is built and what a step is.

    Args:
        family: the model.
        algorithm: the RL objective.
        optimizer: AdamW and its schedule.
        init_from: initial weights, also the reference policy.
        mini_batches_per_rollout: optimizer steps one rollout is cut into.
        epochs_per_rollout: how often a rollout is gone through.
        max_grad_norm: gradient norm limit; 0 switches it off.
    """

    def __init__(
        self,
        family: Any,
        algorithm: Algorithm | None,
        optimizer: OptimizerSettings | None,
        init_from: str | None,
        mini_batches_per_rollout: int,
        epochs_per_rollout: int,
        max_grad_norm: float,
    ) -> None:
        super().__init__()
        if max_grad_norm < 0:
            raise ValueError(f"model.max_grad_norm must be at least 0, got {max_grad_norm}; 0 switches clipping off")
        self.automatic_optimization = False
        self.family = family
        self.algorithm = algorithm or Algorithm()
        self.optimizer_settings = optimizer or OptimizerSettings()
        self.init_from = init_from
        self.mini_batches_per_rollout = mini_batches_per_rollout
        self.epochs_per_rollout = epochs_per_rollout
        self.max_grad_norm = max_grad_norm
        self.phases = PhaseTimes()
        self._evaluated = Means()
        self.model: nn.Module | None = None
        self.parallel = Parallel()  # a strategy sets another before weights are loaded
        # Tuples, so that these are no submodules: not saved, not trained, and the model's names stay as they are.
        self._entry: tuple[Entry, ...] = ()
        self._reference: tuple[Entry, ...] = ()

    # -- what a subclass says ------------------------------------------------------------------------------------

    @abc.abstractmethod
    def is_rl(self) -> bool:
        """Whether batches are rolled out."""

    @abc.abstractmethod
    def build_model(self) -> nn.Module:
        """The model with its initial weights, and adapters if it is to have any, on the CPU."""

    # -- building ------------------------------------------------------------------------------------------------

    @override
    def setup(self, stage: str) -> None:
        """Refuses what would train wrongly; Lightning calls it before weights are loaded."""
        if self.trainer.precision == "16-mixed":
            raise ValueError(
                "trainer.precision=16-mixed scales losses, and gradients would be clipped before they are scaled back; "
                "set it to bf16-mixed, or to 32-true with model.family.init_args.dtype=bfloat16"
            )
        if self.trainer.world_size > 1 and self.parallel.world.size == 1:
            raise ValueError(
                f"{self.trainer.world_size} devices need a strategy that shares the work exactly, got "
                f"{type(self.trainer.strategy).__name__}; set trainer.strategy to "
                "longrl.strategies.mr_sp.MRSPStrategy, or trainer.devices to 1"
            )
        if stage == "fit" and self.is_rl():
            refuse_dropout(self.family.lora)

    @override
    def configure_model(self) -> None:
        if self.model is None:
            self.model = self.build_model()
            self._entry = (self.parallel.wrap(self.family, self.model),)

    @override
    def on_fit_start(self) -> None:
        if self.algorithm.kl_coef > 0 and self.is_rl():
            self._reference = (self._make_reference(),)
        self.model.train()

    def _make_reference(self) -> Entry:
        """The door to the reference's weights: those of the policy that the run began with.

        With adapters those are the policy's own, for scoring switches the adapters off (`adapters_off`): `init_from`
        was merged into frozen weights, and the adapters began at zero. Else they are a second model.
        """
        if self.family.lora is not None:
            return self.entry
        reference = self.build_model().eval().requires_grad_(False)
        entry = self.parallel.wrap(self.family, reference)
        reference.to(self.device)
        return entry

    @override
    def on_train_start(self) -> None:
        """Only now have weights and optimizer been restored."""
        offload_state(self.optimizers(use_pl_optimizer=False))

    @override
    def configure_optimizers(self) -> dict[str, Any]:
        settings, per_batch = self.optimizer_settings, self.steps_per_rollout if self.is_rl() else 1
        return settings.build(self.model, settings.end(self.trainer, per_batch))

    @property
    def steps_per_rollout(self) -> int:
        """Optimizer steps on one rollout."""
        return self.mini_batches_per_rollout * self.epochs_per_rollout

    @property
    def entry(self) -> Entry:
        """The door to the policy's weights."""
        return self._entry[0]

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["lora"] = to_checkpoint(self.family.lora)

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_resumed(self.family.lora, checkpoint)

    # -- steps ---------------------------------------------------------------------------------------------------

    def optimizer_step_clipped(self) -> dict[str, float]:
        """Clips the summed gradients and takes the step."""
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        grad_norm = clip_gradients(self.model.parameters(), self.max_grad_norm or float("inf"))
        lr = optimizer.param_groups[0]["lr"]
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        return {"grad_norm": grad_norm, "lr": lr}

    def log_step(self, metrics: dict[str, float]) -> None:
        """Logs the metrics of a step under `train/`, and its loss on the progress bar."""
        self.log_dict({f"train/{name}": value for name, value in metrics.items()}, prog_bar=False, batch_size=1)
        self.log("loss", metrics["loss"], prog_bar=True, logger=False, batch_size=1)

    # -- evaluation ----------------------------------------------------------------------------------------------

    def _log_evaluated(self) -> None:
        for name, mean in self._evaluated.collect(self.parallel.dp).items():
            # The same on all ranks already, which Lightning cannot know: without `sync_dist` it warns of every name.
            self.log(name, mean, prog_bar=name.endswith("/accuracy"), sync_dist=True)

    @override
    def on_validation_epoch_end(self) -> None:
        self._log_evaluated()

    @override
    def on_test_epoch_end(self) -> None:
        self._log_evaluated()
