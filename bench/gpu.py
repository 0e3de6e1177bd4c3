"""One GPU: encode, prefill, decode and update of true shapes at 8k to 256k tokens, with random weights.

The models are Qwen2.5-VL 3B and 7B, and Qwen3.5 9B, by flash-linear-attention where that is installed.

First the attention kernel in use is checked against a dense mask in float64. Then, for each model and length, a prompt
of that many tokens, nearly all of them video, with G completions behind it goes through

- encode: the vision encoder, in calls of at most 65,536 patches;
- prefill: `HFEngine`, the prompt once, in chunks; and `decode`: some tokens of all G completions;
- update: forward and backward of the packed group with activation checkpointing, without the optimizer's step, whose
  memory is for a sharded run; `separate` is one completion at a time, only where it is cheap.

`mfu` is the model's own operations (longrl/planning/flops.py; recomputation does not count) over the maker's peak
(longrl/planning/hardware.py). The file is written after every row; what the time does not suffice for is listed as
skipped, and what memory does not as `out of memory`. Needs no network, no weights, no vllm and no flash-attn.

    python bench/gpu.py --json bench/results/gpu.json --profile update.txt
    python bench/gpu.py --cpu --tiny     # the same code in seconds, to try it; its numbers mean nothing
    python bench/gpu.py --quick          # the tiny model, on a GPU if there is one
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import console, peak_memory_mib, print_table, provenance, write_json
from gpu_case import FULL, TINY_SIZES, Case, Sizes, built
from torch import Tensor

from longrl import types
from longrl.packing.attention import dense_mask, shared_prefix_attention
from longrl.packing.kernels import kernel_for
from longrl.planning import flops
from longrl.planning.hardware import HARDWARE, Hardware
from longrl.planning.micro_batches import micro_batch

GIB = 1 << 30
MAX_ERROR = 0.02
"""Of bfloat16 attention and its gradients against float64, relative; rounding alone is about 0.004."""


class Report:
    """Rows as they come, in the file after each."""

    def __init__(self, arguments: argparse.Namespace, device: torch.device, minutes: float) -> None:
        self.arguments, self.device = arguments, device
        self.deadline = time.monotonic() + 60 * minutes
        self.rows: list[dict[str, Any]] = []
        self.skipped: list[str] = []
        self.check: dict[str, Any] = {}
        self.peak = peak_of(device)

    def write(self) -> None:
        """All that is known so far."""
        if self.arguments.json:
            write_json(self.arguments.json, {
                **provenance("gpu", self.arguments), "command": self._command(), "gpu": self._gpu(),
                "check": self.check, "rows": self.rows, "skipped": self.skipped,
            })  # fmt: skip

    def _command(self) -> str:
        given = [f"--{name}" for name in ("cpu", "tiny", "quick") if getattr(self.arguments, name)]
        for name in ("models", "tokens"):
            if getattr(self.arguments, name):
                given.append(f"--{name} {' '.join(map(str, getattr(self.arguments, name)))}")
        return " ".join(["python bench/gpu.py", *given, f"--minutes {self.arguments.minutes:g}"])

    def _gpu(self) -> dict[str, Any]:
        if self.device.type != "cuda":
            return {}
        found = torch.cuda.get_device_properties(self.device)
        memory = round(found.total_memory / GIB, 1)
        peak = None if self.peak is None else {"name": self.peak.name, "tflops": self.peak.flops / 1e12}
        return {"name": found.name, "memory_gib": memory, "cuda": torch.version.cuda, "peak": peak}


def peak_of(device: torch.device) -> Hardware | None:
    """The GPU's entry in longrl/planning/hardware.py, which has SXM boards only."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((known for key, known in HARDWARE.items() if key in name and "PCIe" not in name), None)


# ---- rows ----


