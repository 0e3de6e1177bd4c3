"""What a training run shows of itself while it goes on: a screen for terminals, one line for everything else."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rich.cells import cell_len, set_cell_size
from rich.text import Text

from longrl.evaluation.alerts import Alert
from longrl.evaluation.sparklines import ASCII_BLOCKS, BLOCKS, Curve, sparkline
from longrl.io.progress import duration

LABELS = {
    "reward/mean": "reward",
    "train/loss": "loss",
    "train/kl_ref": "kl",
    "train/entropy": "entropy",
    "rollout/completion_tokens": "tokens",
    "rollout/cut_off": "cut off",
    "train/mismatch_mean": "mismatch",
    "train/grad_norm": "grad norm",
}
"""Metric -> what it is called where there is little room."""
BUSY = {
    "throughput/trainer_busy": "trainer {:.0%} busy",
    "rollout/engine_busy": "engine {:.0%} busy",
    "rollout/staleness_mean": "staleness {:.1f}",
    "rollout/groups_ready": "{:.0f} groups ready",
}
"""Metric -> how it is said. Without the engine's the line is left out: it is of rollouts beside the update."""
MAX_ALERTS = 3
LABEL_WIDTH, VALUES_WIDTH = 11, 24
MIN_WIDTH = 40
MAX_QUESTION, MAX_SAMPLE = 300, 700
"""Characters of a sample in a log."""


@dataclass(frozen=True)
class Sample:
    """A completion of the last step."""

    id: str
    prompt: str
    completion: str
    reward: float


@dataclass(frozen=True)
class Progress:
    """Where a run is."""

    run: str
    """Its folder."""
    step: int = 0
    """Optimizer steps that are done."""
    total: int | None = None
    """None where the run has no end."""
    step_s: float | None = None
    """Seconds of a step, median of the last ones."""
    tokens_per_s: float | None = None
    phase: str = ""
    """What is done now; "" between phases."""
    phase_s: float = 0.0
    """For so many seconds."""
    phases: Mapping[str, float] = field(default_factory=dict)
    """Seconds of each phase of the last step."""
    rollouts: Mapping[str, float] = field(default_factory=dict)
    """Metrics of the last step that say how busy both sides are, and how old tokens."""
    curves: Mapping[str, Curve] = field(default_factory=dict)
    """Metric -> its values, in the order in which they are shown."""
    alerts: Sequence[Alert] = ()
    sample: Sample | None = None
    notice: str = ""
    """That a signal ends the run, say."""

    @property
    def left_s(self) -> float | None:
        """Seconds until the end; None where that is unknown."""
        if self.total is None or self.step_s is None:
            return None
        return max(0, self.total - self.step) * self.step_s

    @property
    def share(self) -> float | None:
        """Done of all, in [0, 1]."""
        return min(1.0, self.step / self.total) if self.total else None


def printable(text: str, encoding: str = "utf-8") -> str:
    """A text in one line that moves no cursor, hides nothing and can be written in `encoding`.

    Control characters (an escape sequence begins with one), marks of direction and zero width are spaces.
    """
    shown = "".join(char if char.isprintable() else " " for char in text)
    return " ".join(shown.encode(encoding, "replace").decode(encoding).split())


def number(value: float) -> str:
    """Three digits: "0.712", "57.2", "1180", "2.1e-05"."""
    return f"{value:.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"


# ---- one line ----


def plain_line(progress: Progress) -> str:
    """All figures in one line, for logs that a person or a script reads."""
    parts = [_counted(progress)]
    parts += [f"{LABELS.get(name, name)} {number(curve.last)}" for name, curve in progress.curves.items()]
    seconds = _seconds(progress.phases)
    parts += [text for text in (_speed(progress), seconds, _busy(progress.rollouts), _left(progress)) if text]
    if progress.alerts:
        parts.append("alerts: " + ", ".join(alert.rule.name for alert in progress.alerts))
    return " | ".join(parts)


def _counted(progress: Progress) -> str:
    if progress.share is None:
        return f"step {progress.step}"
    return f"step {progress.step}/{progress.total} {100 * progress.share:.0f}%"


def _speed(progress: Progress) -> str:
    texts = []
    if progress.step_s is not None:
        texts.append(f"{number(progress.step_s)} s/step")
    if progress.tokens_per_s is not None:
        texts.append(f"{number(progress.tokens_per_s)} tokens/s")
    return " ".join(texts)


def _seconds(phases: Mapping[str, float]) -> str:
    return " ".join(f"{name} {seconds:.1f}" for name, seconds in phases.items())


def _busy(rollouts: Mapping[str, float]) -> str:
    if "rollout/engine_busy" not in rollouts:
        return ""
    known = [(text, rollouts[name]) for name, text in BUSY.items() if math.isfinite(rollouts.get(name, math.nan))]
    return ", ".join(text.format(value) for text, value in known)


def _left(progress: Progress) -> str:
    return f"ETA {duration(progress.left_s)}" if progress.left_s is not None else ""


# ---- a screen ----


