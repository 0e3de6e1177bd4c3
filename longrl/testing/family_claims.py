"""The checks behind `longrl.testing.check_family`: one function for each claim. Each says what it compared, or raises.

Letters: N log-probabilities of all completions' tokens.
"""

from __future__ import annotations

import copy
import functools
import json
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

from longrl.engines.hf import HFEngine
from longrl.engines.weight_stream import engine_weights
from longrl.features.cache import FeatureCache
from longrl.features.disk_cache import DiskCache
from longrl.models.base import CausalFamily
from longrl.models.reading import constructor_options
from longrl.packing import delta_kernels
from longrl.packing.pack import Continuations, continuations, pack
from longrl.strategies.axis import Axis
from longrl.strategies.parallel import Parallel
from longrl.strategies.sequence import SequenceParallel
from longrl.testing import plain_forward
from longrl.testing.gloo_ranks import run_on_ranks
from longrl.testing.packed_scores import NO_LIMIT, loss_weights, packed_scores
from longrl.testing.sample_prompts import local_frames, noise_frames, random_completions
from longrl.testing.sample_turns import random_turns
from longrl.types import FULL_SHARD, FrameShard, Media, MediaKind, Prompt, SamplingParams

LENGTHS = ((3, 7, 1, 4), (5,), (2, 9))
"""Tokens of each prompt's completions."""
TOLERANCE = 1e-5
NUM_GREEDY_TOKENS = 6


class DoesNotApply(Exception):
    """A claim says nothing of this family, or cannot be checked here; the reason."""


