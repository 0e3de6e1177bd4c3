"""A teacher behind vLLM servers: it costs the run's GPUs nothing but, where it sees media, their encoder.

Letters: P prompts of a call, N sampled tokens of all that follows them, T prompt tokens, S tokens of a completion, of
which some were shown; k of the likeliest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from longrl.algorithms.distillation import Distillation
from longrl.engines.scoring_servers import ScoredGroup, ScoringServers
from longrl.engines.server_scores import MAX_TOP
from longrl.engines.vllm_options import Fields
from longrl.engines.vllm_turns import request_of
from longrl.features.cache import FeatureCache
from longrl.io.number_ranges import NOT_NEGATIVE, SECONDS, SECONDS_OR_ZERO, check_ranges
from longrl.models.base import CausalFamily
from longrl.models.same_tokens import check_same_tokens
from longrl.modules.scoring import all_media
from longrl.modules.teachers import Teacher, TeacherRun, TeacherScores
from longrl.packing.pack import Continuations, continuations
from longrl.types import Continuation, Features, Prompt


class ServerTeacher(Teacher):
    """A model that `python -m longrl serve --weights family` serves, on GPUs or nodes of its own.

    It says the log-probability of each sampled token and, for `model.distillation.top_k`, of the likeliest ones. Media
    are encoded here, by the teacher's own encoder: its model is built once on the host, and the rest let go of.

    Args:
        urls: of the servers, which all serve the same model.
        family: the model, as the servers' configs have it; its tokenizer must be the policy's.
        tasks: of rows that it teaches; None is all.
        timeout_s: of one answer, all completions of a rank's step together.
        start_timeout_s: how long the first contact waits for servers that are still starting.
        recover_timeout_s: how long a run waits where no server is left; then it ends. 0: at once.
        retries: further attempts where the only server cannot be reached or is busy, after 1, 2, 4... seconds.
        feature_cache_bytes: features of its encoder kept between steps.

    Example:
        `ServerTeacher("http://127.0.0.1:8001", family)` beside `python -m longrl serve --config C --port 8001
        --weights family`
    """

    family: CausalFamily

    def __init__(
        self,
        urls: list[str] | str,
        family: CausalFamily,
        tasks: list[str] | None = None,
        timeout_s: float = 1800.0,
        start_timeout_s: float = 600.0,
        recover_timeout_s: float = 600.0,
        retries: int = 4,
        feature_cache_bytes: int = 1 << 30,
    ) -> None:
        super().__init__(tasks)
        times = {"timeout_s": SECONDS, "start_timeout_s": SECONDS_OR_ZERO, "recover_timeout_s": SECONDS_OR_ZERO}
        counts = {"retries": NOT_NEGATIVE, "feature_cache_bytes": NOT_NEGATIVE}
        check_ranges(locals(), "model.teacher.init_args.", **times, **counts)
        self.family = family
        self.feature_cache_bytes = feature_cache_bytes
        owner = type(self).__name__
        self.servers = ScoringServers(urls, owner, timeout_s, start_timeout_s, recover_timeout_s, retries)
        self._encoder: nn.Module | None = None
        self._run: TeacherRun
        self._features: FeatureCache

    @override
    def setup(self, student: CausalFamily, distillation: Distillation, temperature: float = 1.0) -> None:
        check_same_tokens(student, self.family)
        if distillation.needs_distribution and distillation.top_k is None:
            raise ValueError(
                f"model.distillation.divergence={distillation.divergence} compares whole distributions, of which a "
                "server sends the likeliest tokens alone, got top_k=None; set model.distillation.top_k (64 is usual), "
                "or divergence to sampled"
            )
        if distillation.top_k is not None and distillation.top_k > MAX_TOP:
            raise ValueError(
                f"model.distillation.top_k must be at most {MAX_TOP} of a teacher behind a server, got "
                f"{distillation.top_k}; lower it"
            )
        _check_temperature(distillation.teacher_temperature(temperature))

    @override
    def start(self, run: TeacherRun) -> None:
        self._run = run
        self._features = FeatureCache(self.family, self.feature_cache_bytes, run.parallel)
        self.servers.start(self.family, run.parallel.world)

    @override
    def close(self) -> None:
        self.servers.close()

    @override
    def score(self, prompts: Sequence[Prompt], completions: Continuations, temperature: float) -> TeacherScores:
        """See `Teacher.score`.

        Raises:
            ServersLost: no server is left.
            ValueError: another temperature than 1, a prompt that is too long for a server, or a family whose media no
                server can score behind.
        """
        _check_temperature(self._run.distillation.teacher_temperature(temperature))
        read = [prompt.teacher or prompt for prompt in prompts]
        groups = continuations(completions)
        features = self._encode(read, groups)
        # The ranks of a sequence-parallel group have the same prompts: each asks about its part.
        world, sp_group = self._run.parallel.world, self._run.parallel.sp_group
        sampled = [[one for one in group if len(one.token_ids)] for group in groups]  # of no token there is nothing
        asked = [(prompt, group) for prompt, group in zip(read, sampled, strict=True) if group]
        with world.raise_on_any_rank():
            mine = self._ask(asked[sp_group.rank :: sp_group.size], features)
        by_rank = sp_group.gather(mine)
        answers = [by_rank[index % sp_group.size][index // sp_group.size] for index in range(len(asked))]
        return self._scores(
            [one for _, group in asked for one in group], [said for of_group in answers for said in of_group]
        )

    def _encode(self, prompts: Sequence[Prompt], groups: Sequence[Sequence[Continuation]]) -> Features:
        """Features of all media by the teacher's encoder, which is built when the first comes."""
        has_media = all_media(prompts, groups)
        if not any(one.media for one in has_media):
            return {}
        if self._encoder is None:
            self._encoder = encoder_of(self.family, self._run.device)
        return self._features.get_or_encode(self._encoder, has_media)

    def _ask(self, asked: Sequence[tuple[Prompt, Sequence[Continuation]]], features: Features) -> list[Fields]:
        """The servers' answers about some prompts' completions."""
        groups = []
        for prompt, group in asked:
            longest = len(prompt.input_ids) + max(len(one.token_ids) for one in group)
            if longest + 1 > self.servers.max_model_len:  # vLLM samples a token behind them
                raise ValueError(
                    f"a teacher's prompt and its completion have {longest} tokens, but its server takes "
                    f"--max_model_len={self.servers.max_model_len} with one behind them; raise that to {longest + 1}, "
                    "or lower data.teacher_view.max_prompt_tokens"
                )
            requests = [scored_request(self.family, prompt, one, features) for one in group]
            groups.append(ScoredGroup(requests, [len(one.token_ids) for one in group]))
        return self.servers.scores(groups, self._run.distillation.top_k or 0) if groups else []

    def _scores(self, scored: Sequence[Continuation], answers: Fields) -> TeacherScores:
        """What was said of sampled tokens, on the run's device."""
        device = self._run.device
        top_k = self._run.distillation.top_k
        logps, ids, top = [torch.zeros(0)], [torch.zeros(0, top_k or 0, dtype=torch.int64)], []
        for one, answer in zip(scored, answers, strict=True):
            kept = slice(None) if one.sampled is None else one.sampled
            logps.append(torch.tensor(answer["logprobs"])[kept])
            if top_k is not None:
                ids.append(torch.tensor(answer["top_ids"])[kept])
                top.append(torch.tensor(answer["top_logprobs"])[kept])
        num_passes = float(sum(answer["read"] for answer in answers))
        logp = torch.cat(logps).to(device)
        if top_k is None:
            return TeacherScores(logp, num_passes=num_passes)
        top_logp = torch.cat([torch.zeros(0, top_k), *top]).to(device)
        return TeacherScores(logp, torch.cat(ids).to(device), top_logp, num_passes=num_passes)


