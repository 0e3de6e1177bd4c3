"""The files of an evaluation, whoever asked: results.json, samples.jsonl, report.html, and comparison.json."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from longrl.datamodules.loading.render import RowRenderer
from longrl.datamodules.longvideo_reason import LongVideoReason
from longrl.evaluation.answering import make_portable
from longrl.evaluation.comparison import Comparison, RunRecords, changed_values, compare_folders
from longrl.evaluation.costs import costs_of, mean_costs
from longrl.evaluation.outcomes import SHUFFLED, Outcome, gain_over, gains_by_category
from longrl.evaluation.protocol import OWN_PROTOCOL, PublishedProtocol, describe_shown, list_limits
from longrl.evaluation.samples import RESULTS_FILE, SAMPLES_FILE, SampleLine, sample_lines
from longrl.evaluation.timings import write_timings
from longrl.io.atomic import atomic_write
from longrl.io.jsonl import write_jsonl
from longrl.types import Row, SamplingParams

logger = logging.getLogger(__name__)

MAX_CHANGES = 5
SAME_QUESTIONS = ("policy", "sampling", "seed", "questions")
"""Fields of results.json that two evaluations of one folder share; how answers are scored and shown may change."""
DESCRIPTION_FILE = "description.json"
"""What `predict` leaves beside its samples, which have no results: `describe_evaluation`."""


@dataclass(frozen=True)
class EvaluationFiles:
    """Files that an evaluation wrote."""

    results: dict[str, Any]
    """The content of results.json."""
    outcomes: Sequence[Outcome]
    comparisons: dict[str, Comparison]
    """Condition -> comparison with another run, if there is one."""
    report: Path
    """report.html; the other files lie beside it."""


def describe_evaluation(
    name: str,
    policy: Mapping[str, Any],
    sampling: SamplingParams,
    seed: int,
    data: LongVideoReason,
    renderers: Mapping[str, RowRenderer],
    protocol: PublishedProtocol = OWN_PROTOCOL,
) -> dict[str, Any]:
    """Description of who answers what, and how: the skeleton of results.json, known before a question is asked.

    Args:
        name: of the benchmark.
        policy: its identity, with `model`, `revision` and `engine`.
        sampling: of the answers.
        seed: of the sampling.
        data: has read the questions.
        renderers: condition -> how questions are shown.
        protocol: that is followed.
    """
    num_records = data.skips("test").num_rows
    dataset = data.datasets["test"]
    return {
        "benchmark": name,
        "protocol": protocol.to_dict(),
        "policy": dict(policy),
        "sampling": asdict(sampling),
        "seed": seed,
        "budget": list_limits(policy, data.renderer.max_prompt_tokens, sampling.max_completion_tokens),
        "questions": {
            "records": num_records,
            "malformed": num_records - len(dataset.rows),
            "asked": len(dataset.rows),
            "fingerprint": dataset.fingerprint,
        },
        "conditions": {name: {"reading": make_portable(each.identity())} for name, each in renderers.items()},
    }


def write_evaluation(
    folder: Path,
    description: dict[str, Any],
    rows: Sequence[Row],
    outcomes: Sequence[Outcome],
    *,
    num_cards: int = 8,
    against: tuple[str, RunRecords] | None = None,
) -> EvaluationFiles:
    """Writes all files of an evaluation; the same answers give the same bytes.

    Args:
        folder: made if missing.
        description: `describe_evaluation`.
        rows: all questions.
        outcomes: one for each of its conditions.
        num_cards: questions that the report shows with what was answered.
        against: folder of another run and what `read_run` gave of it, to compare with.
    """
    from longrl.evaluation.benchmark_report import write_benchmark_report  # matplotlib with it: not at a run's start

    lines = write_samples(folder, description, rows, outcomes)
    write_timings(folder, rows, outcomes)
    blind = next((outcome for outcome in outcomes if outcome.blind), None)
    conditions = {}
    for outcome in outcomes:
        gain = gain_over(blind, outcome) if blind is not None and not outcome.blind else None
        known = description["conditions"][outcome.name]
        shown = describe_shown(outcome, rows, known["reading"])
        conditions[outcome.name] = known | {"shown": shown} | outcome.to_dict()
        answered = [line for line in lines if line["condition"] == outcome.name and "resps" in line]
        conditions[outcome.name]["costs"] = mean_costs([costs_of(line, outcome.blind) for line in answered])
        conditions[outcome.name]["over_blind"] = asdict(gain) if gain else None
        shuffled = next((other for other in outcomes if other.name == f"{outcome.name}{SHUFFLED}"), None)
        if shuffled is not None:
            gains = gains_by_category(shuffled, outcome)
            conditions[outcome.name]["over_shuffled"] = {name: asdict(each) for name, each in gains.items()}
    results = description | {"conditions": conditions}
    write_json(folder / RESULTS_FILE, results)
    comparisons = {}
    if against is not None:
        comparisons = compare_folders(against[0], folder, before=against[1])
        _tell_replaced(folder / "comparison.json", comparisons)
        write_json(folder / "comparison.json", {name: asdict(each) for name, each in comparisons.items()})
    report = write_benchmark_report(folder, results, outcomes, rows, lines, comparisons, num_cards)
    return EvaluationFiles(results, outcomes, comparisons, report)


def write_samples(
    folder: Path, description: Mapping[str, Any], rows: Sequence[Row], outcomes: Sequence[Outcome]
) -> list[SampleLine]:
    """Writes samples.jsonl alone, and returns its lines."""
    policy = description["policy"]
    shared = {
        "model": policy["model"],
        "model_revision": policy["revision"],
        "weights": policy.get("weights"),
        "engine": policy["engine"],
        "sampling": description["sampling"],
        "seed": description["seed"],
        "decode_backend": next(iter(description["conditions"].values()))["reading"]["decoder"],
    }
    lines = []
    for outcome in outcomes:
        reading = description["conditions"][outcome.name]["reading"]
        chosen = {"selection": reading["selection"]["name"]} if "selection" in reading else {}
        lines += list(sample_lines(outcome, rows, shared | chosen))
    write_jsonl(folder / SAMPLES_FILE, lines)
    return lines


def write_json(path: str | Path, value: Any) -> None:
    """Writes JSON; readers see the old file or the whole new one."""
    atomic_write(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_new_json(path: str | Path, value: Any, option: str) -> None:
    """Writes JSON where nothing is, or the same already.

    Args:
        path: the file.
        value: its content.
        option: that names the file.

    Raises:
        ValueError: something else is there.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    if Path(path).exists() and Path(path).read_text(encoding="utf-8") != text:
        raise ValueError(f"{option}={path} exists and holds another result; name another file, or delete that one")
    atomic_write(path, text)


