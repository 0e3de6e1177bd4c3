"""Update pass on a group of completions: packed behind one prompt, against one at a time; and what decoding keeps.

Models: `qwen2`, whose layers all attend, and `qwen3_5`, a hybrid: three gated delta nets and a layer that attends. Both
variants are longrl's own forward and backward in float32, with the same kernels, the same loss and the same gradients;
they differ only in what one sequence holds:

- packed: `[prompt][y1]..[yG]` in one sequence, one forward and backward;
- separate: `[prompt][yi]` for every i, each in a forward and backward of its own, gradients accumulated. That is what
  trainers without prompt sharing do at their smallest memory; repeating the prompt in a batch of G takes more of it.

Times: in one process, packed passes before and after every separate one; each variant reports its median. Peak memory:
every variant runs once more in a fresh process; reported is the most physical memory that process held (VmHWM) beyond
its peak before the pass, which interpreter and weights took. There the separate variant stops after two completions,
for further ones need no more. The vocabulary is as small as the model, so that the output layer, whose rows no variant
can share, keeps the share of the work it has in a 7B model.

`bound` = G(P+R) / (P+GR) is the ratio of the tokens. Attention over a long prompt stays a little below it: the G * R
completion tokens look back at all P prompt tokens in either variant, the prompt's own at half of them on average.

`memory` is what the rollout engine's cache holds for a group while it decodes, counted tensor by tensor, of narrower
models of one depth: `prompt_mib` once, `state_mib_per_completion` for every completion (keys and values of its own R
tokens in layers that attend, states and convolution rows in the others), and `peak_mib`, what the whole rollout adds to
a fresh process. `unshared_mib_per_completion` is what a completion takes whose past nobody shares.

    python bench/shared_prefix.py --json bench/results/shared_prefix.json
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from common import Row, in_fresh_process, parse_arguments, peak_memory_mib, report
from torch import Tensor, nn

from longrl import types
from longrl.engines import prefix_cache
from longrl.engines.hf import HFEngine
from longrl.models.qwen3_5 import Qwen3_5TextFamily
from longrl.models.text import TextFamily
from longrl.packing.pack import pack
from longrl.testing.tiny import tiny_qwen3_5_text, tiny_text

FAMILIES = {"qwen2": TextFamily, "qwen3_5": Qwen3_5TextFamily}
MIB = 2**20


@dataclass(frozen=True)
class Sizes:
    """What a run measures."""

    prompt_tokens: tuple[int, ...] = (1024, 4096, 8192)
    completions: tuple[int, ...] = (8, 16)
    response_tokens: int = 64
    timed_tokens: int = 20_000
    """The variants alternate until the separate one has seen this many tokens, at least once."""
    hidden_size: int = 384
    intermediate_size: int = 2048
    num_layers: int = 2
    """Of `qwen2`; `qwen3_5` has one period of its pattern, 4."""
    num_heads: int = 6
    num_key_value_heads: int = 2
    vocab_size: int = 1280
    models: tuple[str, ...] = tuple(FAMILIES)
    memory_prompts: tuple[int, ...] = (1024, 8192, 65536)


FULL = Sizes()
QUICK = Sizes(prompt_tokens=(1024,), completions=(8,), timed_tokens=1, memory_prompts=(4096,))
MEMORY = {"hidden_size": 128, "intermediate_size": 128, "num_layers": 4, "num_heads": 2, "num_key_value_heads": 1}
"""Sizes of the models whose caches are counted."""


@dataclass(frozen=True)
class Case:
    """One row: a model with a prompt and its completions."""

    sizes: Sizes
    model: str
    prompt_tokens: int
    completions: int
    folder: Path
    """Of the models' configs."""

    @property
    def family(self) -> TextFamily:
        return FAMILIES[self.model](str(self.folder / self.model), random_init=True)

    @property
    def prompt(self) -> types.Prompt:
        """Random tokens."""
        ids = self._random_ids(self.prompt_tokens, seed=0)
        row = types.Row(id="bench", problem="", answer="")
        return types.Prompt("bench", ids, self.family.position_ids(ids, ()), (), row)

    @property
    def answers(self) -> list[Tensor]:
        """G times [R] random tokens."""
        return [self._random_ids(self.sizes.response_tokens, seed=1 + i) for i in range(self.completions)]

    @property
    def advantages(self) -> Tensor:
        """[G]"""
        return torch.randn(self.completions, generator=torch.Generator().manual_seed(1))

    def _random_ids(self, count: int, seed: int) -> Tensor:
        return torch.randint(self.sizes.vocab_size, (count,), generator=torch.Generator().manual_seed(seed))


