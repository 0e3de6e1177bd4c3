"""The page of a scoreboard, scoreboard.html, and the same tables as Markdown and JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from longrl.evaluation.protocol import list_values
from longrl.evaluation.published_figures import PublishedFigure
from longrl.evaluation.report_page import PageTable, Report, SectionPart, write_report
from longrl.evaluation.result_files import write_json
from longrl.evaluation.scoreboard import (
    Scoreboard,
    against_published,
    category_score,
    differences_between,
    nearest_rows,
)
from longrl.evaluation.scoreboard_charts import (
    COST_NAMES,
    PublishedPoint,
    plot_against_cost,
    plot_by_group,
    plot_other_costs,
)
from longrl.evaluation.scoreboard_rows import COSTS, ScoreboardGroup, ScoreboardRow
from longrl.evaluation.scores import OVERALL, Score
from longrl.evaluation.setting_words import list_unrecorded, list_unsaid
from longrl.io.atomic import atomic_write

PAGE_FILE, TABLES_FILE, RESULTS_JSON = "scoreboard.html", "scoreboard.md", "scoreboard.json"
NOT_RECORDED = "not recorded"
ROW_HEAD = ("row", "condition")
PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
Sections = dict[str, list[SectionPart | Figure]]
SCORE_NOTES = {
    "strict": "Strict accuracy (only what stands in <answer>)",
    "robust": "Robust accuracy (an answer without its tag counts too)",
    "protocol": "Accuracy by the rule of each protocol (strict where it has none)",
}
COST_NOTE = (
    "Means of a question with all its answers. A second number in brackets is what this run spent, where features or "
    "frames were there already; the first is what the question costs by itself. Operations are counted, not measured: "
    "the encoder's for all media, prefill for one reading of the prompt, generating for the tokens behind it."
)


def write_scoreboard(folder: str | Path, board: Scoreboard, title: str = "Scoreboard") -> Path:
    """Writes the page, its charts, its tables as Markdown, and everything as JSON.

    Returns:
        Path of the page.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    sections: Sections = {}
    for group in board.groups:
        sections |= _sections(board, group, _prefix(board, group))
    num_rows = sum(len(group.rows) for group in board.groups)
    subtitle = f"{num_rows} rows: accuracy of each, what it cost, how it was asked, and the command that asks again"
    write_json(folder / RESULTS_JSON, board.to_dict())
    atomic_write(folder / TABLES_FILE, as_markdown(title, sections))
    return write_report(folder, Report(title=title, subtitle=subtitle, sections=sections), PAGE_FILE)


def _prefix(board: Scoreboard, group: ScoreboardGroup) -> str:
    """What headings of a group begin with, where there are several."""
    if len(board.groups) == 1:
        return ""
    same = [other for other in board.groups if other.title == group.title]
    return f"{group.title}, {group.rows[0].overall.n} questions: " if len(same) > 1 else f"{group.title}: "


def _sections(board: Scoreboard, group: ScoreboardGroup, prefix: str) -> Sections:
    cost, figures = board.cost, board.figures_of(group)
    sections: Sections = {}

    # 1. Accuracy against what it costs.
    chart = plot_against_cost(group, cost, _points(figures) if cost == "frames" else ())
    of_cost = f"{prefix}accuracy against {COST_NAMES[cost]}"
    if chart is None:
        text = f"{COST_NAMES[cost].capitalize()} of a question are {NOT_RECORDED} in any of these results."
        sections[_heading(of_cost)] = [text if group.shown else "All rows were asked without video."]
    else:
        sections[_heading(of_cost)] = [chart, *_left_out(group, cost)]
    sections[_heading(f"{prefix}all rows")] = [accuracy_table(group), _score_note(group)]
    sections[_heading(f"{prefix}cost of a question")] = [cost_table(group), COST_NOTE]
    others = plot_other_costs(group, [name for name in COSTS if name != cost and "spent" not in name])
    if others is not None:
        sections[_heading(f"{prefix}accuracy against other costs")] = [others]

    # 2. By category, and by what else rows were scored by.
    by_category = plot_by_group(group, cost, lambda row: row.scores)
    if by_category is not None:
        table = group_table(group, {row.number: _without_overall(row.scores) for row in group.rows})
        sections[_heading(f"{prefix}by category")] = [by_category, table]
    for name in dict.fromkeys(name for row in group.rows for name in row.groups):
        of_rows = {row.number: row.groups.get(name, {}) for row in group.rows}
        by_value = plot_by_group(group, cost, lambda row, of_rows=of_rows: of_rows[row.number])  # type: ignore[misc]
        parts: list[SectionPart | Figure] = [] if by_value is None else [by_value]
        sections[_heading(f"{prefix}by {name.replace('_', ' ')}")] = [*parts, group_table(group, of_rows)]

    # 3. What differs, from published figures and among the rows.
    if figures:
        sections[_heading(f"{prefix}against published figures")] = _published_parts(group, figures)
    sections[_heading(f"{prefix}how rows were asked")] = [protocol_table(group)]
    sections[_heading(f"{prefix}commands")] = [command_table(group)]
    return sections