def measure(report: Report, case: Case, name: str, tokens: int, until: float) -> None:
    """All phases of one length; each only if it can be over by `until`."""
    plan, prompt = case.plan(tokens), case.prompt(tokens)
    batch, answers, video = micro_batch(plan), case.answers(), prompt.media[0]
    features = case.zeros(tokens)
    forward = flops.forward_flops(plan, batch) + flops.head_flops(plan, batch)
    count, length, backward = case.sizes.completions, case.sizes.response_tokens, 1 + flops.BACKWARD
    one = dataclasses.replace(plan, num_generations=1)
    alone = flops.forward_flops(one, micro_batch(one)) + flops.head_flops(one, micro_batch(one))
    row = Timer(report, case, name, tokens, until)
    row("encode", "", lambda: case.encode(video), plan.media_tokens, flops.encode_flops(plan))
    prefill = row("prefill", "", lambda: case.generate(prompt, features, 1), tokens, flops.prefill_flops(plan))
    steps = case.sizes.decoded_tokens
    decoding = count * steps * flops.decode_flops(plan) / plan.completion_tokens
    generate = lambda: case.generate(prompt, features, 1 + steps)  # noqa: E731
    if prefill is not None:
        row("decode", "", generate, count * steps, decoding, less=prefill)
    update = lambda: case.update(prompt, features, answers)  # noqa: E731
    row("update", "packed", update, tokens + count * length, backward * forward)
    if tokens <= case.sizes.separate_tokens:
        apart = lambda: case.update(prompt, features, answers, separate=True)  # noqa: E731
        row("update", "separate", apart, count * (tokens + length), backward * count * alone)
    case.model.zero_grad(set_to_none=True)


@dataclass
class Timer:
    """Times one action after the other, and writes a row for each."""

    report: Report
    case: Case
    name: str
    tokens: int
    until: float

    def __call__(
        self, phase: str, variant: str, action: Callable[[], object], tokens: int, operations: float, *,
        less: float = 0.0,
    ) -> float | None:  # fmt: skip
        """Seconds of the action less those given, or None if it was skipped or ran out of memory.

        Args:
            phase: what is timed.
            variant: packed or separate.
            action: the work.
            tokens: that it goes through.
            operations: of the part that is reported.
            less: seconds of the action that belong to another row.
        """
        label = " ".join(filter(None, [self.name, phase, variant, str(self.tokens)]))
        need = 1.5 * less + 2 * operations / self._rate(phase)
        if time.monotonic() + need > self.until:
            self.report.skipped.append(f"{label}: would take about {need:.0f} s")
            self.report.write()
            return None
        seconds, status = self._seconds(action, phase)
        own = None if seconds is None else max(seconds - less, 1e-9)
        speed = None if own is None else operations / own
        peak = self.report.peak
        self.report.rows.append({
            "model": self.name, "phase": phase, "variant": variant, "tokens": self.tokens, "seconds": own,
            "tokens_per_s": None if own is None else tokens / own,
            "tflops": None if speed is None else speed / 1e12,
            "mfu": None if speed is None or peak is None else speed / peak.flops,
            "peak_gib": self._peak_gib(), "status": status,
        })  # fmt: skip
        self.report.write()
        console.print(f"{label}: {status}" + ("" if own is None else f", {own:.2f} s"), highlight=False)
        return own

    def _rate(self, phase: str) -> float:
        """Operations per second to expect: those of this phase at the length before, else a tenth of the peak."""
        earlier = [r for r in self.report.rows if r["phase"] == phase and r["model"] == self.name and r["tflops"]]
        if earlier:
            return 1e12 * earlier[-1]["tflops"]
        return 0.1 * (self.report.peak.flops if self.report.peak else 100e12)

    def _seconds(self, action: Callable[[], object], phase: str) -> tuple[float | None, str]:
        """(Median of up to three runs within two seconds, what happened)."""
        cuda = self.case.device.type == "cuda"
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.case.device)
        times: list[float] = []
        try:
            while len(times) < 3 and sum(times) < 2:
                start = time.perf_counter()
                action()
                if cuda:
                    torch.cuda.synchronize(self.case.device)
                times.append(time.perf_counter() - start)
        except torch.OutOfMemoryError:
            self.case.model.zero_grad(set_to_none=True)
            gc.collect()
            return None, "out of memory"
        return statistics.median(times), "ok"

    def _peak_gib(self) -> float:
        """Of the device, weights included; on a CPU of the process since its start."""
        if self.case.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.case.device) / GIB
        return peak_memory_mib() / 1024


# ---- before and after ----


def check(sizes: Sizes, device: torch.device) -> dict[str, Any]:
    """Relative errors of the kernel in use, in bfloat16, against a dense mask in float64.

    Raises:
        RuntimeError: one is beyond what rounding explains; no timing would mean anything.
    """
    span, (heads, key_heads, size) = sizes.checked, sizes.checked_heads
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(count, span.stop, size, generator=generator) for count in (heads, key_heads, key_heads, heads)]
    *inputs, grad_output = (states.to(device, torch.bfloat16) for states in given)
    errors = {}
    results = []
    for dtype, function in ((torch.bfloat16, _flash), (torch.float64, _dense)):
        own = [states.to(dtype).requires_grad_() for states in inputs]
        output = function(*own, span, size**-0.5)
        results.append([output.detach(), *torch.autograd.grad(output, own, grad_output.to(dtype))])
    for name, found, wanted in zip(("output", "query", "key", "value"), *results, strict=True):
        errors[name] = float((found.double() - wanted).norm() / wanted.norm())
    kernel = type(kernel_for(inputs[0])).__name__
    if max(errors.values()) > MAX_ERROR:
        raise RuntimeError(f"{kernel} is wrong here, relative errors {errors}; try LONGRL_ATTENTION=eager")
    console.print(f"{kernel} against a dense mask: relative errors {errors}", highlight=False)
    return {"kernel": kernel, "relative_errors": errors}