@dataclass
class Case:
    """A family, and what its checks share."""

    family: CausalFamily
    make_prompts: Callable[[CausalFamily, FrameShard], list[Prompt]]
    plain_model: Callable[[nn.Module, CausalFamily], nn.Module]
    media_inputs: plain_forward.MediaInputs
    num_ranks: int
    folder: Path
    shard: FrameShard = FULL_SHARD
    """The part of all media that this process decodes."""

    @functools.cached_property
    def model(self) -> Any:
        """Built once; checks leave no gradients on it."""
        return self.family.build()

    @functools.cached_property
    def plain(self) -> nn.Module:
        """The same weights in the model that ours is compared with."""
        return self.plain_model(self.model, self.family)

    @functools.cached_property
    def prompts(self) -> list[Prompt]:
        """Rendered once, with this process's part of all media."""
        return self.make_prompts(self.family, self.shard)

    @functools.cached_property
    def completions(self) -> list[list[Tensor]]:
        """Several of the first prompt, others of the next."""
        lengths = [LENGTHS[index % len(LENGTHS)] for index in range(len(self.prompts))]
        return random_completions(self.family, lengths)

    def features(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """Features of all media in some prompts, by key."""
        return FeatureCache(self.family).get_or_encode(self.model, prompts)


# ---- what needs no weights ----


def check_identity(case: Case) -> str:
    """`identity` is made of plain values, and the same in a worker."""
    family = case.family
    identity = family.identity()
    is_plain = json.loads(json.dumps(identity)) == identity
    assert is_plain, "identity() must hold plain values: text, numbers, lists, dicts"
    worker = pickle.loads(pickle.dumps(family))
    assert worker.identity() == identity, "a worker's copy has another identity"
    parts = type(family).__mro__
    training = {name for part in parts for name in vars(part).get("training_options", ())}
    trained = sorted(training & identity.keys())
    assert not trained, f"{', '.join(trained)} must not be in identity(): stored answers would depend on training"
    left_out = sorted({name for part in parts for name in constructor_options(part)} - training - identity.keys())
    left_out = [name for name in left_out if name not in family.later_options]
    assert not left_out, (
        f"{', '.join(left_out)} must be in identity(), or in training_options if no answer depends on it"
    )
    return "plain values, the same in a worker"


def check_prompts(case: Case) -> str:
    """Placeholders, positions and media agree, and a loader worker renders the same."""
    family = case.family
    worker = pickle.loads(pickle.dumps(family))
    again = case.make_prompts(worker, FULL_SHARD)
    for prompt, other in zip(case.prompts, again, strict=True):
        length = len(prompt.input_ids)
        expected = (family.num_axes, length)
        shape = tuple(prompt.position_ids.shape)
        assert shape == expected, f"position_ids of {prompt.id!r} are {shape} instead of [num_axes, T] = {expected}"
        tokens = family.media_token_ids()
        for token in {*tokens.values()}:
            num_features = sum(family.num_features(item) for item in prompt.media if tokens[item.kind] == token)
            num_tokens = int((prompt.input_ids == token).sum())
            error = f"prompt {prompt.id!r} has {num_tokens} media placeholders for {num_features} features"
            assert num_tokens == num_features, error
        same = torch.equal(prompt.input_ids, other.input_ids) and torch.equal(prompt.position_ids, other.position_ids)
        assert same, f"a worker's copy renders {prompt.id!r} otherwise"
    return f"{len(case.prompts)} prompts, {sum(len(prompt.media) for prompt in case.prompts)} media"


def check_patches(case: Case) -> str:
    """Grid and key need no pixels, and parts of a video are patched as in the whole one."""
    family = case.family
    kinds: list[MediaKind] = [kind for kind in ("image", "video") if kind in family.media_token_ids()]
    if not kinds:
        raise DoesNotApply("it reads no images or videos")
    for kind in kinds:
        num_frames = 1 if kind == "image" else 7
        for height, width in ((60, 90), (113, 40)):
            frames = noise_frames(num_frames, height, width, kind=kind)
            item = family.patch(frames)
            size = f"{num_frames} frames of {height} x {width}"
            assert family.grid(num_frames, height, width, kind=kind) == item.grid_thw, f"grid of {size} is not patch's"
            outline = family.outline_media(replace(frames, pixels=frames.pixels[:0]))
            assert (outline.key, outline.grid_thw) == (item.key, item.grid_thw), f"the key of {size} needs its pixels"
            resized = family.patch(family.resize(frames))
            assert torch.equal(resized.patches, item.patches), f"patches of {size} change with an earlier resize"
            parts = []
            for rank in range(3):
                local = local_frames(frames, FrameShard(rank, 3), family.temporal_patch_size)
                part = family.patch(family.resize(local) if len(local.pixels) else local)
                assert (part.key, part.grid_thw) == (item.key, item.grid_thw), f"a part of {size} has another key"
                parts += [part.patches] if len(part.patches) else []
            assert torch.equal(torch.cat(parts), item.patches), f"parts of {size} are patched otherwise than the whole"
    return f"{' and '.join(kinds)}: grid, key, resize, parts"


def check_planning_sizes(case: Case) -> str:
    """`planning_sizes` are those of the model that is built."""
    text, vision = case.family.planning_sizes()
    vocabulary, hidden = head = case.model.get_output_embeddings().weight.shape
    assert (text.vocabulary, text.hidden) == head, f"{text} is not the LM head's {[*head]}"
    encoders = case.family.media_encoders(case.model)
    if not encoders:
        return f"hidden size {hidden}, vocabulary {vocabulary}, no encoder"
    if vision is None:
        raise DoesNotApply("planning_sizes() tells none of the encoder: `plan` counts text alone")
    widths = {size for parameter in encoders[0].parameters() for size in parameter.shape}
    assert {vision.width, vision.mlp_width} <= widths, f"the encoder has no weights of the sizes in {vision}"
    return f"hidden size {hidden}, vocabulary {vocabulary}, encoder width {vision.width}"


def check_features(case: Case) -> str:
    """A media item has as many features as its grid says, of the size that the text stack reads.

    And an encoder behind another runs once for all media, as `media_encoders` asks.
    """
    family = case.family
    media = [item for prompt in case.prompts for item in prompt.media]
    if not media:
        raise DoesNotApply("it reads no media")
    for item in media:
        with torch.no_grad():
            (features,) = family.encode_media(case.model, [item])
        shape = tuple(features.shape)
        expected = (family.num_features(item), family.feature_size)
        assert shape == expected, f"features of {item.kind} {item.grid_thw} are {shape} instead of {expected}"
    _check_runs_once(case, media)
    return f"{len(media)} media"


def _check_runs_once(case: Case, media: Sequence[Media]) -> None:
    """Raises AssertionError if an encoder that reads what another gives, with gradients, runs twice for some media."""
    ran: list[str] = []

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        ran.extend([type(module).__name__] * any(value.requires_grad for value in given))

    encoders = case.family.media_encoders(case.model)
    hooks = [encoder.register_forward_pre_hook(note, with_kwargs=True) for encoder in encoders]
    case.family.encode_media(case.model, media)
    for hook in hooks:
        hook.remove()
    assert len(ran) == len({*ran}), (
        f"{ran[0]} runs {len(ran)} times behind another encoder for {len(media)} media; it must run once: sharded "
        "ranks with other media would wait for each other in the backward pass"
    )


# ---- log-probabilities ----


def _compare(what: str, ours: Tensor, expected: Tensor) -> float:
    """The relative error; raises AssertionError if it is more than rounding."""
    error = float((ours.double() - expected.double()).norm() / expected.double().norm())
    assert error <= TOLERANCE, f"{what} are off by {error:.1e} of their norm"
    return error


def check_same_logits(case: Case) -> str:
    """A prompt with one completion has the logits of a plain forward."""
    worst = 0.0
    for prompt, (completion, *_) in zip(case.prompts, case.completions, strict=True):
        with torch.no_grad():
            expected = plain_forward.plain_logits(case.plain, prompt, completion, case.media_inputs)
            (packed,) = pack([prompt], [[completion]], NO_LIMIT)
            inputs = case.family.text_inputs(case.model, packed, case.features([prompt]))
            positions = packed.position_ids[:, None]
            hidden = case.family.hidden_states(case.model, positions, spans=packed.spans, **inputs)[0]
            logits = hidden[packed.predict_from] @ case.model.get_output_embeddings().weight.T
        worst = max(worst, _compare(f"logits of prompt {prompt.id!r}", logits, expected))
    return f"largest relative error {worst:.0e}"


def check_shared_prefix(case: Case) -> str:
    """Packed groups have the log-probabilities and gradients of one forward for each completion."""
    return _compare_packed(case, case.completions)


def check_observations(case: Case) -> str:
    """So have groups whose completions are shown text and media between their turns, at the family's positions."""
    completions = random_turns(case.family, case.prompts)
    num_media = 0
    for prompt, group in zip(case.prompts, completions, strict=True):
        for completion in group:
            num_media += len(completion.media)
            whole = plain_forward.whole_sequence(prompt, completion)
            counted = case.family.position_ids(whole.input_ids, whole.media)
            assert torch.allclose(whole.position_ids, counted), (
                f"positions of what a completion of {prompt.id!r} is shown are not those of the whole sequence: "
                "position_ids must count a part behind others as it counts the part alone, from there on"
            )
    return f"{_compare_packed(case, completions)}, with {num_media} media within completions"


def _compare_packed(case: Case, completions: Continuations) -> str:
    """Compares scores and gradients of packed groups with those of one forward for each completion."""
    expected = plain_forward.separate_logps(case.plain, case.prompts, completions, case.media_inputs)
    weights = loss_weights(len(expected))
    case.plain.zero_grad()
    (expected * weights).sum().backward()
    trains = {name for name, parameter in case.model.named_parameters() if parameter.requires_grad}
    grads = {name: grad for name, grad in plain_forward.gradients(case.plain).items() if name in trains}
    groups = zip(case.prompts, continuations(completions), strict=True)
    longest = max(len(prompt.input_ids) + max(len(one.token_ids) for one in group) for prompt, group in groups)
    with mock.patch.object(delta_kernels, "CHUNK_ROWS", 32):
        _, alone = packed_scores(case.family, case.model, case.prompts, completions, share_prefix=False)
    noise = plain_forward.decay_noise(alone, grads)
    for max_tokens in (longest, NO_LIMIT):
        logps, ours = packed_scores(case.family, case.model, case.prompts, completions, max_tokens=max_tokens)
        _compare("log-probabilities of packed groups", logps, expected.detach())
        plain_forward.assert_same_gradients(ours, grads, noise=noise)
    return f"{len(weights)} log-probabilities and {len(grads)} gradients, packed and one by one"


def check_sft(case: Case) -> str:
    """The loss of a response is the plain model's cross-entropy, and the response ends with the end token."""
    pairs = [(prompt, prompt.response.token_ids) for prompt in case.prompts if prompt.response is not None]
    if not pairs:
        raise DoesNotApply("no prompt has a response")
    prompts, responses = zip(*pairs, strict=True)
    for ids in responses:
        assert int(ids[-1]) in case.family.end_token_ids, "a response must end with one of end_token_ids"
    with torch.no_grad():
        logits = [plain_forward.plain_logits(case.plain, prompt, ids, case.media_inputs) for prompt, ids in pairs]
        expected = float(nn.functional.cross_entropy(torch.cat(logits), torch.cat(responses)))
        (packed,) = pack(prompts, [[ids] for ids in responses], NO_LIMIT)
        loss = -float(case.family.forward(case.model, packed, case.features(prompts)).logp.mean())
    assert abs(loss - expected) <= TOLERANCE * abs(expected), f"the loss is {loss} instead of {expected}"
    return f"loss {loss:.4f} of {len(responses)} responses"


def check_generation(case: Case) -> str:
    """Greedy tokens are the plain model's argmax, step by step."""
    greedy = SamplingParams(num_generations=1, max_completion_tokens=NUM_GREEDY_TOKENS, temperature=0.0)
    # Few tokens at a time, so that a chunk ends within a prompt.
    engine = HFEngine(prefill_chunk_tokens=17)
    groups = engine.generate(case.family, case.model, case.prompts, case.features(case.prompts), greedy, seed=0)
    for prompt, (completion,) in zip(case.prompts, groups, strict=True):
        ids = completion.token_ids
        with torch.no_grad():
            expected = plain_forward.plain_logits(case.plain, prompt, ids, case.media_inputs).argmax(-1)
        assert torch.equal(ids, expected), f"{prompt.id!r} goes on with {ids.tolist()} instead of {expected.tolist()}"
        assert completion.text == case.family.decode(ids)
    return f"{sum(len(completion.token_ids) for (completion,) in groups)} tokens"


# ---- features, engines, files ----


def check_cached_features(case: Case) -> str:
    """Features from disk are those of the encoder to the last bit, and it does not run."""
    family = case.family
    model = copy.deepcopy(case.model).requires_grad_(False)
    if not family.media_encoders(model):
        raise DoesNotApply("it has no encoder")
    fresh = FeatureCache(family).get_or_encode(model, case.prompts)
    try:
        family.encoder_settings()
    except ValueError as error:
        raise DoesNotApply(str(error)) from error
    folder = str(case.folder / "features")
    FeatureCache(family, disk=DiskCache(family, folder, NO_LIMIT)).get_or_encode(model, case.prompts)
    for encoder in family.media_encoders(model):
        encoder.register_forward_pre_hook(_refuse_to_run)
    stored = FeatureCache(family, disk=DiskCache(family, folder, NO_LIMIT)).get_or_encode(model, case.prompts)
    assert stored.keys() == fresh.keys()
    assert all(torch.equal(stored[key], fresh[key]) for key in fresh), "features from disk differ from fresh ones"
    return f"{len(fresh)} media, to the last bit"


def _refuse_to_run(*_: object) -> None:
    raise AssertionError("an encoder ran although its features are on disk")


def check_engine(case: Case) -> str:
    """Weights go to an engine under names of their own, all but those of encoders; every prompt makes a request."""
    names = [name for name, _ in engine_weights(case.family, case.model)]
    assert names, "engine_weight() knows no weight of the model"
    assert len(names) == len({*names}), "two weights have one name in the engine"
    features = case.features(case.prompts)
    for prompt in case.prompts:
        request = case.family.engine_request(prompt, features)
        assert {"prompt_token_ids", "prompt_embeds"} & request.keys(), f"{prompt.id!r} makes the request {[*request]}"
    return f"{len(names)} weights, {len(case.prompts)} requests; vLLM itself did not run"


def check_export(case: Case) -> str:
    """An exported folder holds the weights' bits, for this family and for transformers, and the same tokenizer."""
    folder = case.folder / "exported"
    case.family.export(case.model, folder)
    reader = copy.copy(case.family)
    for name in ("config", "tokenizer", "processor"):
        vars(reader).pop(name, None)
    reader.model_path = str(folder)
    reader.random_init = False
    expected = case.model.state_dict()
    loaded = {type(reader).__name__: reader.build()}
    auto_class = case.family.auto_class()
    if auto_class.__module__.startswith("transformers."):
        loaded[auto_class.__name__] = auto_class.from_pretrained(folder, dtype="auto")
    for name, model in loaded.items():
        weights = model.state_dict()
        assert weights.keys() == expected.keys(), f"{name} reads other weights than were written"
        different = [key for key in expected if not torch.equal(weights[key], expected[key])]
        assert not different, f"{name} reads other bits of {different[:3]}"
    again = case.make_prompts(reader, FULL_SHARD)
    same = all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(again, case.prompts, strict=True))
    assert same, "the exported folder renders prompts otherwise"
    return f"{len(expected)} weights by {' and '.join(loaded)}"


