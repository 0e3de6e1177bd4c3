"""`python -m longrl plan --async`: whether rollouts beside the update pay, from lengths and seconds of a run."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console

from longrl.commands.parsers import ShortErrors
from longrl.evaluation.result_files import write_new_json
from longrl.evaluation.screen import number
from longrl.io.number_ranges import COUNT, check_ranges
from longrl.io.tables import make_table
from longrl.planning.async_inputs import Measured, check_known, measured_run, read_lengths, with_given
from longrl.planning.async_model import AsyncOutcome, Workload, advised_staleness, simulate, verdict

DESCRIPTION = """Simulates a run with rollout.max_staleness 0, 1, 2 and so on, from the lengths of completions and the
seconds of the phases that a run's folder has, and says which one pays. Numbers that are given replace measured ones;
with --lengths no run is needed. k > 0 needs an engine on devices of its own."""
FASTER_PREFILL = 8
"""Times as fast as decoding with all slots taken that a token is computed anew, unless it is given: an assumption."""
TABLE = (
    "k",
    "s per step",
    "speed-up",
    "trainer busy",
    "engine busy",
    "requests",
    "staleness",
    "asked again",
    "dropped",
)


def main(args: Sequence[str]) -> None:
    """Command line of the plan."""
    options = parse(args)
    if 0 not in options.max_staleness:
        options.max_staleness = [0, *options.max_staleness]
    measured = options_read(options)
    work, notes = workload(measured, options)
    ks = sorted(set(options.max_staleness))
    outcomes = [simulate(work, k, options.steps, options.seed) for k in ks]
    show(work, outcomes, notes)
    if options.json:
        content = {
            "command": " ".join(["python -m longrl plan", *args]),
            "workload": {name: value for name, value in asdict(work).items() if name != "groups"},
            "notes": notes,
            "rows": [asdict(one) for one in outcomes],
            "advised": advised_staleness(outcomes),
            "verdict": verdict(outcomes),
        }
        write_new_json(options.json, content, "--json")


def parse(args: Sequence[str]) -> Any:
    """The options; `args` begins with those of `plan`, `--async` among them."""
    parser = ShortErrors(prog="python -m longrl plan --async", description=DESCRIPTION)
    parser.add_argument("run", nargs="?", metavar="RUN", help="folder of a training run, whose lengths are read")
    parser.add_argument("--async", dest="is_async", action="store_true", help="this plan instead of that of memory")
    parser.add_argument("--lengths", help="file of lengths of completions instead of a run's: a group a line, or JSON")
    parser.add_argument("--max_staleness", type=list[int], default=[0, 1, 2, 4, 8], help="limits to simulate")
    parser.add_argument("--slots", type=int, help="completions that all servers decode at once; else a step's")
    parser.add_argument("--groups", type=int, help="prompts of a step, over all ranks")
    parser.add_argument("--num_generations", type=int, default=8, help="completions of a group of --lengths")
    parser.add_argument("--token_s", type=float, help="seconds of a decoding step")
    parser.add_argument("--request_s", type=float, help="seconds more of it for each completion in it")
    parser.add_argument("--update_s", type=float, help="seconds that an update takes")
    parser.add_argument("--other_s", type=float, help="seconds of data, encoding and rewards of a step")
    parser.add_argument("--sync_s", type=float, help="seconds that weights take to the engine")
    parser.add_argument("--prompt_tokens", type=float, help="tokens of a prompt, computed anew behind a cut")
    parser.add_argument("--prefill_tokens_per_s", type=float, help="tokens computed anew per second")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps to simulate")
    parser.add_argument("--seed", type=int, default=0, help="seed by which lengths are drawn")
    parser.add_argument("--json", help="write the plan to this file as well")
    return parser.parse_args(list(args))


def options_read(options: Any) -> Measured:
    """What is measured or given.

    Raises:
        ValueError: neither a run nor all that is needed without one.
    """
    check_ranges(options, "--", **dict.fromkeys(("num_generations", "steps", "slots", "groups"), COUNT))
    if min(options.max_staleness) < 0:
        raise ValueError(f"--max_staleness must be at least 0, got {min(options.max_staleness)}; correct it")
    measured = measured_run(options.run) if options.run else Measured()
    names = ("token_s", "request_s", "update_s", "other_s", "sync_s", "prompt_tokens")
    given = {name: getattr(options, name) for name in names} | {"groups_per_step": options.groups}
    if options.lengths:
        given["groups"] = read_lengths(options.lengths, options.num_generations)
    measured = with_given(measured, given)
    check_known(measured, lambda name: "--groups" if name == "groups_per_step" else f"--{name}")
    return measured


def workload(measured: Measured, options: Any) -> tuple[Workload, list[str]]:
    """The simulator's input, and notes on what it assumes."""
    notes = list(measured.notes)
    assert measured.groups_per_step is not None
    assert measured.token_s is not None
    assert measured.update_s is not None
    mean_size = sum(map(len, measured.groups)) / len(measured.groups)
    slots = options.slots
    if slots is None:
        slots = max(1, round(measured.groups_per_step * mean_size), round(measured.most_requests))
        notes.append(f"{slots} completions decode at once, as many as a step has or had; --slots says otherwise")
    request_s = measured.request_s or 0.0
    rate = options.prefill_tokens_per_s
    if rate is None:
        rate = FASTER_PREFILL * slots / (measured.token_s + request_s * slots)
        notes.append(f"behind a cut {number(rate)} tokens/s are computed anew; --prefill_tokens_per_s says otherwise")
    if rate <= 0:
        raise ValueError(f"--prefill_tokens_per_s must be above 0, got {rate}; correct it, or leave it out")
    work = Workload(
        measured.groups,
        measured.groups_per_step,
        slots,
        measured.token_s,
        request_s,
        measured.update_s,
        measured.other_s or 0.0,
        measured.sync_s or 0.0,
        measured.prompt_tokens or 0.0,
        1 / rate,
    )
    return work, notes


def show(work: Workload, outcomes: Sequence[AsyncOutcome], notes: Sequence[str]) -> None:
    """Prints the plan."""
    console = Console()
    if not console.is_terminal:  # rich would squeeze tables into 80 columns
        console = Console(width=150)
    lengths = sorted(length for group in work.groups for length in group)
    middle, long = lengths[len(lengths) // 2], lengths[-1]
    console.print(
        f"{work.groups_per_step} prompts per step; completions of {middle} tokens in the median and {long} at most; "
        f"{work.slots} decode at once, a token each in {number(work.token_s)} s and {number(work.request_s)} s more "
        f"for each; update {number(work.update_s)} s, other {number(work.other_s)} s, sync {number(work.sync_s)} s",
        soft_wrap=True,
        highlight=False,
    )
    slow = next(one.seconds_per_step for one in outcomes if one.max_staleness == 0)
    rows = [_cells(one, slow) for one in outcomes]
    console.print(make_table(TABLE, rows, title="rollout.max_staleness: k, simulated"))
    console.print("\n".join([*(f"note: {note}" for note in notes), verdict(outcomes)]), soft_wrap=True, highlight=False)
    sys.stdout.flush()


def _cells(one: AsyncOutcome, slow: float) -> list[str]:
    shares = [f"{100 * share:.0f} %" for share in (one.trainer_busy, one.engine_busy)]
    rare = [f"{100 * share:.1f} %" for share in (one.asked_again, one.dropped)]
    speed = [str(one.max_staleness), number(one.seconds_per_step), f"{slow / one.seconds_per_step:.2f}"]
    return [*speed, *shares, number(one.requests), f"{one.staleness_mean:.2f}", *rare]
