"""`python -m longrl plan`: what a run needs and how long a step takes, before a single weight is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from longrl.commands import plan_async
from longrl.commands.run_parts import RunParts
from longrl.evaluation.result_files import write_new_json
from longrl.planning.plan_tables import show_plan
from longrl.planning.run_plan import PlanOptions, plan_run

DESCRIPTION = """Memory and time of a run under MRSPStrategy, from its own config and without its weights; `plan --async
RUN` says whether asynchronous rollouts pay (`plan --async --help`)."""


def main(args: Sequence[str]) -> None:
    """Command line of the plan; with `--async` of that of asynchronous rollouts."""
    if "--async" in args:
        plan_async.main(args)
        return
    parts = RunParts("plan", args, DESCRIPTION, PlanOptions)
    report = plan_run(parts.planned_run(), parts.options, " ".join(["python -m longrl plan", *args]))
    show_plan(report)
    if parts.options.json:
        content = asdict(report)
        content["sizes"] = content["plan"].pop("sizes")
        write_new_json(parts.options.json, content, "--json")