# ---- ranks ----


def check_sequence_parallel(case: Case) -> str:
    """Ranks that share sequences and media get the scores and gradients of one rank."""
    if not case.family.supports_sequence_parallel:
        raise DoesNotApply("supports_sequence_parallel is False")
    if case.num_ranks == 1:
        raise DoesNotApply("num_ranks is 1")
    logps, grads = _scores_of_turns(case)
    # Without what is built already, and without functions that ranks do not call.
    bare = replace(case, plain_model=plain_forward.stock_model, media_inputs=plain_forward.qwen_media_inputs)
    for theirs, their_grads in run_on_ranks(_on_a_rank, case.num_ranks, bare):
        _compare(f"log-probabilities of {case.num_ranks} ranks", theirs, logps)
        plain_forward.assert_same_gradients(their_grads, grads)
    return f"{len(logps)} log-probabilities and {len(grads)} gradients on {case.num_ranks} ranks"


def _scores_of_turns(case: Case, *ranks: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Of completions with and without observations, whose media are shared, too."""
    completions = random_turns(case.family, case.prompts, case.shard)
    return packed_scores(case.family, case.model, case.prompts, completions, *ranks)


def _on_a_rank(case: Case) -> tuple[Tensor, dict[str, Tensor]]:
    axis = Axis.of(dist.group.WORLD)
    parallel = Parallel(world=axis, sp_group=axis)
    case = replace(case, shard=FrameShard(axis.rank, axis.size))
    logps, grads = _scores_of_turns(case, parallel, SequenceParallel(axis))
    # A rank has the part that flowed through its rows; one without any of a weight has no gradient of it.
    zeros = {name: torch.zeros_like(p) for name, p in case.model.named_parameters() if p.requires_grad}
    total = {name: axis.sum(grads.get(name, zero)) for name, zero in zeros.items()}
    return logps, {name: grad for name, grad in total.items() if grad.any()}
