"""packed == separate where completions are shown tokens and media: log-probs, every gradient and positions."""

from dataclasses import replace
from unittest import mock

import pytest
import torch

from longrl.features.cache import FeatureCache
from longrl.models.base import ALL_ROWS
from longrl.modules.policy import all_media
from longrl.packing import delta_kernels
from longrl.packing.pack import pack
from longrl.testing.plain_forward import decay_noise, whole_sequence
from longrl.testing.sample_turns import random_turns
from tests.families import FAMILIES
from tests.models.test_packed_equals_separate import packed_logps
from tests.tiny import assert_same_gradients, gradients, plain_model, separate_logps

NAMES = ["qwen2.5", "qwen2.5-vl", "qwen3-vl", "qwen3.5", "internvl3.5", "nvila", "qwen3-omni"]


@pytest.mark.parametrize("name", FAMILIES)
def test_positions_go_on_as_the_family_counts_the_whole_sequence(name):
    family = FAMILIES[name].make()
    prompts = FAMILIES[name].prompts(family)
    for prompt, group in zip(prompts, random_turns(family, prompts), strict=True):
        for completion in group:
            whole = whole_sequence(prompt, completion)
            torch.testing.assert_close(whole.position_ids, family.position_ids(whole.input_ids, whole.media))


@pytest.mark.parametrize("name", NAMES)
def test_shown_segments_are_read_as_in_one_forward_per_completion(name):
    """A group whose completions have no, one and three observations, and groups of others; in any micro-batches."""
    checkpointing = name in ("qwen2.5-vl", "qwen3.5", "nvila")
    in_pieces = {"mlp_chunk_tokens": 7} if name in ("qwen2.5", "qwen3-vl") else {}
    family = FAMILIES[name].make(gradient_checkpointing=checkpointing, **in_pieces)
    model = family.build()
    prompts = FAMILIES[name].prompts(family)
    completions = random_turns(family, prompts)
    plain = plain_model(model, family)
    wanted = separate_logps(plain, prompts, completions)
    coefficients = torch.randn(len(wanted), generator=torch.Generator().manual_seed(1))
    (wanted * coefficients).sum().backward()
    expected = gradients(plain)
    trainable = bool(family.trained_encoders(model))

    def found(prompts, completions, max_tokens):
        model.zero_grad()
        logps = packed_logps(family, model, prompts, completions, coefficients, max_tokens, trainable)
        return logps.double(), gradients(model)

    noise = None
    if name.startswith("qwen3.5"):  # decays have noise
        with mock.patch.object(delta_kernels, "CHUNK_ROWS", 32):
            repeated = [prompt for prompt, group in zip(prompts, completions, strict=True) for _ in group]
            _, alone = found(repeated, [[completion] for group in completions for completion in group], 10_000)
        noise = decay_noise(alone, expected)
    for max_tokens in (longest(prompts, completions), 10_000):
        logps, grads = found(prompts, completions, max_tokens)
        assert (logps - wanted).norm() <= 1e-5 * wanted.norm()
        assert_same_gradients(grads, expected, 1e-5, noise)


def test_a_placeholder_that_is_sampled_is_a_token_and_one_that_is_shown_is_media():
    family = FAMILIES["qwen2.5-vl"].make()
    (prompt, *_) = FAMILIES["qwen2.5-vl"].prompts(family)
    (_, completion, _), *_ = random_turns(family, [prompt])
    token = family.media_token_ids()["video"]
    ids = completion.token_ids.clone()
    ids[0] = ids[-1] = token
    assert completion.sampled[0]
    assert completion.sampled[-1]
    (packed,) = pack([prompt], [[replace(completion, token_ids=ids)]], 10_000)
    model = family.build()
    features = FeatureCache(family).get_or_encode(model, all_media([prompt], [[completion]]))
    mask, values = family.media_rows(packed, features, ALL_ROWS)
    start = len(prompt.input_ids)
    assert torch.equal(mask[start:], (completion.token_ids == token) & ~completion.sampled)
    assert not mask[start]
    assert not mask[-1]
    assert torch.equal(values[int(mask[:start].sum()) :], features[completion.media[0].key])


def test_media_whose_pixels_are_gone_are_named():
    family = FAMILIES["qwen2.5-vl"].make(freeze_vision_encoder=True)
    prompts = FAMILIES["qwen2.5-vl"].prompts(family)
    (_, completion, _), *_ = random_turns(family, prompts, pixels_left_out=True)
    model = family.build()
    assert FeatureCache(family).get_or_encode(model, [completion])
    gone = [replace(item, source=None) for item in completion.media]
    with pytest.raises(ValueError, match=r"was shown a video \(crop-.*whose pixels are not kept.*need a `source`"):
        FeatureCache(family).get_or_encode(model, [replace(completion, media=tuple(gone))])


def longest(prompts, completions):
    """Tokens of the longest prompt with its longest completion: the smallest micro-batch there can be."""
    groups = zip(prompts, completions, strict=True)
    return max(len(prompt.input_ids) + max(len(one.token_ids) for one in group) for prompt, group in groups)
