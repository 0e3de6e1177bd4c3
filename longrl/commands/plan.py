"""`python -m longrl plan`: what a run needs and how long a step takes, before a single weight is loaded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

DESCRIPTION = "Memory and time of a run under MRSPStrategy, from its own config and without its weights."


def main(args: Sequence[str]) -> None:
    """Command line of the plan."""
    from longrl.commands.run_parts import RunParts
    from longrl.planning.plan_tables import show_plan
    from longrl.planning.run_plan import PlanOptions, plan_run

    parts = RunParts("plan", args, DESCRIPTION, PlanOptions)
    result = plan_run(parts.planned_run(), parts.options, " ".join(["python -m longrl plan", *args]))
    show_plan(result)
    if parts.options.json:
        parts.options.json.parent.mkdir(parents=True, exist_ok=True)
        parts.options.json.write_text(json.dumps(as_json(result), indent=2) + "\n")


def as_json(result: Any) -> dict[str, Any]:
    """What `--json` writes."""
    return {
        "command": result.command,
        "model": result.model,
        "hardware": asdict(result.hardware),
        "plan": {key: value for key, value in asdict(result.plan).items() if key != "sizes"},
        "sizes": asdict(result.plan.sizes),
        "bytes_per_device": result.estimate.phases,
        "host_bytes_per_node": result.host,
        "peak_phase": result.estimate.peak_phase,
        "fits": result.verdict.fits,
        "verdict": result.verdict.text,
        "notes": list(result.notes),
        "operations": result.operations,
        "times_s": {**asdict(result.times), "step": result.times.step},
        "largest_frames": result.largest_frames,
        "grid": [asdict(row) for row in result.grid],
    }