def encoder_of(family: CausalFamily, device: torch.device) -> nn.Module:
    """The family's model with the weights of its encoders alone; the others are empty."""
    model = family.build().eval().requires_grad_(False)
    encoders = family.media_encoders(model)
    kept: set[int] = set()
    for encoder in encoders:
        kept |= {id(weight) for weight in encoder.parameters()}
    for weight in model.parameters():
        if id(weight) not in kept:
            weight.data = weight.data.new_empty(0)
    for encoder in encoders:
        encoder.to(device)
    return model


def scored_request(
    family: CausalFamily, prompt: Prompt, continuation: Continuation, features: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Prompt and completion as a server scores them."""
    length = len(continuation.token_ids)
    positions = continuation.position_ids
    if positions is None:
        positions = torch.arange(length).expand(len(prompt.position_ids), -1)
    whole = replace(
        prompt,
        input_ids=torch.cat([prompt.input_ids, continuation.token_ids]),
        position_ids=torch.cat([prompt.position_ids, prompt.position_ids.max() + 1 + positions], 1),
        media=(*prompt.media, *continuation.media),
    )
    sampled = continuation.sampled
    mask = torch.ones(length, dtype=torch.bool) if sampled is None else sampled
    request = request_of(family, whole, mask, features)
    if "prompt_embeds" in request:
        raise ValueError(
            f"{type(family).__name__} hands media to vLLM as embeddings, of which vLLM returns no log-probabilities; "
            "use longrl.modules.local_teacher.LocalTeacher, or data.blind=true"
        )
    return request


def _check_temperature(temperature: float) -> None:
    if temperature != 1.0:
        raise ValueError(
            f"a teacher behind a server scores at temperature 1, got {temperature:g}; set "
            "model.distillation.temperature to 1, or use longrl.modules.local_teacher.LocalTeacher"
        )
