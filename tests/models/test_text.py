"""Text families against transformers' own tokenizer and forward pass, and which models they read."""

import pytest
import torch

from longrl.models.text import LlamaFamily, TextFamily
from longrl.packing.pack import pack
from longrl.testing.tiny import tiny_text
from tests.families import FAMILIES, TEXT, every
from tests.tiny import frames, llama_family, plain_model, random_completions, row, sound, text_family, text_folder


@pytest.mark.parametrize("media", [frames(2), sound(1.0)])
def test_media_are_refused(media):
    family = text_family()
    with pytest.raises(ValueError, match=rf"^TextFamily reads text only, but the row has a {media.kind}; use a family"):
        family.render(row(), "What is it?", [media])


@every("same logits", TEXT)
def test_prompts_and_log_probabilities_are_those_of_transformers(name):
    """Its chat template and its positions; two completions packed behind one prompt."""
    family = FAMILIES[name].make()
    model, prompt = family.build(), family.render(row(), "What is 3 + 4?")
    chat = [{"role": "user", "content": "What is 3 + 4?"}]
    ids = family.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")["input_ids"][0]
    assert torch.equal(prompt.input_ids, ids)
    (answers,) = random_completions(family, [[70, 5]])
    (packed,) = pack([prompt], [answers], 10_000)
    plain = plain_model(model, family)
    with torch.no_grad():
        found = family.forward(model, packed, {}).logp
        logits = [plain(torch.cat([ids, answer])[None]).logits[0, len(ids) - 1 : -1] for answer in answers]
    logps = [
        rows.log_softmax(-1).gather(-1, answer[:, None])[:, 0] for rows, answer in zip(logits, answers, strict=True)
    ]
    torch.testing.assert_close(found, torch.cat(logps), rtol=1e-5, atol=1e-5)


def test_llamas_positions_are_stretched():
    """What the test above compares is not plain rotation: beyond 64 tokens the two part."""
    stretched, plain = (
        LlamaFamily(folder, random_init=True).build() for folder in (llama_family().model_path, text_folder("llama"))
    )
    assert not torch.equal(stretched.model.rotary_emb.inv_freq, plain.model.rotary_emb.inv_freq)


def test_no_mask_is_made_for_llama():
    family, seen = llama_family(), []
    model = family.build()
    family.layers(model)[0].register_forward_pre_hook(
        lambda layer, args, kwargs: seen.append(kwargs["attention_mask"].numel()), with_kwargs=True
    )
    prompts = FAMILIES["llama3"].prompts(family)
    (packed,) = pack(prompts, random_completions(family, [[2, 3], [1], [4]]), 10_000)
    family.forward(model, packed, {})
    assert seen == [0]


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_qwen_is_read(model_type):
    assert text_family(model_type).build().config.model_type == model_type


def test_the_other_text_family_is_named():
    with pytest.raises(
        ValueError, match=r"reads models of type llama, but .* is a qwen2; set .* longrl.models.text.TextFamily"
    ):
        LlamaFamily(text_folder("qwen2"), random_init=True).build()


@pytest.mark.parametrize("model_type", ["llama", "granite", "olmo2", "phi", "qwen3_next", "qwen3_5_text"])
def test_another_model_is_refused_before_it_is_built(tmp_path, monkeypatch, model_type):
    family = TextFamily(str(tiny_text(tmp_path, model_type)), random_init=True)
    monkeypatch.setattr(TextFamily, "auto_class", lambda self: pytest.fail("the model was built"))
    with pytest.raises(ValueError, match=f"reads models of type qwen2 and qwen3, but .* is a {model_type}; .* another"):
        family.build()
