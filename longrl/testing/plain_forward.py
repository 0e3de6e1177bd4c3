"""The same weights in a stock transformers model: one ordinary forward with all pixels for each completion."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from longrl.models.base import CausalFamily
from longrl.packing.pack import Continuations, continuations
from longrl.types import Continuation, Prompt

MediaInputs = Callable[[Prompt], Mapping[str, Any]]
"""Keywords by which a model's own forward takes the media of a prompt."""


def stock_model(model: nn.Module, family: CausalFamily) -> nn.Module:
    """A copy of the family's model as transformers builds it, with its own eager attention."""
    plain = family.auto_class().from_config(copy.deepcopy(family.config), attn_implementation="eager")
    plain = plain.to(next(model.parameters()).dtype)
    plain.load_state_dict(model.state_dict())
    return plain


def qwen_media_inputs(prompt: Prompt) -> dict[str, Any]:
    """The media of a prompt by the names that Qwen's models have for them: patches and grids, spectrograms."""
    inputs: dict[str, Any] = {}
    names = {"video": ("pixel_values_videos", "video_grid_thw"), "image": ("pixel_values", "image_grid_thw")}
    for kind, (values, grid) in names.items():
        media = [item for item in prompt.media if item.kind == kind]
        if media:
            inputs[values] = torch.cat([item.patches for item in media])
            inputs[grid] = torch.tensor([item.grid_thw for item in media])
    spectrograms = [item.patches for item in prompt.media if item.kind == "audio"]
    if spectrograms:
        lengths = torch.tensor([len(item) for item in spectrograms])
        inputs["input_features"] = nn.utils.rnn.pad_sequence(spectrograms, batch_first=True).mT
        inputs["feature_attention_mask"] = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    return inputs


def whole_sequence(prompt: Prompt, completion: Continuation) -> Prompt:
    """A prompt and what follows it as one prompt of T + S tokens, with all media."""
    following = completion.position_ids
    if following is None:
        following = torch.arange(len(completion.token_ids)).expand(len(prompt.position_ids), -1)
    start = prompt.position_ids.max() + 1
    return replace(
        prompt,
        input_ids=torch.cat([prompt.input_ids, completion.token_ids]),
        position_ids=torch.cat([prompt.position_ids, start + following], 1),  # [A, T + S]
        media=prompt.media + completion.media,
    )


def plain_logits(
    plain: nn.Module, prompt: Prompt, completion: Continuation | Tensor, media_inputs: MediaInputs = qwen_media_inputs
) -> Tensor:
    """[n, V] logits of a completion's sampled tokens; token ids alone were all sampled.

    Positions on one axis are the model's own, those on several the prompt's: transformers counts some media otherwise
    than the models' released code, see `longrl.models.qwen_vl`.
    """
    if not isinstance(completion, Continuation):
        completion = Continuation(completion)
    whole = whole_sequence(prompt, completion)
    inputs = dict(media_inputs(whole))
    if len(prompt.position_ids) > 1:
        inputs["position_ids"] = whole.position_ids[:, None]  # [A, 1, T + S]
    logits = plain(input_ids=whole.input_ids[None], **inputs).logits[0]
    logits = logits[len(prompt.input_ids) - 1 : -1]  # [S, V]
    return logits if completion.sampled is None else logits[completion.sampled]


def separate_logps(
    plain: nn.Module,
    prompts: Sequence[Prompt],
    completions: Continuations,
    media_inputs: MediaInputs = qwen_media_inputs,
) -> Tensor:
    """[N] float64 log-probabilities of all completions' sampled tokens, a forward for each completion."""
    logps = []
    for prompt, group in zip(prompts, continuations(completions), strict=True):
        for completion in group:
            ids = completion.token_ids if completion.sampled is None else completion.token_ids[completion.sampled]
            logp = plain_logits(plain, prompt, completion, media_inputs).double().log_softmax(-1)
            logps.append(logp.gather(-1, ids[:, None])[:, 0])
    return torch.cat(logps)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Name -> gradient of all parameters that have one, by their names without peft's prefix."""
    grads = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        if grad is not None:
            grad = grad.full_tensor() if isinstance(grad, DTensor) else grad.clone()
            grads[name.removeprefix("base_model.model.")] = grad
    return grads


def assert_same_gradients(
    ours: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    tolerance: float = 1e-5,
    noise: Mapping[str, float] | None = None,
) -> None:
    """Compares every parameter's gradient by its relative error; where one is rounding noise, relative to the largest.

    Args:
        ours: by name.
        expected: by name.
        tolerance: relative.
        noise: norms of further differences that may be, by name; see `decay_noise`.

    Raises:
        AssertionError: with the first parameter that differs, or the names that only one side has.
    """
    assert ours.keys() == expected.keys(), f"gradients of one side alone: {sorted(ours.keys() ^ expected.keys())[:5]}"
    largest = max(float(grad.norm()) for grad in expected.values())
    for name, grad in expected.items():
        norm = float(grad.norm())
        error = float((ours[name] - grad).norm())
        allowed = tolerance * max(norm, 1e-4 * largest) + (noise or {}).get(name, 0.0)
        assert error <= allowed, f"gradient of {name} is off by {error:g} of {norm:g}"


DECAY_WEIGHTS = (".A_log", ".dt_bias", ".in_proj_a.")
"""Weights of a gated delta net whose gradients are small differences of large sums, so that float32 rounds them."""
LARGEST_NOISE = 2e-3
"""Of such a gradient's norm."""


def decay_noise(ours: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """What float32 leaves open in the gradients of decays, measured: norms by name, none in models without decays.

    Args:
        ours: gradients of one forward per completion, the rule computed in chunks of another size.
        expected: the same gradients, of transformers' chunks of 64 rows.

    Returns:
        For each decay weight three times the largest relative difference that any of them has.

    Raises:
        AssertionError: one differs by more than rounding does.
    """
    largest = max(float(grad.norm()) for grad in expected.values())
    norms = {name: max(float(grad.norm()), 1e-4 * largest) for name, grad in expected.items()}
    noise = {name: norm for name, norm in norms.items() if any(part in name for part in DECAY_WEIGHTS)}
    share = max((float((ours[name] - expected[name]).norm()) / norm for name, norm in noise.items()), default=0.0)
    assert share <= LARGEST_NOISE, f"gradients of decays differ by {share:g} of their norm, which rounding does not"
    return {name: 3 * share * norm for name, norm in noise.items()}
