"""Questions about several images, from their records to log-probabilities, against transformers' own classes."""

import json
import re

import pytest
import torch
from PIL import Image
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen3VLForConditionalGeneration

from longrl.datamodules.longvideo_reason import LongVideoReason
from longrl.features.cache import FeatureCache
from longrl.packing.pack import pack
from tests.datamodules.rows import published_records as published
from tests.tiny import qwen3_vl_family, random_completions, vl_family

FAMILIES = {
    "qwen2_5_vl": (vl_family, Qwen2_5_VLForConditionalGeneration),
    "qwen3_vl": (qwen3_vl_family, Qwen3VLForConditionalGeneration),
}
SIZES = ((40, 77), (113, 60), (64, 64))
PROBLEMS = {
    "placed": "<image> and <image>: how many items are in neither, but in <image>?",
    "side by side": "<image><image>\n<image>Find $x$.",
    "first": "How many items do the three images show?",
}


def images(folder):
    """Three pictures of noise, of different sizes."""
    generator = torch.Generator().manual_seed(0)
    for number, (height, width) in enumerate(SIZES):
        pixels = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=generator)
        Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")
    return [f"{number}.png" for number in range(len(SIZES))]


def rendered(folder, family, problem, row_function="geometry_row", names=None):
    """The prompt of a record with these images, as training reads it."""
    record = published.geometry(images=names or images(folder), problem=problem, answer="4")
    (folder / "rows.jsonl").write_text(json.dumps(record) + "\n")
    module = LongVideoReason(
        family, train=str(folder / "rows.jsonl"), row_function=f"longrl.datamodules.rows.{row_function}",
        question_template="{problem}\nAnswer with a number.", prompts_per_batch=1,
    )  # fmt: skip
    module.setup("fit")
    return module.draw_prompts(1)[0]


def theirs(folder, family, problem):
    """The processor's inputs for the same question."""
    text = (problem if "<image>" in problem else "<image>" * len(SIZES) + problem) + "\nAnswer with a number."
    parts = [
        {"type": "image"} if part == "<image>" else {"type": "text", "text": part}
        for part in re.split("(<image>)", text)
        if part
    ]
    chat = family.tokenizer.apply_chat_template(
        [{"role": "user", "content": parts}], tokenize=False, add_generation_prompt=True
    )
    pictures = [Image.open(folder / f"{number}.png") for number in range(len(SIZES))]
    size = {"shortest_edge": family.min_pixels, "longest_edge": family.max_pixels}
    return family.processor(text=[chat], images=pictures, return_tensors="pt", images_kwargs={"size": size})


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
@pytest.mark.parametrize("name", FAMILIES)
def test_ids_patches_and_grids_equal_the_processors(tmp_path, name, problem):
    family = FAMILIES[name][0]()
    prompt = rendered(tmp_path, family, problem)
    wanted = theirs(tmp_path, family, problem)
    assert prompt.input_ids.tolist() == wanted["input_ids"][0].tolist()
    assert torch.equal(torch.cat([item.patches for item in prompt.media]), wanted["pixel_values"])
    assert [list(item.grid_thw) for item in prompt.media] == wanted["image_grid_thw"].tolist()
    assert len({item.key for item in prompt.media}) == len(SIZES)


@pytest.mark.parametrize("name", FAMILIES)
def test_log_probabilities_equal_transformers_on_the_processors_inputs(tmp_path, name):
    make, kind = FAMILIES[name]
    family = make()
    model, problem = family.build(), PROBLEMS["placed"]
    prompt = rendered(tmp_path, family, problem, "clevr_row")
    answers = random_completions(family, [[5, 3]])
    (packed,) = pack([prompt], answers, 10_000)
    plain = kind._from_config(type(family.config).from_pretrained(family.model_path), attn_implementation="eager")
    plain.load_state_dict(model.state_dict())
    inputs = theirs(tmp_path, family, problem)
    with torch.no_grad():
        found = family.forward(model, packed, FeatureCache(family).get_or_encode(model, [prompt])).logp
        wanted = torch.cat([answer_logps(plain, dict(inputs), answer) for answer in answers[0]])
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def answer_logps(plain, inputs, answer):
    """[S] of one completion behind the prompt, in an ordinary forward pass with positions of its own."""
    inputs["input_ids"] = torch.cat([inputs["input_ids"], answer[None]], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if "mm_token_type_ids" in inputs:
        inputs["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, len(answer)))
    logits = plain(**inputs).logits[0, -len(answer) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, answer[:, None])[:, 0]


def test_swapped_images_are_another_question(tmp_path):
    family = vl_family()
    model = family.build()
    prompt = rendered(tmp_path, family, PROBLEMS["placed"])
    swapped = rendered(tmp_path, family, PROBLEMS["placed"], names=["1.png", "0.png", "2.png"])
    first, second, third = (item.key for item in prompt.media)
    assert [item.key for item in swapped.media] == [second, first, third]
    answers = random_completions(family, [[4]])
    logps = []
    for one in (prompt, swapped):
        (packed,) = pack([one], answers, 10_000)
        with torch.no_grad():
            logps.append(family.forward(model, packed, FeatureCache(family).get_or_encode(model, [one])).logp)
    assert (logps[0] - logps[1]).abs().max() > 1e-3