def _heading(text: str) -> str:
    return text[:1].upper() + text[1:]


def _points(figures: Sequence[PublishedFigure]) -> list[PublishedPoint]:
    points = []
    for figure in figures:
        frames = figure.setting.frames or figure.setting.frames_at_most
        limit = "" if figure.setting.frames else " (at most)"
        if frames:
            points.append(PublishedPoint(f"{figure.model.rpartition('/')[2]}{limit}", float(frames), figure.accuracy))
    return points


def _left_out(group: ScoreboardGroup, cost: str) -> list[str]:
    numbers = [str(row.number) for row in group.shown if row.cost(cost) is None]
    name = COST_NAMES[cost]
    return [f"Not in the chart, for their {name} are {NOT_RECORDED}: rows {', '.join(numbers)}."] if numbers else []


def _score_note(group: ScoreboardGroup) -> str:
    names = {row.score_name for row in group.rows}
    shown = " or ".join(SCORE_NOTES[name] for name in SCORE_NOTES if name in names)
    return (
        f"{shown} in percent with its 95% interval: Wilson's, with questions about one video taken as one cluster. "
        "Majority is always giving the most frequent answer; over no video is the gain on the same questions."
    )


# ---- tables ----


def accuracy_table(group: ScoreboardGroup) -> PageTable:
    """A line for each row: its scores beside its baselines."""
    has_rule = any(row.score_of("protocol_scores") for row in group.rows)
    head = [*ROW_HEAD, "model", "strict", "robust", *(["protocol's rule"] if has_rule else [])]
    head += ["majority", "strict over no video", "questions", "failed"]
    rows = []
    for row in group.rows:
        line: list[str | Mapping[str, Any] | None] = [*_row_cells(row), row.setting.model]
        fields = ("scores", "lenient_scores", *(["protocol_scores"] if has_rule else []))
        line += [_cell(row.score_of(name)) for name in fields]
        line += [None if row.majority is None else f"{100 * row.majority:.1f}", _gain(row.asked.get("over_blind"))]
        line += [str(row.overall.n), str(sum((row.asked.get("failures") or {}).values()))]
        rows.append(line)
    return PageTable(head, rows, dense=True)


def _row_cells(row: ScoreboardRow) -> list[str]:
    return [f"{row.number}: {row.run}", row.condition]


def cost_table(group: ScoreboardGroup) -> PageTable:
    """A line for each row: means of a question."""
    head = [*ROW_HEAD, "frames", "prompt tokens", "of video", "generated tokens"]
    head += ["decoding", "encoder", "prefill", "generating", "in all"]
    rows = []
    for row in group.rows:
        counted = [format_cost(name, row.cost(name)) for name in ("frames", "prompt_tokens", "media_tokens")]
        counted.append(format_cost("completion_tokens", row.cost("completion_tokens")))
        spent = [
            _with_spent(row, "decode_s", "decode_spent_s"),
            _with_spent(row, "encode_flops", "encode_spent_flops"),
        ]
        operations = [format_cost(name, row.cost(name)) for name in ("prefill_flops", "generate_flops", "total_flops")]
        rows.append([*_row_cells(row), *counted, *spent, *operations])
    return PageTable(head, rows, dense=True)


def _with_spent(row: ScoreboardRow, name: str, spent: str) -> str:
    alone, this_run = row.cost(name), row.cost(spent)
    text = format_cost(name, alone)
    is_less = this_run is not None and (alone is None or this_run < 0.995 * alone)
    return f"{text} ({format_cost(name, this_run)})" if is_less else text


def format_cost(name: str, value: float | None) -> str:
    """A cost in words: "12.5", "1.24 s", "3.1 TFLOP", "not recorded"."""
    if value is None:
        return NOT_RECORDED
    if name.endswith("flops"):
        scale, prefix = next(((scale, prefix) for scale, prefix in PREFIXES if value >= scale), (1.0, ""))
        return f"{value / scale:.3g} {prefix}FLOP" if value else "0"
    if name.endswith("_s"):
        return f"{value:.3g} s"
    return f"{value:,.0f}" if value >= 100 or value == round(value) else f"{value:.1f}"


def group_table(group: ScoreboardGroup, scores: Mapping[int, Mapping[str, Score]]) -> PageTable:
    """A line for each row, a column for each category or value, with its number of questions."""
    counts: dict[str, int] = {}
    for by_value in scores.values():
        for name, score in by_value.items():
            counts[name] = max(counts.get(name, 0), score.n)
    head = [*ROW_HEAD, *(f"{name} (n = {count})" for name, count in counts.items())]
    rows = [[*_row_cells(row), *(_cell(scores[row.number].get(name)) for name in counts)] for row in group.rows]
    return PageTable(head, rows, dense=True)