def _flash(query: Tensor, key: Tensor, value: Tensor, span: types.GroupSpan, scale: float) -> Tensor:
    return shared_prefix_attention(query, key, value, (span,), scale)


def _dense(query: Tensor, key: Tensor, value: Tensor, span: types.GroupSpan, scale: float) -> Tensor:
    key, value = (x.repeat_interleave(query.shape[0] // x.shape[0], 0) for x in (key, value))
    hidden = ~dense_mask((span,), span.stop).to(query.device)
    return (query @ key.mT * scale).masked_fill(hidden, float("-inf")).softmax(-1) @ value


def profiled(case: Case, path: Path) -> None:
    """The table of operators of one update."""
    from torch.profiler import ProfilerActivity, profile

    cuda, prompt = case.device.type == "cuda", case.prompt(case.sizes.profiled_tokens)
    features = {prompt.media[0].key: case.encode(prompt.media[0])}
    case.update(prompt, features, case.answers())
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as profiler:
        case.update(prompt, features, case.answers())
        if cuda:
            torch.cuda.synchronize(case.device)
    order = "self_device_time_total" if cuda else "self_cpu_time_total"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(profiler.key_averages().table(sort_by=order, row_limit=60, max_name_column_width=80))
    case.model.zero_grad(set_to_none=True)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; refuses to run without a GPU unless told to try things on a CPU."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="written after every row")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="also write a profile of one update")
    parser.add_argument("--minutes", type=float, default=7.5, help="rows that would end later are skipped")
    parser.add_argument("--models", nargs="+", choices=FULL.models, metavar="NAME", help="these of the models alone")
    parser.add_argument("--tokens", nargs="+", type=int, metavar="N", help="of the prompts")
    parser.add_argument("--cpu", action="store_true", help="on the CPU; needs --tiny")
    parser.add_argument("--tiny", action="store_true", help="a model of a few thousand parameters")
    parser.add_argument("--quick", action="store_true", help="--tiny, and --cpu where there is no GPU")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.tiny = True
        arguments.cpu = arguments.cpu or not torch.cuda.is_available()
    if not arguments.cpu and not torch.cuda.is_available():
        parser.error(
            f"bench/gpu.py needs a GPU, but torch {torch.__version__} sees none; run it where there is one, or try its "
            "code with --cpu --tiny"
        )
    if arguments.cpu and not arguments.tiny:
        parser.error("--cpu needs --tiny: models of billions of parameters take hours on a CPU")
    return arguments


def main(argv: Sequence[str] | None = None, sizes: Sizes | None = None) -> None:
    """The command; `sizes` replaces what `--tiny` or its absence choose."""
    arguments = parse(argv)
    sizes = sizes or (TINY_SIZES if arguments.tiny else FULL)
    asked = {"models": arguments.models, "tokens": arguments.tokens}
    sizes = dataclasses.replace(sizes, **{name: tuple(values) for name, values in asked.items() if values})
    device = torch.device("cpu" if arguments.cpu else "cuda:0")
    report = Report(arguments, device, arguments.minutes)
    report.check = check(sizes, device)
    report.write()
    for place, name in enumerate(sizes.models):
        now = time.monotonic()
        until = now + (report.deadline - now) / (len(sizes.models) - place)  # an equal share of what is left
        with tempfile.TemporaryDirectory() as folder:
            case = built(name, sizes, device, folder)
            case.update(case.prompt(min(sizes.tokens)), case.zeros(min(sizes.tokens)), case.answers())  # warm up
            if arguments.profile and place == 0:
                profiled(case, arguments.profile)
            for tokens in sizes.tokens:
                measure(report, case, name, tokens, until)
        del case
        gc.collect()
    if report.rows:
        print_table("gpu", [{key: "" if value is None else value for key, value in row.items()} for row in report.rows])
    for line in report.skipped:
        console.print(f"skipped: {line}", highlight=False)


if __name__ == "__main__":
    main()
