"""Base of the policies' LightningModules: builds and shards a model, steps its optimizer, resumes, logs means."""

from __future__ import annotations

import abc
import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import Optimizer
from typing_extensions import override

from longrl.algorithms import Algorithm
from longrl.datamodules.loading.data_module import StreamedData
from longrl.models.ema import EMAWeights
from longrl.models.lora import LoRASettings, adapters_off, check_resumed, refuse_dropout, to_checkpoint
from longrl.modules.coefficients import Coefficients, coefficient_metrics
from longrl.modules.host_adamw import offload_state
from longrl.modules.initial_weights import check_resumed_weights
from longrl.modules.metric_means import MetricMeans
from longrl.modules.mini_batches import FlatGroups, MiniBatch
from longrl.modules.moving_reference import (
    check_reference,
    complete,
    has_reference,
    holds_reference,
    moving_reference_of,
    refuse_lost_reference,
    swapped,
)
from longrl.modules.optimizer import OptimizerSettings, fuse_by_device
from longrl.modules.phase_times import PhaseTimes
from longrl.modules.skipped_steps import SkippedSteps, StepRecord, tell_nonfinite
from longrl.modules.step_statistics import advantage_metrics, advantage_sums, gradient_norms
from longrl.modules.task_deviations import TaskDeviations
from longrl.strategies.fsdp import RootModule, ShardableFamily, move_unsharded
from longrl.strategies.parallel import Parallel, ParallelModule
from longrl.types import Metrics, to_device

if TYPE_CHECKING:
    from longrl.datamodules.longvideo_reason import LongVideoReason


PRECISIONS = ("32-true", "bf16-mixed")
"""Of Lightning's the two that change neither losses nor batches. 16-mixed scales losses, and gradients would be clipped
before they are scaled back; the others convert all numbers of a batch, log-probabilities and advantages included."""


class TrainableFamily(ShardableFamily, Protocol):
    """A family of language or of diffusion models, with adapters or without."""

    @property
    def lora(self) -> LoRASettings | None:
        """The adapters that train, if they are all that trains."""

    def model_parts(self, model: nn.Module) -> Mapping[str, Sequence[nn.Module]]:
        """Parts whose gradients are measured apart."""