def screen(progress: Progress, width: int = 80, height: int = 24, encoding: str = "utf-8") -> Text:
    """The run in at most `height` lines of `width` cells; what there is no room for is left out, samples first."""
    width = max(width, MIN_WIDTH)
    is_ascii = not encoding.lower().replace("-", "").startswith("utf")
    head = [_title(progress, width, encoding), _bar(progress, width, is_ascii), _now(progress)]
    busy = _busy(progress.rollouts)
    if busy:
        head.append(Text(busy, "dim"))
    if progress.notice:
        head.append(Text(progress.notice, "bold yellow"))
    curves = [
        _curve(LABELS.get(name, name), curve, width, ASCII_BLOCKS if is_ascii else BLOCKS)
        for name, curve in progress.curves.items()
    ]
    alerts = _alerts(progress.alerts, width)
    lines = [*head, *curves[: max(0, height - len(head) - len(alerts))], *alerts]
    sample = _sample(progress.sample, width, height - len(lines) - 1, encoding) if progress.sample else []
    if sample:
        lines += [Text(), *sample]
    for line in lines:
        line.truncate(width, overflow="crop" if is_ascii else "ellipsis")
    return Text("\n", no_wrap=True).join(lines[:height])


def _title(progress: Progress, width: int, encoding: str) -> Text:
    counted = _counted(progress)
    room = width - len(counted) - 2
    return Text.assemble(
        (set_cell_size(_end(printable(progress.run, encoding), room), room), "bold"), "  ", (counted, "bold")
    )


def _bar(progress: Progress, width: int, is_ascii: bool) -> Text:
    right = "  ".join(text for text in (_speed(progress), _left(progress)) if text)
    full, empty = ("#", ".") if is_ascii else ("\u2501", "\u2500")
    room = max(8, width - cell_len(right) - 2)
    done = round(room * (progress.share or 0.0))
    return Text.assemble((full * done, "green"), (empty * (room - done), "dim"), "  ", right)


def _now(progress: Progress) -> Text:
    now = f"{progress.phase} {progress.phase_s:.0f} s" if progress.phase else "between phases"
    seconds = _seconds({name: value for name, value in progress.phases.items() if value >= 0.05})
    return Text.assemble(("now ", "dim"), (f"{now:<16}", "cyan"), (" last ", "dim"), seconds or "-")


def _curve(label: str, curve: Curve, width: int, blocks: str) -> Text:
    room = width - LABEL_WIDTH - VALUES_WIDTH - 2
    line = sparkline(curve.values(), room, blocks)
    return Text.assemble(
        (f"{label:<{LABEL_WIDTH}}", "dim"),
        (f"{line:<{room}}", "cyan"),
        (f" {number(curve.last):>9}", "bold"),
        (f" from {number(curve.first)}", "dim"),
    )


def _alerts(alerts: Sequence[Alert], width: int) -> list[Text]:
    """What each of the last ones found, and what helps: the latter in full where there is one alert alone."""
    shown = alerts[-MAX_ALERTS:]
    num_lines = 3 if len(shown) == 1 else 1
    lines = []
    for alert in shown:
        head = f"! {alert.rule.name} since step {alert.step}"
        lines.append(Text.assemble((head, "bold red"), f": {alert.what}"))
        helps = textwrap.wrap(alert.rule.knob, width - 2)
        helps = [*helps[: num_lines - 1], " ".join(helps[num_lines - 1 :])]
        lines += [Text(f"  {text}", "yellow") for text in helps if text]
    if len(alerts) > len(shown):
        lines.append(Text(f"  and {len(alerts) - len(shown)} more", "yellow"))
    return lines


def _sample(sample: Sample, width: int, room: int, encoding: str) -> list[Text]:
    """Id and reward, the end of the prompt, and as much of the completion's beginning as there is room for."""
    if room < 3:
        return []
    head = Text.assemble(
        ("sample ", "dim"), printable(sample.id, encoding), ("  reward ", "dim"), number(sample.reward)
    )
    prompt, answer = printable(sample.prompt, encoding), printable(sample.completion, encoding)
    question = Text(_end(prompt, width - 2), "dim")
    return [head, question, *_wrapped(answer, width, min(room - 2, 4))]


def sample_lines(sample: Sample, encoding: str = "utf-8") -> list[str]:
    """A sample for a log: the end of its question, the beginning of its completion, its reward."""
    question, answer = printable(sample.prompt, encoding), printable(sample.completion, encoding)
    shown = answer if len(answer) <= MAX_SAMPLE else f"{answer[:MAX_SAMPLE]}..."
    return [
        f"first completion (row {printable(sample.id, encoding)}, reward {number(sample.reward)})",
        f"  question:   {_end(question, MAX_QUESTION)}",
        f"  completion: {shown or '(empty)'}",
    ]


def _wrapped(text: str, width: int, count: int) -> list[Text]:
    """The first lines of a text, cut anywhere: a wide character takes two cells."""
    lines: list[Text] = []
    while text and len(lines) < count:
        cut = min(len(text), width)
        while cell_len(text[:cut]) > width:
            cut -= 1
        lines.append(Text(text[:cut]))
        text = text[cut:]
    return lines or [Text("(empty)", "dim")]


def _end(text: str, width: int) -> str:
    """The last cells of a text."""
    if cell_len(text) <= width:
        return text
    text = text[-width:]
    while cell_len(text) > width - 3:
        text = text[1:]
    return f"...{text}"
