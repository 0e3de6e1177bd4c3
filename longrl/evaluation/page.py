"""The HTML of the report: small functions from values to escaped text, and the style sheet."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

STYLE = """
:root { --ink: #22303c; --soft: #5b6773; --line: #e2e7ec; --paper: #ffffff; --back: #f4f6f8; --good: #1f7a53;
  --good-back: #e3f4ec; --bad: #a8413a; --bad-back: #fbe9e7; --accent: #2f6db3; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink); line-height: 1.5;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 26px; margin: 0 0 4px; letter-spacing: -.01em; }
h2 { font-size: 18px; margin: 40px 0 12px; }
h3 { font-size: 14px; margin: 16px 0 6px; color: var(--soft); font-weight: 600; }
.lead, .note { color: var(--soft); margin: 0; }
.note { font-size: 13px; margin: 8px 0 0; }
.panel, .card, .tile { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; }
.panel { padding: 16px; margin: 0 0 16px; overflow-x: auto; }
.panel img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
.tiles { display: flex; flex-wrap: wrap; gap: 12px; margin-top: 20px; }
.tile { flex: 1 1 150px; padding: 12px 16px; border-top: 4px solid var(--run, var(--accent)); }
.tile b { display: block; font-size: 26px; font-weight: 650; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: 13px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 8px 12px; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
thead th { color: var(--soft); font-weight: 600; font-size: 13px; border-bottom-width: 2px; }
tbody tr:last-child td { border-bottom: 0; }
tr.overall td { font-weight: 650; background: #f8fafb; }
td small { color: var(--soft); font-weight: 400; margin-left: 6px; }
.card { padding: 18px; margin-bottom: 18px; }
.card header { display: flex; flex-wrap: wrap; gap: 8px; align-items: baseline; margin-bottom: 10px; }
.card header b { margin-right: 4px; }
.strip { display: flex; flex-wrap: wrap; gap: 6px; margin-bottom: 14px; }
.strip figure { margin: 0; flex: 0 0 auto; text-align: center; }
.strip img { height: 104px; display: block; border-radius: 5px; border: 1px solid var(--line); }
.strip figcaption { font-size: 11.5px; color: var(--soft); font-variant-numeric: tabular-nums; margin-top: 2px; }
.question { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0 0 14px; }
.question .gold { color: var(--good); font-weight: 600; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 14px; }
.completion { border: 1px solid var(--line); border-left: 4px solid var(--run, var(--line)); border-radius: 8px;
  padding: 10px 14px; }
.completion header { margin-bottom: 6px; }
.completion pre { margin: 0 0 10px; font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; max-height: 320px; overflow-y: auto; }
.completion pre .tag { color: #8b97a3; }
.completion pre .said { font-weight: 650; }
.chip { display: inline-block; padding: 1px 9px; border-radius: 99px; background: #eef1f4; color: var(--soft);
  font-size: 12.5px; }
.chip.good { background: var(--good-back); color: var(--good); }
.chip.bad { background: var(--bad-back); color: var(--bad); }
.facts { display: grid; grid-template-columns: max-content 1fr; gap: 4px 18px; margin: 0; font-size: 14px; }
.facts dt { color: var(--soft); }
.facts dd { margin: 0; overflow-wrap: anywhere; }
footer { margin-top: 40px; color: var(--soft); font-size: 13px; }
@media print { body { background: #fff; } .card, .panel { break-inside: avoid; } .completion pre { max-height: none; } }
"""


def page(title: str, body: str) -> str:
    """A whole document; it loads nothing from anywhere."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def section(heading: str, *parts: str) -> str:
    """A heading and what stands under it; nothing at all when that is empty."""
    content = "\n".join(part for part in parts if part)
    return f"<section>\n<h2>{escape(heading)}</h2>\n{content}\n</section>" if content else ""


def tile(label: str, value: str, below: str, color: str = "") -> str:
    """A headline number."""
    style = f' style="--run: {escape(color)}"' if color else ""
    return (
        f'<div class="tile"{style}><span>{escape(label)}</span><b>{escape(value)}</b><span>{escape(below)}</span></div>'
    )


def image(source: str, alt: str, width: int) -> str:
    """A chart on a panel, `width` pixels wide where there is room."""
    return f'<div class="panel"><img src="{source}" alt="{escape(alt)}" width="{width}"></div>'


def sheet(title: str, content: str) -> str:
    """A picture with its title above."""
    return f"<h3>{escape(title)}</h3>\n{content}"


def score_cell(score: Mapping[str, Any] | None) -> str:
    """One accuracy with its interval."""
    if score is None:
        return "<td>-</td>"
    interval = f"{100 * score['low']:.1f} to {100 * score['high']:.1f}"
    return f"<td>{100 * score['accuracy']:.1f}<small>{interval}</small></td>"


def score_table(
    runs: Mapping[str, Mapping[str, Mapping[str, Any]]], categories: Sequence[str], label: Callable[[str], str] = str
) -> str:
    """Accuracies in percent: a row per category, a column per run, headed by its label."""
    head = "".join(f"<th>{escape(label(run))}</th>" for run in runs)
    rows = []
    for name in categories:
        scores = [by_category.get(name) for by_category in runs.values()]
        n = max((int(score["n"]) for score in scores if score is not None), default=0)
        mark = ' class="overall"' if name == "overall" else ""
        rows.append(f"<tr{mark}><td>{escape(name)}</td><td>{n}</td>{''.join(map(score_cell, scores))}</tr>")
    head = f"<thead><tr><th>category</th><th>questions</th>{head}</tr></thead>"
    return f'<div class="panel"><table>{head}<tbody>{"".join(rows)}</tbody></table></div>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A plain table of texts; the first column is on the left."""
    names = "".join(f"<th>{escape(name)}</th>" for name in head)
    lines = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="panel"><table><thead><tr>{names}</tr></thead><tbody>{lines}</tbody></table></div>'


def paragraph(text: str) -> str:
    """A sentence or two."""
    return f'<p class="note">{escape(text)}</p>'


def facts(items: Mapping[str, str]) -> str:
    """Names and values, such as the command and the hardware."""
    pairs = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in items.items())
    return f'<div class="panel"><dl class="facts">{pairs}</dl></div>' if pairs else ""


def frame_strip(sources: Sequence[str], captions: Sequence[str]) -> str:
    """Frames side by side, each with its time below."""
    figures = "".join(
        f'<figure><img src="{source}" alt="frame"><figcaption>{escape(caption)}</figcaption></figure>'
        for source, caption in zip(sources, captions, strict=True)
    )
    return f'<div class="strip">{figures}</div>' if figures else ""


def question(problem: str, answer: str) -> str:
    """The question as the model reads it, the line of the right option set off."""
    right = re.compile(rf"\s*\(?{re.escape(answer.strip())}\s?[).:]")
    lines = [
        f'<span class="gold">{escape(line)} \u2713</span>' if right.match(line) else escape(line)
        for line in problem.strip().splitlines()
    ]
    return f'<div class="question">{chr(10).join(lines)}</div>'


def chip(text: str, kind: str = "") -> str:
    """A small label; kind is "", "good" or "bad"."""
    return f'<span class="chip {kind}">{escape(text)}</span>'


def verdict(correct: bool | None) -> str:
    """Right, wrong, or nothing when it was not judged."""
    if correct is None:
        return ""
    return chip("right", "good") if correct else chip("wrong", "bad")


def completion_text(text: str) -> str:
    """A completion with its tags faint and the answer strong."""
    marked = re.sub(
        r"(&lt;answer&gt;)(.*?)(&lt;/answer&gt;)", r'\1<span class="said">\2</span>\3', escape(text.strip()), flags=re.S
    )
    marked = re.sub(r"(&lt;/?(?:think|answer)&gt;)", r'<span class="tag">\1</span>', marked)
    return f"<pre>{marked or '(empty)'}</pre>"