def write_models(sizes: Sizes, folder: Path) -> None:
    """Config and tokenizer of each model; sizes of linear heads are in Qwen3.5's proportion to the width."""
    common = {
        "vocab_size": sizes.vocab_size,
        "hidden_size": sizes.hidden_size,
        "intermediate_size": sizes.intermediate_size,
        "num_attention_heads": sizes.num_heads,
        "num_key_value_heads": sizes.num_key_value_heads,
    }
    head = sizes.hidden_size // sizes.num_heads
    linear = {
        "num_hidden_layers": 4,
        "head_dim": head,
        "linear_num_key_heads": sizes.num_heads // 2,
        "linear_num_value_heads": sizes.num_heads,
        "linear_key_head_dim": head,
        "linear_value_head_dim": head,
    }
    tiny_text(folder / "qwen2", num_hidden_layers=sizes.num_layers, **common)
    tiny_qwen3_5_text(folder / "qwen3_5", **common, **linear)


def packed_pass(case: Case, model: nn.Module) -> None:
    """Gradients of the whole group from one sequence."""
    _accumulate(case, model, case.answers, case.advantages)


def separate_pass(case: Case, model: nn.Module, completions: int | None = None) -> None:
    """The same gradients from one sequence per completion; `completions` stops after so many."""
    for i in range(completions or case.completions):
        _accumulate(case, model, case.answers[i : i + 1], case.advantages[i : i + 1])


def _accumulate(case: Case, model: nn.Module, answers: Sequence[Tensor], advantages: Tensor) -> None:
    """Forward and backward of one sequence: policy gradient, averaged over the tokens of the whole group."""
    (packed,) = pack([case.prompt], [answers], max_tokens=1 << 62)
    logp = case.family.forward(model, packed, {}).logp
    loss = -(logp * advantages[packed.completion_index]).sum() / (case.completions * case.sizes.response_tokens)
    loss.backward()


