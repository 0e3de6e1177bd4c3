import dataclasses
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from longrl.engines import prefix_cache
from longrl.engines.hf import HFEngine, sample_tokens
from longrl.features.cache import FeatureCache
from longrl.models.text import TextFamily
from longrl.packing.pack import pack
from longrl.testing.tiny import tiny_text
from longrl.types import SamplingParams
from tests.tiny import mixed_prompts, plain_model, qwen3_5_text_family, row, separate_logps, text_family, vl_family

SAMPLING = SamplingParams(num_generations=3, max_completion_tokens=7)


def setup():
    family = vl_family(freeze_vision_encoder=True)
    model, prompts = family.build(), mixed_prompts(family)
    return family, model, prompts, FeatureCache(family).get_or_encode(model, prompts)


def test_logprobs_equal_a_plain_forward_of_what_was_sampled():
    family, model, prompts, features = setup()
    groups = HFEngine().generate(family, model, prompts, features, SAMPLING, seed=1)
    found = torch.cat([completion.logprobs for group in groups for completion in group])
    ids = [[completion.token_ids for completion in group] for group in groups]
    wanted = separate_logps(plain_model(model, family), prompts, ids)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    assert [len(group) for group in groups] == [3, 3, 3]


def test_greedy_tokens_are_the_plain_models_argmax_step_by_step():
    family, model, prompts, features = setup()
    greedy = dataclasses.replace(SAMPLING, num_generations=1, temperature=0.0)
    groups = HFEngine().generate(family, model, prompts, features, greedy, seed=1)
    for prompt, (completion,) in zip(prompts, groups, strict=True):
        for length in range(len(completion.token_ids)):
            (packed,) = pack([prompt], [[completion.token_ids[: length + 1]]], 10_000)
            inputs = family.text_inputs(model, packed, features)
            hidden = family.hidden_states(model, packed.position_ids[:, None], spans=packed.spans, **inputs)[0]
            logits = hidden[packed.predict_from[-1]] @ model.get_output_embeddings().weight.T
            assert logits.argmax() == completion.token_ids[length]


def test_a_prompts_completions_do_not_depend_on_its_batch_or_on_slices():
    family, model, prompts, features = setup()
    together = HFEngine().generate(family, model, prompts, features, SAMPLING, seed=5)
    alone = [HFEngine().generate(family, model, [p], features, SAMPLING, seed=5)[0] for p in prompts]
    sliced = HFEngine(max_sequences=4).generate(family, model, prompts[::-1], features, SAMPLING, seed=5)[::-1]
    for one, two, three in zip(together, alone, sliced, strict=True):
        texts = [[c.token_ids.tolist() for c in group] for group in (one, two, three)]
        assert texts[0] == texts[1] == texts[2]
    other = HFEngine().generate(family, model, prompts, features, SAMPLING, seed=6)
    assert other[0][0].token_ids.tolist() != together[0][0].token_ids.tolist()


def test_an_lm_head_in_float32_brings_engine_and_trainer_together(tmp_path):
    """In bfloat16 an engine decodes what the trainer packs: hidden states differ a little, rounded logits much more."""
    folder = str(tiny_text(tmp_path, tie_word_embeddings=False))
    distances = []
    for fp32 in (False, True):
        family = TextFamily(folder, random_init=True, dtype="bfloat16")
        family.fp32_lm_head = fp32
        model = family.build()
        with torch.no_grad():
            model.lm_head.weight.normal_(0, 0.8, generator=torch.Generator().manual_seed(2))
            for layer in model.model.layers:  # what layers add is small, so that the head is what rounds
                layer.self_attn.o_proj.weight *= 0.1
                layer.mlp.down_proj.weight *= 0.1
        prompts = [family.render(row(str(i)), "Which one? " * (1 + 2 * i)) for i in range(3)]
        groups = HFEngine().generate(family, model, prompts, {}, SamplingParams(8, 24), seed=1)
        (packed,) = pack(prompts, [[c.token_ids for c in group] for group in groups], 1 << 30)
        with torch.no_grad():
            trainer = family.forward(model, packed, {}).logp
        engine = torch.cat([completion.logprobs for group in groups for completion in group])
        distances.append((trainer - engine).abs())
    rounded, exact = distances
    assert exact.mean() < 0.8 * rounded.mean()
    assert exact.max() < rounded.max()