class TrainedModule(ParallelModule, abc.ABC):
    """A model family under manual optimization; subclasses say how it is built and what a step is.

    Args:
        family: the model.
        algorithm: the RL objective.
        optimizer: AdamW and its schedule.
        init_from: initial weights, also the reference policy.
        mini_batches_per_rollout: optimizer steps one rollout is cut into.
        epochs_per_rollout: how often a rollout is gone through.
        max_grad_norm: gradient norm limit; 0 switches it off.
        max_nonfinite_steps: so many optimizer steps in a row whose loss or gradient norm is not finite end the run.
    """

    family: TrainableFamily
    model: nn.Module
    """The model once `configure_model` has run. Its names are those of checkpoints, and beside it there are averages
    alone: a moving reference, and of a diffusion model the EMA."""
    policy: RootModule
    """Scores with the model's weights; the root of their shards."""
    reference: RootModule | None
    """The policy that the run began with, if it is compared with; neither saved nor trained. Or the policy itself,
    which computes as its reference within `reference_weights`."""
    moving_reference: EMAWeights | None
    """The reference's numbers of what trains, if it moves, once there are weights; saved in checkpoints."""
    _first_reference: EMAWeights | None
    """The same, also while a checkpoint without one is read."""

    def __init__(
        self,
        family: TrainableFamily,
        algorithm: Algorithm | None,
        optimizer: OptimizerSettings | None,
        init_from: str | None,
        mini_batches_per_rollout: int,
        epochs_per_rollout: int,
        max_grad_norm: float,
        max_nonfinite_steps: int,
    ) -> None:
        super().__init__()
        if not max_grad_norm >= 0:
            raise ValueError(f"model.max_grad_norm must be at least 0, got {max_grad_norm}; 0 switches clipping off")
        self.automatic_optimization = False
        self.family = family
        self.algorithm = algorithm or Algorithm()
        """The objective of this rollout: with the coefficients that it has."""
        self.coefficients = Coefficients(self.algorithm)
        self.task_deviations = TaskDeviations(self.algorithm.task_decay)
        self.moving_reference = None
        self.optimizer_settings = optimizer or OptimizerSettings()
        self.init_from = init_from
        self.mini_batches_per_rollout = mini_batches_per_rollout
        self.epochs_per_rollout = epochs_per_rollout
        self.steps_per_rollout = mini_batches_per_rollout * epochs_per_rollout
        """Optimizer steps on one rollout."""
        self.max_grad_norm = max_grad_norm
        self.skipped_steps = SkippedSteps(max_nonfinite_steps)
        self.phases = PhaseTimes()
        self.parallel = Parallel()
        self.is_built = False
        """True once there are weights."""
        self.has_signal = False
        """True once some advantage was not zero; the rollout callback asks after each step."""
        self.num_weighed = 0
        """Completions of the last rollout that are in the loss, on all ranks."""
        self._eval_means = MetricMeans()
        self._keep_unregistered("reference", None)

    # -- what a subclass says ------------------------------------------------------------------------------------

    @abc.abstractmethod
    def is_rl(self) -> bool:
        """True if batches are rolled out."""

    @property
    def rollouts_need_reference(self) -> bool:
        """True if RL reads the log-probabilities of a reference policy."""
        return self.algorithm.kl_coef > 0

    def needs_reference(self) -> bool:
        """True if the policy that the run began with is scored beside the one being trained."""
        return self.is_rl() and self.rollouts_need_reference

    @abc.abstractmethod
    def build_model(self) -> nn.Module:
        """The model with its initial weights, and adapters if it is to have any, on the CPU."""

    @abc.abstractmethod
    def update_policy(self, batch: Any) -> Metrics:
        """Takes the optimizer steps on a batch; returns their metrics, none without a step."""

    # -- building ------------------------------------------------------------------------------------------------

    @override
    def setup(self, stage: str) -> None:
        """Refuses what would train wrongly; Lightning calls it before weights are loaded."""
        if self.trainer.precision not in PRECISIONS:
            raise ValueError(
                f"trainer.precision must be {' or '.join(PRECISIONS)}, got {self.trainer.precision}; set it to "
                "bf16-mixed to compute in bfloat16, or to 32-true with model.family.init_args.dtype=bfloat16 to have "
                "the weights in it, too"
            )
        if self.trainer.world_size > 1 and self.parallel.world.size == 1:
            raise ValueError(
                f"{self.trainer.world_size} devices need a strategy that shares the work exactly, got "
                f"{type(self.trainer.strategy).__name__}; set trainer.strategy to "
                "longrl.strategies.mr_sp.MRSPStrategy, or trainer.devices to 1"
            )
        if stage == "fit":
            check_reference(self.algorithm.moving_reference, self.needs_reference())
        if stage == "fit" and self.is_rl():
            refuse_dropout(self.family.lora)

    @override
    def configure_model(self) -> None:
        if self.is_built:
            return
        self.model = self.build_model()
        self._keep_unregistered("policy", self.parallel.wrap(self.family, self.model))
        self.moving_reference = moving_reference_of(self.model, self.algorithm.moving_reference)
        object.__setattr__(self, "_first_reference", self.moving_reference)
        self.is_built = True

    @override
    def on_fit_start(self) -> None:
        if self.needs_reference():
            self._keep_unregistered("reference", self._make_reference())
        self.model.train()

    def _make_reference(self) -> RootModule:
        """The weights of the policy that the run began with.

        With adapters they are the policy's own, for scoring switches the adapters off (`adapters_off`): `init_from`
        was merged into frozen weights, and the adapters began at zero. So have those of a moving reference, which
        change places with the policy's. Else they are a second model.
        """
        if self.family.lora is not None or self.algorithm.moving_reference is not None:
            return self.policy
        model = self.build_model().eval().requires_grad_(False)
        reference = self.parallel.wrap(self.family, model)
        move_unsharded(model, self.device)
        return reference

    @contextlib.contextmanager
    def reference_weights(self) -> Iterator[None]:
        """Inside, `reference` computes as the reference policy, whether it has a model of its own or not.

        Every rank of the run must enter, and nobody may score with the policy meanwhile.
        """
        assert self.reference is not None
        weights: contextlib.AbstractContextManager[None] = adapters_off(self.family, self.reference.model)
        if self.moving_reference is not None:
            weights = swapped(self.moving_reference, self.policy)
        with weights:
            yield
            self.reference.release_root()

    def _keep_unregistered(self, name: str, module: RootModule | None) -> None:
        """Sets an attribute past nn.Module: as a submodule it would be in checkpoints, under names of its own."""
        object.__setattr__(self, name, module)

    @override
    def on_train_start(self) -> None:
        """Only now have weights and optimizer been restored."""
        optimizer = self.optimizers(use_pl_optimizer=False)
        assert isinstance(optimizer, Optimizer)
        offload_state(optimizer)
        fuse_by_device(optimizer)

    @override
    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        settings = self.optimizer_settings
        steps_per_batch = self.steps_per_rollout if self.is_rl() else 1
        total_steps = settings.end(self.trainer, steps_per_batch)
        return settings.build(self.model, total_steps)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["lora"] = to_checkpoint(self.family.lora)
        checkpoint["skipped_steps"] = self.skipped_steps.state_dict()
        for name, state in (("coefficients", self.coefficients), ("task_deviations", self.task_deviations)):
            values = state.state_dict()
            if values:
                checkpoint[name] = values

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_resumed(self.family.lora, checkpoint)
        path = str(self.trainer.ckpt_path)
        check_resumed_weights(self.state_dict(), checkpoint, path)
        self.skipped_steps.load_state_dict(checkpoint.get("skipped_steps", {}))
        self.coefficients.load_state_dict(checkpoint.get("coefficients", {}))
        self.algorithm = self.coefficients.of(self.algorithm)
        self.task_deviations.load_state_dict(checkpoint.get("task_deviations", {}))
        state = checkpoint.get("state_dict", {})  # MRSPStrategy has read the weights already: `before_load`
        if self.algorithm.moving_reference is None and has_reference(state):
            refuse_lost_reference(path)
        self.moving_reference = self._first_reference  # which `before_load` has taken away
        if state and not has_reference(state):
            complete(state, self.state_dict())

    @override
    def before_load(self, checkpoint: Path) -> None:
        """Makes the module's names those of a checkpoint of ranks: one of a fixed reference has no moved one."""
        is_there = holds_reference(checkpoint)
        if is_there and self.algorithm.moving_reference is None:
            refuse_lost_reference(str(checkpoint))
        if not is_there:
            self.moving_reference = None

    # -- steps ---------------------------------------------------------------------------------------------------

    @override
    def training_step(self, batch: Any, batch_idx: int) -> None:
        """The optimizer steps on a batch, their metrics under `train/`, and the loss on the progress bar."""
        with self.phases("update"):
            metrics = self.update_policy(batch)
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(data, StreamedData):
            self.log_dict(data.metrics(), batch_size=1)
            if counts := data.counts():
                self.log_dict(self.parallel.world.sum_dict(counts), batch_size=1)
        if metrics:
            if getattr(batch, "groups", None) is not None:
                metrics |= self._follow(metrics)
            named = {f"train/{name}": value for name, value in metrics.items()}
            named["train/nonfinite_steps"] = float(self.skipped_steps.count)
            self.log_dict(named, batch_size=1)
            self.log("loss", metrics["loss"], prog_bar=True, logger=False, batch_size=1)

    def optimizer_step_clipped(self, loss: float, record: Callable[[], StepRecord]) -> Metrics:
        """Clips the summed gradients and takes the step, unless a number is not finite.

        Args:
            loss: the sum over all ranks.
            record: makes the record of this rank's part of a step that is left out.

        Returns:
            The norm the gradients had, in all and by part of the model, and the rate of the step.

        Raises:
            RuntimeError: the last of `max_nonfinite_steps` steps in a row was left out.
        """
        optimizer = self.optimizers()
        scheduler = self.lr_schedulers()
        assert isinstance(optimizer, LightningOptimizer)
        assert isinstance(scheduler, LRScheduler)

        # 1. One norm over all shards of all gradients.
        parts = self.family.model_parts(self.model)
        norm, norms = gradient_norms(self.model, parts)

        # 2. Loss and norm are the same on all ranks, and so is what follows from them. (There is no GradScaler, whose
        #    own way to leave steps out would have to be told apart: `setup` refuses 16-mixed.)
        lr = optimizer.param_groups[0]["lr"]
        grad_norm = norms["grad_norm"]
        metrics = {"grad_norm": grad_norm, "lr": lr, **norms}
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            optimizer.zero_grad()
            facts = {
                "global_step": self.global_step,
                "rank": self.global_rank,
                "loss": loss,
                "grad_norm": grad_norm,
                **coefficient_metrics(self.algorithm),
            }
            folder = Path(self.trainer.default_root_dir)
            self.skipped_steps.add(folder, record, facts)
            return metrics
        self.skipped_steps.in_a_row = 0

        # 3. Clip; without a limit the factor is 1 exactly.
        limit = self.max_grad_norm or math.inf
        nn.utils.clip_grads_with_norm_(self.model.parameters(), limit, norm)

        # 4. Step; the rate logged is the one that this step had.
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if self.moving_reference is not None:
            self.moving_reference.update(self.global_step)
        return metrics

    def deviations_of(self, flat: FlatGroups[Any, Any]) -> Tensor | None:
        """[P] deviation of the rewards of each group's task, this rollout's included; None if the algorithm reads none.

        Every rank must call it, once for each rollout.
        """
        tasks = [group.prompt.row.task for group in flat.groups]
        deviations = self.task_deviations.follow(tasks, flat.rewards, flat.valid, self.parallel.dp)
        return None if deviations is None else to_device(deviations, flat.rewards.device)

    def _follow(self, metrics: Metrics) -> Metrics:
        """Moves what follows the rollouts; returns the metrics of the coefficients that this one had."""
        had = coefficient_metrics(self.algorithm) | self.task_deviations.metrics()
        self.coefficients.follow(metrics, self.num_weighed)
        self.algorithm = self.coefficients.of(self.algorithm)
        return had

    def watch_batches(self, mini_batches: Sequence[MiniBatch[Any, Any]]) -> Metrics:
        """Notes whether a rollout had anything to learn from, and how: advantages, completions that are in no loss.

        Every rank must call it, behind the updates, for here a GPU is waited for.
        """
        advantages = torch.cat([part.advantages for part in mini_batches])
        left_out = torch.cat([part.nonfinite for part in mini_batches])
        local = advantage_sums(advantages)
        self.has_signal |= local["zeros"] < local["count"]
        local["left_out"] = float(left_out.sum())
        local["weighed"] = float(sum((part.weights > 0).sum() for part in mini_batches))
        sums = self.parallel.dp.sum_dict(local)
        self.num_weighed = int(sums["weighed"])
        count = sums["left_out"]
        if count:
            tell_nonfinite(mini_batches, count)
        metrics = advantage_metrics(sums)
        metrics["nonfinite_completions"] = count
        return metrics

    # -- evaluation ----------------------------------------------------------------------------------------------

    @override
    def on_validation_epoch_end(self) -> None:
        for name, mean in self._eval_means.collect(self.parallel.dp).items():
            # The same on all ranks already, which Lightning cannot know: without `sync_dist` it warns of every name.
            self.log(name, mean, prog_bar=name.endswith("/accuracy"), sync_dist=True)

    on_test_epoch_end = on_validation_epoch_end


def data_module_of(trainer: Trainer) -> LongVideoReason:
    """The run's data module, which Lightning attaches to the trainer without declaring it."""
    return trainer.datamodule  # type: ignore[attr-defined]
