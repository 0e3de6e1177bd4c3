"""longrl as a model of lmms-eval (`--model longrl`), written for lmms-eval 0.7.2; only lmms-eval imports this file."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms

from longrl.evaluation.answering import Answer
from longrl.evaluation.local_policy import LocalPolicy
from longrl.harness.answerer import HarnessAnswerer, launched_ranks, sampling_of
from longrl.types import Row, SamplingParams, UnusableSample

Media = Mapping[str, Any]


class LongRL(lmms):
    """A policy of `python -m longrl evaluate`; `--model_args` are those of `HarnessAnswerer.from_options`.

    Example:
        `--model longrl --model_args config=configs/eval/harness.yaml,weights=runs/NAME,data.video.num_frames=64`

    Args:
        batch_size: prompts that are encoded and generated together, `data.eval_prompts_per_batch`; 1 leaves it to that.
        device: of the policy; by default it finds one.
        max_batch_size: of no effect.
        options: see `HarnessAnswerer.from_options`.
    """

    is_simple = False

    def __init__(
        self, batch_size: int | str | None = None, device: str | None = None, max_batch_size: int | None = None,
        **options: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        if batch_size is not None and str(batch_size) != "1":
            options["data.eval_prompts_per_batch"] = int(batch_size)
        if device is not None:
            options["policy.init_args.device"] = device
        self._rank, self._world_size = launched_ranks()
        self.answerer = HarnessAnswerer.from_options(**options)
        policy = self.answerer.config.policy
        # Where lmms-eval gathers what several processes have: the backend's own kind of device.
        self.device = policy.device if isinstance(policy, LocalPolicy) else torch.device("cpu")

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answers of all requests; those of one task and one way of sampling are asked together."""
        # 1. Rows by the way they are sampled; a question that is asked again is another draw.
        grouped: dict[tuple[SamplingParams, int], list[tuple[int, Row | UnusableSample]]] = defaultdict(list)
        times: Counter[tuple[str, SamplingParams]] = Counter()
        for index, request in enumerate(requests):
            _, doc_to_messages, generation, doc_id, task, split = request.args
            messages = doc_to_messages(self.task_dict[task][split][doc_id])
            name = f"{task}/{split}/{doc_id}"
            sampling = sampling_of(generation, self.answerer.own_sampling)
            grouped[sampling, times[name, sampling]].append((index, self._row(name, messages)))
            times[name, sampling] += 1

        # 2. Their answers.
        results: dict[int, GenerationResult] = {}
        for (sampling, draw), items in grouped.items():
            answers = self.answerer.answer([row for _, row in items], sampling, draw=draw)
            for (index, _), answer in zip(items, answers, strict=True):
                text = self.answerer.text(answer)
                counts = None
                if isinstance(answer, Answer):
                    counts = TokenCounts(answer.num_prompt_tokens, answer.num_completion_tokens[0])
                results[index] = GenerationResult(text, counts)
                self.cache_hook.add_partial("generate_until", (requests[index].args[0], requests[index].args[2]), text)
        return [results[index] for index in range(len(requests))]

    def _row(self, name: str, messages: Sequence[Mapping[str, Any]]) -> Row | UnusableSample:
        spans = []
        spoken = []
        for message in messages:
            content = message["content"]
            if not isinstance(content, str):
                spans += [_span_of(part) for part in content if part["type"] == "video"]
                content = [_as_part(part) for part in content]
            spoken.append({"role": message["role"], "content": content})
        if len(set(spans)) > 1:
            return UnusableSample(None, f"shows its videos from and to {spans}, and a row has one span", row_id=name)
        return self.answerer.row(name, spoken, spans[0] if spans else None)

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not here: a task of several rounds needs another model."""
        raise NotImplementedError("longrl answers tasks of one round (generate_until); leave this task out")

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Not here: answers are sampled."""
        raise NotImplementedError("longrl answers by sampling (generate_until); leave tasks with loglikelihood out")

    def clean(self) -> None:
        """The evaluation is over."""
        self.answerer.close()
        super().clean()


def _source(part: Media) -> Any:
    """File or picture of a part, which may be within the dict that tasks with spans give."""
    url = part.get("url")
    return url.get("url") or url.get("path") or url.get("video") if isinstance(url, Mapping) else url


def _as_part(part: Media) -> Media:
    """A part of lmms-eval's messages as one of a record."""
    return part if part["type"] == "text" else {"type": part["type"], part["type"]: _source(part)}


def _span_of(part: Media) -> tuple[float, float] | None:
    """Seconds from and to which a video is shown."""
    url = part.get("url")
    given = {**url, **part} if isinstance(url, Mapping) else part
    start = given.get("start_time", given.get("video_start"))
    end = given.get("end_time", given.get("video_end"))
    if start is None and end is None:
        return None
    return float(start or 0.0), float("inf") if end is None else float(end)