def measure(case: Case) -> tuple[Row, float]:
    """A row of the table, and the relative difference of the two variants' gradients."""
    model = case.family.build()
    _accumulate(case, model, [case.answers[0][:1]], case.advantages[:1])  # the first pass of a process is slow
    packed, separate = [], []
    tokens = case.completions * (case.prompt_tokens + case.sizes.response_tokens)
    for _ in range(max(1, case.sizes.timed_tokens // tokens)):
        packed.append(_timed(packed_pass, case, model)[0])
        seconds, separate_grads = _timed(separate_pass, case, model)
        separate.append(seconds)
        for _ in range(2):  # a pass is short: one that was disturbed must not decide the median
            seconds, packed_grads = _timed(packed_pass, case, model)
            packed.append(seconds)
    row = {
        "model": case.model,
        "prompt_tokens": case.prompt_tokens,
        "completions": case.completions,
        "response_tokens": case.sizes.response_tokens,
        "packed_s": statistics.median(packed),
        "separate_s": statistics.median(separate),
        "speedup": statistics.median(separate) / statistics.median(packed),
        "bound": tokens / (case.prompt_tokens + case.completions * case.sizes.response_tokens),
        "packed_peak_mib": in_fresh_process(pass_memory_mib, case, True),
        "separate_peak_mib": in_fresh_process(pass_memory_mib, case, False),
        "state_mib_per_completion": kept_while_decoding(dataclasses.replace(case, prompt_tokens=64))[1],
    }
    return row, float((packed_grads - separate_grads).norm() / separate_grads.norm())


def _timed(update: Callable[[Case, nn.Module], None], case: Case, model: nn.Module) -> tuple[float, Tensor]:
    """(seconds of one pass, its gradients as one vector)."""
    model.zero_grad()
    start = time.perf_counter()
    update(case, model)
    seconds = time.perf_counter() - start
    return seconds, torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def pass_memory_mib(case: Case, packed: bool) -> float:
    """Peak memory of one pass beyond what the process held before it; for a process that has done nothing else."""
    model = case.family.build()
    before = peak_memory_mib()
    if packed:
        packed_pass(case, model)
    else:
        separate_pass(case, model, min(2, case.completions))
    return peak_memory_mib() - before


class Kept(prefix_cache.PrefixCache):
    """A cache of which the last one made is remembered."""

    last: Kept

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        Kept.last = self


def kept_while_decoding(case: Case) -> tuple[float, float]:
    """MiB that a rollout keeps of the prompt, once, and of every completion."""
    sampling = types.SamplingParams(case.completions, case.sizes.response_tokens, temperature=1.0)
    with mock.patch.object(prefix_cache, "PrefixCache", Kept):
        HFEngine(max_sequences=case.completions).generate(
            case.family, case.family.build(), [case.prompt], {}, sampling, seed=0
        )
    of_prompt = [*Kept.last.prompts.values(), *Kept.last.prompt_pasts.values()]
    of_completions = [*Kept.last.completions.values(), *Kept.last.completion_pasts.values()]
    return _mib(of_prompt), _mib(of_completions) / case.completions


def _mib(tensors: Sequence[Sequence[Tensor]]) -> float:
    return sum(tensor.nbytes for tensor in itertools.chain.from_iterable(tensors)) / MIB


def rollout_memory(case: Case) -> tuple[float, float, float]:
    """`kept_while_decoding`, and the peak; for a process that has done nothing else."""
    before = peak_memory_mib()
    prompt, completion = kept_while_decoding(case)
    return prompt, completion, peak_memory_mib() - before


def measure_memory(case: Case) -> Row:
    """A row of `memory`."""
    prompt, completion, peak = in_fresh_process(rollout_memory, case)
    group = prompt + case.completions * completion
    return {
        "model": case.model,
        "prompt_tokens": case.prompt_tokens,
        "completions": case.completions,
        "prompt_mib": prompt,
        "state_mib_per_completion": completion,
        "group_mib": group,
        "shared_mib_per_completion": group / case.completions,
        "unshared_mib_per_completion": prompt + completion,
        "peak_mib": peak,
    }


def main(argv: Sequence[str] | None = None, sizes: Sizes | None = None) -> None:
    """The command; `sizes` replaces what `--quick` or its absence choose."""
    arguments = parse_arguments(__doc__, argv)
    sizes = sizes or (QUICK if arguments.quick else FULL)
    narrow = dataclasses.replace(sizes, **MEMORY)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_models(sizes, folder / "passes")
        write_models(narrow, folder / "memory")
        cases = itertools.product(sizes.models, sizes.prompt_tokens, sizes.completions)
        results = [measure(Case(sizes, *case, folder / "passes")) for case in cases]
        cases = itertools.product(sizes.memory_prompts, sizes.models, sizes.completions[:1])
        memory = [measure_memory(Case(narrow, model, P, G, folder / "memory")) for P, model, G in cases]
    errors = ", ".join(f"{error:.1e}" for _, error in results)
    settings = ", ".join(f"{name} {value}" for name, value in dataclasses.asdict(sizes).items())
    report(
        __file__,
        arguments,
        [row for row, _ in results],
        notes=[
            f"sizes: {settings}",
            "sizes of the models of `memory`: " + ", ".join(f"{name} {value}" for name, value in MEMORY.items()),
            f"relative difference of the two variants' gradients, row by row: {errors}",
        ],
        more={"memory": memory},
    )


if __name__ == "__main__":
    main()