# ---- results that are there already ----


def check_extends(
    folder: Path, description: Mapping[str, Any], option: str = "--out", file: str = RESULTS_FILE
) -> bool:
    """Raises ValueError if `folder` has results that an evaluation would replace instead of extend.

    It extends results of the same policy, sampling, seed and questions whose conditions it asks as well, in the same
    reading; it may have further conditions, such as more `--frames` or the blind baseline.

    Args:
        folder: of the evaluation.
        description: `describe_evaluation`.
        option: of the command, that names another folder.
        file: in `folder`, that holds the description of what is there.

    Returns:
        True if there are results, which the evaluation extends or repeats.
    """
    path = folder / file
    if not path.is_file():
        _check_no_other_samples(folder, option, file)
        return False
    before, now = json.loads(path.read_text(encoding="utf-8")), json.loads(json.dumps(description))
    changed = [text for name in SAME_QUESTIONS for text in changed_values(name, before[name], now[name])]
    for name, condition in before["conditions"].items():
        if name not in now["conditions"]:
            changed.append(f"{name!r} is not asked")
        else:
            changed += changed_values(f"{name!r} reading", condition["reading"], now["conditions"][name]["reading"])
    if changed:
        more = f" and {len(changed) - MAX_CHANGES} more" if len(changed) > MAX_CHANGES else ""
        raise ValueError(
            f"{option}={folder} has the results of another evaluation ({'; '.join(changed[:MAX_CHANGES])}{more}); give "
            f"this one a folder of its own by {option}, or delete {path} to replace them (answers that are there stay)"
        )
    return True


def _check_no_other_samples(folder: Path, option: str, file: str) -> None:
    """Raises ValueError for samples that are not known to be of an evaluation that may be gone on with."""
    is_run = (folder / "config.yaml").is_file() or (folder / "checkpoints").is_dir()
    lines = (folder / SAMPLES_FILE).open(encoding="utf-8") if (folder / SAMPLES_FILE).is_file() else ()
    of_training = any("condition" not in json.loads(line) for line in islice(lines, 1))
    if is_run or of_training:
        raise ValueError(
            f"{option}={folder} holds a training run, whose samples and report results would replace; name a folder of "
            f"their own, such as {folder}/evaluation"
        )
    if file != RESULTS_FILE and lines:
        raise ValueError(
            f"{option}={folder} has a {SAMPLES_FILE} that does not say what answered ({file} is not there); name "
            f"another folder by {option}, or delete that file"
        )


def _tell_replaced(path: Path, comparisons: Mapping[str, Comparison]) -> None:
    """Says that a comparison with another evaluation takes the place of the one that is there."""
    if not path.is_file():
        return
    before = {item["first"] for item in json.loads(path.read_text(encoding="utf-8")).values()}
    now = {item.first for item in comparisons.values()}
    if before != now:
        logger.warning("%s compared with %s before, now with %s", path, ", ".join(before), ", ".join(now))
