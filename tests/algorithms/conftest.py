"""Several ranks on threads, for what sums over ranks."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

Run = Callable[[Any, Callable[[torch.Tensor], torch.Tensor]], Any]


@pytest.fixture
def over_ranks() -> Callable[[Run, Sequence[Any]], list[Any]]:
    """`over_ranks(run, parts)` is `run(part, all_reduce)` of one rank per part, with sums that wait for all of them."""

    def run_all(run: Run, parts: Sequence[Any]) -> list[Any]:
        barrier = threading.Barrier(len(parts), timeout=30)
        given: dict[int, torch.Tensor] = {}

        def on_rank(rank: int) -> Any:
            def all_reduce(values: torch.Tensor) -> torch.Tensor:
                given[rank] = values
                barrier.wait()
                total = torch.stack([given[other] for other in range(len(parts))]).sum(0)
                barrier.wait()
                return total

            return run(parts[rank], all_reduce)

        with ThreadPoolExecutor(len(parts)) as pool:
            return list(pool.map(on_rank, range(len(parts))))

    return run_all


@pytest.fixture(scope="session")
def scattered_completions() -> Callable[[Sequence[int], int], tuple[torch.Tensor, ...]]:
    """Completions whose tokens lie in any order: index, logp (with gradient), old [R], advantages, weights [C]."""

    def draw(lengths: Sequence[int], seed: int) -> tuple[torch.Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        index = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        index = index[torch.randperm(len(index), generator=generator)]
        logp, old = torch.randn(2, len(index), dtype=torch.float64, generator=generator) / 2
        advantages, weights = torch.randn(2, len(lengths), dtype=torch.float64, generator=generator)
        return index, logp.requires_grad_(), old, advantages, weights

    return draw