def protocol_table(group: ScoreboardGroup) -> PageTable:
    """A line for each run: protocol, frames, budget, sampling, prompt, and what was not done as in the first row."""
    first = group.rows[0]
    rows = []
    for run in dict.fromkeys(row.run for row in group.rows):
        own = [row for row in group.rows if row.run == run]
        results = own[0].results
        protocol = results.get("protocol") or {}
        source = f" ({protocol['source']})" if protocol.get("source") else ""
        facts = {"protocol": f"{protocol['name']}{source}" if protocol else NOT_RECORDED}
        for row in own:
            reading = row.asked.get("reading") or {}
            video = list_values(reading.get("video") or {})
            video += f"; selection: {list_values(reading['selection'])}" if "selection" in reading else ""
            facts[f"frames of row {row.number} ({row.condition})"] = "none" if row.blind else video or NOT_RECORDED
        facts |= {
            "budget": list_values(results.get("budget") or {}) or NOT_RECORDED,
            "sampling": list_values(results.get("sampling") or {}) or NOT_RECORDED,
            "prompt": " ".join((own[0].setting.prompt or NOT_RECORDED).split()),
        }
        differences = []
        for row in own:
            words = ", ".join(differences_between(row, first)) or "nothing that is known"
            differences.append(f"row {row.number}: {words}" if row is not first else f"row {row.number} is the first")
        rows.append([run, "\n".join(f"{name}: {value}" for name, value in facts.items()), "\n".join(differences)])
    return PageTable(["run", "asked so", f"not done as row {first.number}"], rows, wraps=True)


def command_table(group: ScoreboardGroup) -> PageTable:
    """The command of each run, with the numbers of its rows."""
    commands: dict[str, list[int]] = {}
    for row in group.rows:
        text = row.command or f"{NOT_RECORDED}: an evaluation of an earlier release ({row.run})"
        commands.setdefault(text, []).append(row.number)
    rows = [[", ".join(map(str, numbers)), command] for command, numbers in commands.items()]
    return PageTable(["rows", "command"], rows, wraps=True)


def _published_parts(group: ScoreboardGroup, figures: Sequence[PublishedFigure]) -> list[SectionPart | Figure]:
    rows = []
    for figure in figures:
        name = f"{figure.model.rpartition('/')[2]}\n{100 * figure.accuracy:.1f}"
        unsaid = list_unsaid(figure.setting)
        about = [f"source: {figure.source}", *([figure.note] if figure.note else [])]
        about += [f"It does not say: {', '.join(unsaid)}."] if unsaid else []
        for row in nearest_rows(group, figure):
            pair = against_published(row, figure)
            low, high = pair.interval
            points = f"{100 * pair.gain:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]"
            ours = f"row {row.number} ({row.run}, {row.condition}): {100 * pair.score.accuracy:.1f}\n{points}"
            for category, (accuracy, score) in category_score(figure, row).items():
                ours += f"\n{category}: {100 * score.accuracy:.1f} where {100 * accuracy:.1f} is published"
            words = list(pair.differences or ["asked alike, as far as both say"])
            unrecorded = list_unrecorded(row.setting, figure.setting)
            words += [f"Not recorded of ours: {', '.join(unrecorded)}."] if unrecorded else []
            rows.append([name, ours, "\n".join([*words, *about])])
            about = []
    note = (
        "Of each run the row whose frames are nearest. A difference has the interval of our figure alone, as published "
        "ones come without theirs; scoreboard.json has all rows."
    )
    return [PageTable(["published", "ours", "what was not done alike"], rows, wraps=True), note]


def _without_overall(scores: Mapping[str, Score]) -> dict[str, Score]:
    return {name: score for name, score in scores.items() if name != OVERALL}


def _cell(score: Score | None) -> Mapping[str, Any] | None:
    """A score as page tables show it, with the clustered interval."""
    if score is None:
        return None
    low, high = score.interval
    return {**asdict(score), "low": low, "high": high}


def _gain(gain: Mapping[str, Any] | None) -> str | None:
    if gain is None:
        return None
    return f"{100 * gain['difference']:+.1f} [{100 * gain['low']:+.1f}, {100 * gain['high']:+.1f}]"


# ---- Markdown ----


def as_markdown(title: str, sections: Mapping[str, Sequence[SectionPart | Figure]]) -> str:
    """The tables and texts of a page; its charts are in their files."""
    parts = [f"# {title}"]
    for heading, of_section in sections.items():
        parts.append(f"## {heading}")
        parts += [_markdown_part(part) for part in of_section if isinstance(part, str | PageTable)]
    return "\n\n".join(parts) + "\n"


def _markdown_part(part: str | PageTable) -> str:
    if isinstance(part, str):
        return part
    lines = [list(part.head), ["---"] * len(part.head), *([_markdown_cell(cell) for cell in row] for row in part.rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _markdown_cell(cell: str | Mapping[str, Any] | None) -> str:
    if cell is None:
        return "-"
    if isinstance(cell, str):
        return cell.replace("|", r"\|").replace("\n", "<br>")
    return f"{100 * cell['accuracy']:.1f} [{100 * cell['low']:.1f}, {100 * cell['high']:.1f}]"
