"""`python -m longrl plan`: what a run needs and how long a step takes, before a single weight is loaded."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

DESCRIPTION = """Memory and time of a run under MRSPStrategy, from its own config and without its weights.
All other options are those of `python -m longrl fit`: --config (repeated, later ones win) and single keys."""


def main(args: Sequence[str]) -> None:
    """Command line of the plan."""
    options, of_the_run = parser().parse_known_args(list(args))
    from longrl.planning.plan_report import planned, show

    result = planned(options, of_the_run)
    show(result)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(as_json(result), indent=2) + "\n")


def parser() -> argparse.ArgumentParser:
    """The plan's own options."""
    made = argparse.ArgumentParser(prog="python -m longrl plan", description=DESCRIPTION, allow_abbrev=False)
    made.add_argument("--hardware", default="H100", help="A100, H100 or H200: nodes of 8 (default H100)")
    made.add_argument("--memory_gib", type=float, help="memory of a device, instead of the hardware's")
    made.add_argument("--devices", type=int, help="devices of a node, instead of the hardware's 8")
    made.add_argument("--nodes", type=int, help="nodes; by default the config's trainer.num_nodes")
    made.add_argument("--sp", type=int, help="ranks that share a sequence; by default the config's strategy's, or 1")
    made.add_argument("--frames", type=int, help="frames of a video; by default data.video.max_frames")
    made.add_argument("--frame_size", default="1280x720", metavar="WxH", help="of the videos, before the family's rule")
    made.add_argument("--text_tokens", type=int, default=512, help="of a prompt beside its video (default 512)")
    made.add_argument("--prompt_tokens", type=int, help="all tokens of a prompt; its media tokens stay")
    made.add_argument("--utilisation", type=float, default=0.4, help="share of the peak FLOP/s reached (default 0.4)")
    made.add_argument("--bandwidth_utilisation", type=float, default=0.6, help="of memory and networks (default 0.6)")
    made.add_argument("--workspace_gib", type=float, default=3.0, help="of CUDA, NCCL, cuBLAS, gaps (default 3)")
    made.add_argument("--json", type=Path, metavar="FILE", help="write the plan there as well")
    return made


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