def test_generation_leaves_random_state_and_mode_alone():
    family, model, prompts, features = setup()
    model.train()
    before = torch.get_rng_state()
    HFEngine().generate(family, model, prompts, features, SAMPLING, seed=5)
    assert torch.equal(before, torch.get_rng_state())
    assert model.training


def test_a_completion_ends_with_its_end_token():
    family = text_family()
    model = family.build()
    with torch.no_grad():  # the end token wins at once
        model.lm_head.weight[family.tokenizer.eos_token_id] += 1.0
        model.model.norm.weight.fill_(0.0)
    from tests.tiny import row

    prompts = [family.render(row(), "x")]
    groups = HFEngine().generate(family, model, prompts, {}, dataclasses.replace(SAMPLING, num_generations=64), 0)
    for completion in groups[0]:
        ends = (completion.token_ids == family.tokenizer.eos_token_id).nonzero()[:, 0].tolist()
        assert ends in ([], [len(completion.token_ids) - 1])
        assert completion.finish_reason == ("stop" if ends else "length")
        assert len(completion.logprobs) == len(completion.token_ids)


def test_tokens_are_drawn_from_the_distribution_and_never_a_masked_one():
    logp = torch.tensor([0.1, 0.0, 0.5, 0.4]).log().expand(20_000, -1)
    uniform = torch.rand(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    counts = sample_tokens(logp, SAMPLING, uniform)[0].bincount(minlength=4).tolist()
    assert counts[1] == 0
    for count, share in zip(counts, (0.1, 0.0, 0.5, 0.4), strict=True):  # within four standard deviations
        assert abs(count - 20_000 * share) <= 4 * (20_000 * share * (1 - share)) ** 0.5
    ends = torch.tensor([0.0, 1 - 1e-12], dtype=torch.float64)
    assert sample_tokens(logp[:2], SAMPLING, ends)[0].tolist() == [0, 3]


@pytest.mark.parametrize("change", [{"top_k": 1}, {"top_p": 1e-4}])
def test_top_k_and_top_p_report_the_renormalised_distribution(change):
    family, model, prompts, features = setup()
    sampling = dataclasses.replace(SAMPLING, **change)
    completion = HFEngine().generate(family, model, prompts, features, sampling, seed=1)[0][0]
    assert (completion.logprobs == 0).all()  # one token is left, with all the mass


class HostTraffic(TorchDispatchMode):
    """Counts what would be a copy between host and GPU, or wait for one: tensors from lists, numbers from tensors."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.counts[name] += name in ("lift_fresh", "_local_scalar_dense", "nonzero", "masked_select")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("lengths", ["equal", "padded", "tiled", "hybrid"])
def test_a_token_waits_for_the_device_once_whatever_the_number_of_layers(lengths, monkeypatch):
    """The question whether all completions have ended; on a GPU a tensor made of a list in every layer is a wait."""
    if lengths == "tiled":
        monkeypatch.setattr(prefix_cache, "TILE_KEYS", 5)
        monkeypatch.setattr(prefix_cache, "MAX_SCORES", 0)
    family = qwen3_5_text_family() if lengths == "hybrid" else text_family("qwen3")
    model = family.build()
    texts = ["one two", "three"] if lengths == "padded" else ["one", "two"]
    prompts = [family.render(row(str(i)), text) for i, text in enumerate(texts)]
    traffic = []
    HFEngine().generate(family, model, prompts, {}, SamplingParams(2, 2), seed=1)  # indices that all calls share
    for length in (3, 9):
        sampling = SamplingParams(num_generations=2, max_completion_tokens=length)
        with HostTraffic() as counted:
            HFEngine().generate(family, model, prompts, {}, sampling, seed=1)
        traffic.append(counted.counts)
    longer, shorter = traffic[1], traffic[0]
    longer.subtract(shorter)
    assert {name: count for name, count in longer.items() if count} == {"_local_scalar_dense": 6}
