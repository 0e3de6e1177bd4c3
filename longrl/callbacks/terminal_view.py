"""What whoever started `fit` sees of it: a screen that follows the run, or a line every few steps."""

from __future__ import annotations

import collections
import contextlib
import logging
import os
import statistics
import sys
import time
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.text import Text
from typing_extensions import override

from longrl.callbacks.evaluation_bar import EvaluationBar, batch_count, metrics_line
from longrl.callbacks.live_display import LiveDisplay
from longrl.callbacks.run_watch import RunWatch
from longrl.evaluation.screen import BUSY, Progress, Sample, plain_line, sample_lines, screen
from longrl.io.pulse import PULSE
from longrl.io.stop_signals import current_signals
from longrl.modules.trained import TrainedModule
from longrl.turns import turns_text

logger = logging.getLogger(__name__)

LINE_EVERY = 10
"""Steps between two lines at the most, in a run that logs less often."""
ViewMode = Literal["auto", "live", "plain"]
SPEED_OF = 20
"""Steps whose median is the speed: one that validates or saves does not count."""
PHASES = ("data", "encode", "sync", "generate", "reward", "teacher", "update")
SHOWN_PHASES = (*PHASES, "decode", "save")
"""What a run may be in when it is looked at."""


class TerminalView(ProgressBar):
    """Shows phases, curves, speed, time left, alerts and the last sample.

    Args:
        mode: `live` draws a screen, `plain` writes lines, for logs; `auto` is live where the output is a terminal.
        every_n_steps: optimizer steps between two plain lines; None writes one for each step that is logged
            (`trainer.log_every_n_steps`), and at least one every 10 steps.
        console: where it is drawn; None is the standard output.
    """

    def __init__(
        self,
        mode: ViewMode = "auto",
        every_n_steps: int | None = None,
        console: Console | None = None,
    ) -> None:
        super().__init__()
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"every_n_steps of TerminalView must be at least 1, got {every_n_steps}")
        self.mode = mode
        self.every_n_steps = every_n_steps
        self._console = console
        self._is_enabled = True
        self._display: LiveDisplay | None = None
        self._watch: RunWatch | None = None
        self._run = ""
        self._step = 0
        self._total: int | None = None
        self._phases: dict[str, float] = {}
        self._rollouts: dict[str, float] = {}
        self._tokens_per_s: float | None = None
        self._seconds: collections.deque[float] = collections.deque(maxlen=SPEED_OF)
        self._end_of_last = 0.0
        self._sample: Sample | None = None
        self._bar: EvaluationBar | None = None
        """Of a command that does not train."""
        self._evaluated = ""
        """How far a validation under way is."""

    # -- what Lightning's bars have ------------------------------------------------------------------------------

    @override
    def disable(self) -> None:
        self._is_enabled = False

    @override
    def enable(self) -> None:
        self._is_enabled = True

    @override
    def print(self, *args: Any, **kwargs: Any) -> None:
        """Writes above the screen, which has taken the place of the standard output."""
        text = " ".join(map(str, args))
        _write_line(text)

    # -- hooks ---------------------------------------------------------------------------------------------------

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, TrainedModule)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]  # Lightning does not declare it
            if isinstance(callback, RunWatch):
                self._watch = callback
        self._run = str(trainer.default_root_dir)
        self._step = trainer.global_step
        self._total = total_steps(trainer, pl_module)
        self._end_of_last = time.perf_counter()
        if self.every_n_steps is None:
            logged_every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # Lightning does not declare it
            self.every_n_steps = min(logged_every, LINE_EVERY) or LINE_EVERY
        if self._is_enabled:
            logger.info("%s", start_line(trainer, self._total))
        if self._is_enabled and self._is_live():
            self._display = LiveDisplay(self._picture, self._console)
            self._display.start()

    def _is_live(self) -> bool:
        if self.mode != "auto":
            return self.mode == "live"
        is_dumb = os.environ.get("TERM", "") in ("", "dumb")
        return sys.stdout is not None and sys.stdout.isatty() and not is_dumb

    @override
    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if not self._is_enabled:
            return
        now = time.perf_counter()
        before = self._step
        self._step = trainer.global_step
        if self._step > before:
            seconds = now - self._end_of_last
            self._seconds.append(seconds / (self._step - before))
        self._end_of_last = now
        self._read(trainer, batch)
        is_first = before == 0
        if is_first and self._step > before and self._sample is not None:
            self._write_sample(self._sample)
        if self._display is not None:
            return
        every = self.every_n_steps or LINE_EVERY
        is_last = self._total is not None and self._step >= self._total
        if self._step > before and (is_first or is_last or self._step // every > before // every):
            _write_line(plain_line(self.progress()))

    def _write_sample(self, sample: Sample) -> None:
        """The first completion, in words: whether prompt and format are as meant shows before hours have passed."""
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        _write_line("\n".join(sample_lines(sample, encoding)))

    def _read(self, trainer: Trainer, batch: Any) -> None:
        """Takes over what this step logged, and a sample of it."""
        metrics = trainer.callback_metrics
        phases = {}
        for name in PHASES:
            value = metrics.get(f"time/{name}")
            if value is not None:
                phases[name] = float(value)
        self._phases = phases
        self._rollouts = {name: float(metrics[name]) for name in BUSY if name in metrics}
        speed = metrics.get("throughput/tokens_per_s")
        self._tokens_per_s = None if speed is None else float(speed)
        self._sample = first_sample(batch) or self._sample

    @override
    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        total = batch_count(trainer.num_val_batches)
        self._evaluated = f"validation {batch_idx + 1}" + (f"/{total}" if total else "")

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._evaluated = ""
        self._end_of_last = time.perf_counter()
        if self._bar is not None:
            self._stop_bar(trainer, "val/")
        elif self._is_enabled and trainer.state.fn == "fit" and not trainer.sanity_checking:
            start = f"validation at step {trainer.global_step}"
            _write_line(metrics_line(start, _metrics_of(trainer, "val/")))

    # -- commands that do not train ------------------------------------------------------------------------------

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "validate":
            self._start_bar("validation", batch_count(trainer.num_val_batches))

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start_bar("test", batch_count(trainer.num_test_batches))

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start_bar("predict", batch_count(trainer.num_predict_batches))

    @override
    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.advance()

    @override
    def on_test_batch_end(self, *args: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.advance()

    @override
    def on_predict_batch_end(self, *args: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.advance()

    @override
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop_bar(trainer, "test/")

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop_bar(trainer, "predict/")

    def _start_bar(self, name: str, total: int | None) -> None:
        if self._is_enabled:
            self._bar = EvaluationBar(name, total, self._is_live(), _write_line, self._console)

    def _stop_bar(self, trainer: Trainer, prefix: str) -> None:
        if self._bar is not None:
            bar = self._bar
            self._bar = None
            bar.stop(_metrics_of(trainer, prefix))

    # -- the end -------------------------------------------------------------------------------------------------

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._bar is not None:
            bar = self._bar
            self._bar = None
            bar.stop()
        if self._display is None:
            return
        display = self._display
        self._display = None
        with contextlib.suppress(OSError):  # the terminal is gone
            display.draw()
        display.stop()

    # -- what is shown -------------------------------------------------------------------------------------------

    def progress(self) -> Progress:
        """Where the run is now."""
        phase = PULSE.phase
        if phase not in SHOWN_PHASES:
            phase = ""
        phase_s = time.perf_counter() - PULSE.since if phase else 0.0
        watch = self._watch
        signals = current_signals()
        return Progress(
            run=self._run,
            step=self._step,
            total=self._total,
            step_s=statistics.median(self._seconds) if self._seconds else None,
            tokens_per_s=self._tokens_per_s,
            phase=" ".join(filter(None, (self._evaluated, phase))),
            phase_s=phase_s,
            phases=self._phases,
            rollouts=self._rollouts,
            curves=dict(watch.curves) if watch else {},
            alerts=watch.alerts.active if watch else (),
            sample=self._sample,
            notice=signals.notice if signals else "",
        )

    def _picture(self, console: Console) -> Text:
        width, height = console.size
        # A line less than there are: the cursor stands in one.
        return screen(self.progress(), width, height - 1, console.encoding)


def start_line(trainer: Trainer, total: int | None) -> str:
    """What begins: steps, devices, precision, and where everything goes."""
    first = f"from step {trainer.global_step} " if trainer.global_step else ""
    steps = f"{total} steps" if total is not None else "without end"
    kind = trainer.strategy.root_device.type
    devices = f"{trainer.world_size} x {kind}" if trainer.world_size > 1 else kind
    return (
        f"training {first}on {devices} in {trainer.precision}: {steps}, everything goes to {trainer.default_root_dir}"
    )


def _metrics_of(trainer: Trainer, prefix: str) -> dict[str, float]:
    return {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith(prefix)}


def total_steps(trainer: Trainer, module: TrainedModule) -> int | None:
    """Optimizer steps of a whole run; None where it has no end."""
    ends = []
    if trainer.max_steps > 0:
        ends.append(trainer.max_steps)
    max_epochs = trainer.max_epochs or -1
    num_batches = trainer.num_training_batches
    if max_epochs > 0 and num_batches != float("inf"):
        steps_per_batch = module.steps_per_rollout if module.is_rl() else 1
        ends.append(int(num_batches) * max_epochs * steps_per_batch)
    return min(ends, default=None)


def first_sample(batch: Any) -> Sample | None:
    """The first completion of a batch; None where there are none, or none in words."""
    groups = getattr(batch, "groups", None)
    if not groups:
        return None
    group = groups[0]
    completion = group.completions[0]
    text = getattr(completion, "text", None)
    if text is None:  # a picture
        return None
    if getattr(completion, "turns", ()):
        text = turns_text(completion.turns)
    prompt = group.prompt
    reward = float(group.rewards[0])
    return Sample(prompt.id, prompt.row.problem, text, reward)


def _write_line(text: str) -> None:
    """One line on the standard output, wherever that leads; a reader that is gone does not end a run."""
    if sys.stdout is None:
        return
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    line = text.encode(encoding, "replace").decode(encoding)
    try:
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()
    except (OSError, ValueError):
        # What is left in the buffer would fail once more when Python ends, with a status of its own.
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
