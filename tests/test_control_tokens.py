"""What rows and policies do with control tokens, from records through loader and engine to weights."""

import json

import pytest
import torch
from lightning.pytorch import Trainer
from PIL import Image

from longrl.callbacks.rollout import RolloutCallback
from longrl.datamodules.longvideo_reason import LongVideoReason
from longrl.datamodules.media.subtitles import Subtitles
from longrl.engines.hf import HFEngine
from longrl.engines.server_protocol import model_sizes
from longrl.engines.vllm_options import sampling_arguments
from longrl.models.qwen_vl import Qwen2_5_VLFamily
from longrl.modules.optimizer import OptimizerSettings
from longrl.modules.policy import PolicyModule
from longrl.packing.pack import pack
from longrl.rewards import RewardSum, RewardTerm, think_answer_format
from longrl.types import Completion, SamplingParams
from tests.models.chat_templates import family_of
from tests.tiny import row, vl_family, vl_folder

pytestmark = [
    pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec"),
]
SAMPLING = SamplingParams(num_generations=2, max_completion_tokens=6)


def prefer_either(model, first, second):
    """The LM head makes one of two tokens by far the likeliest, whatever the hidden state: its sum has a sign."""
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    with torch.no_grad():
        model.lm_head.weight[first] = 9.0
        model.lm_head.weight[second] = -9.0
    return model


class Placeholders(Qwen2_5_VLFamily):
    """Its policy writes little but media placeholders."""

    def build(self, *args, **kwargs):
        return prefer_either(super().build(*args, **kwargs), self.config.image_token_id, self.config.video_token_id)


def placeholders():
    return Placeholders(vl_folder(), random_init=True, min_pixels=28 * 28, max_pixels=56 * 56)


def read(folder, family, records, **options):
    (folder / "rows.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return LongVideoReason(family, train=str(folder / "rows.jsonl"), skipped_dir=str(folder), **options)


# ---- rows ----


def test_values_of_templates_are_text_and_what_templates_say_is_not(tmp_path):
    """In question, options, subtitles, reasoning and answer."""
    family = family_of("qwen3")
    spelled = "</think><|im_end|><image>"
    record = {
        "problem": f"What? {spelled.replace('<image>', '')}\nA. <|im_end|>\nB. </think>", "answer": "B",
        "reasoning": f"Look: {spelled}", "metadata": {"subtitles": [{"start": 0, "end": 1, "text": spelled}]},
        "task": "multiple_choice",
    }  # fmt: skip
    data = read(
        tmp_path, family, [record], stage="sft", subtitles=Subtitles(source="record"), prompts_per_batch=1,
        question_template="{subtitles}{problem}\nReason in <think>.",
        response_template="<think>{reasoning}</think>{option}",
    )  # fmt: skip
    data.setup("fit")
    (prompt,) = data.draw_prompts(1)
    think, closed, end = family.tokenizer.convert_tokens_to_ids(["<think>", "</think>", "<|im_end|>"])
    ids, target = prompt.input_ids.tolist(), prompt.response.token_ids.tolist()
    assert (ids.count(think), ids.count(closed), ids.count(end)) == (1, 0, 1)
    assert (target.count(think), target.count(closed), target.count(end)) == (1, 1, 1)
    shown = family.tokenizer.decode(ids)
    assert "subtitles:\n<|im_end|>" in shown, "whose tags, as in HTML, are left out"
    assert "What? </think><|im_end|>" in shown
    assert "A. <|im_end|>\nB. </think>" in shown
    assert family.tokenizer.decode(target[:-1]) == f"<think>Look: {spelled}</think></think>"


def test_a_blind_conversation_has_no_media_and_teaches_the_answer(tmp_path):
    Image.new("RGB", (56, 56)).save(tmp_path / "a.png")
    messages = [
        {"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "Which?"}]},
        {"role": "assistant", "content": "<think>It is red.</think><answer>B</answer>"},
    ]
    family = vl_family()
    for blind, target in ((False, "<think>It is red.</think><answer>B</answer>"), (True, "B")):
        data = read(tmp_path, family, [{"messages": messages}], stage="sft", blind=blind, prompts_per_batch=1)
        data.setup("fit")
        (prompt,) = data.draw_prompts(1)
        assert len(prompt.media) == (not blind)
        assert family.decode(prompt.response.token_ids) == target


# ---- what ends a completion ----


@pytest.mark.parametrize("name", ["base model's tokenizer", "gemma"])
def test_any_end_token_ends_a_completion_in_every_engine(name):
    family = family_of(name)
    first, second = family.end_token_ids
    prompts = [family.render(row(), "Which?")]
    seen = set()
    for pair in ((first, second), (second, first)):
        model = prefer_either(family.build(), *pair)
        (completions,) = HFEngine().generate(family, model, prompts, {}, SAMPLING, seed=0)
        assert all((one.finish_reason, one.text) == ("stop", "") for one in completions)
        seen |= {tuple(one.token_ids.tolist()) for one in completions}
    assert seen == {(first,), (second,)}
    assert sampling_arguments(family, prompts[0], SAMPLING, 0, 0)["stop_token_ids"] == [first, second]
    assert model_sizes(family)["end tokens"] == [first, second]


def test_the_form_is_judged_on_what_the_prompt_opened_and_what_followed():
    family = family_of("qwen3 thinking")
    ids = family.tokenizer("He pours.</think><answer>B</answer>", add_special_tokens=False)["input_ids"]
    completion = Completion(torch.tensor(ids), torch.zeros(len(ids)), family.decode(torch.tensor(ids)), "stop")
    assert think_answer_format(completion, row()) == 1.0
    cut = family.tokenizer("He pours B.", add_special_tokens=False)["input_ids"]
    assert family.decode(torch.tensor(cut)) == "<think>\nHe pours B.", "no answer: it is still thinking"


# ---- policies that write placeholders, on rows with any number of images ----


def test_a_placeholder_that_a_policy_samples_is_an_ordinary_token():
    """The update scores what the engine sampled alike, and no feature stands there."""
    family = placeholders()
    model = family.build().eval()
    prompts = [family.render(row("x"), "Which?"), family.render(row("y"), "no media")]
    groups = HFEngine().generate(family, model, prompts, {}, SAMPLING, seed=0)
    sampled = [token for group in groups for one in group for token in one.token_ids.tolist()]
    media_tokens = {*family.media_token_ids().values()}
    assert sum(token in media_tokens for token in sampled) > len(sampled) / 2
    (packed,) = pack(prompts, [[one.token_ids for one in group] for group in groups], 1 << 20)
    logp = family.forward(model, packed, {}).logp
    assert torch.allclose(logp, torch.cat([one.logprobs for group in groups for one in group]), atol=1e-4)


def length(completion, row):
    return float(len(completion.token_ids) + completion.token_ids.sum() % 3)


@pytest.mark.parametrize("stage", ["sft", "rl"])
def test_steps_on_rows_with_no_one_and_several_images(tmp_path, stage):
    """Of which some spell placeholders, by a policy that writes them."""
    for number in range(3):
        Image.new("RGB", (56, 28 * (1 + number)), (90 * number, 0, 0)).save(tmp_path / f"{number}.png")
    said = [{"role": "user", "content": [{"type": "image", "image": "0.png"}, {"type": "text", "text": "What?"}]},
            {"role": "assistant", "content": "<answer>x <|image_pad|></answer>"}]  # fmt: skip
    records = [
        {"problem": "What is <|image_pad|>?", "answer": "x"},
        {"problem": "What? <|video_pad|>", "answer": "x", "images": ["0.png"]},
        {"problem": "<image> or <image>, <image>?", "answer": "x", "images": ["0.png", "1.png", "2.png"]},
        {"messages": said},
    ]
    family = placeholders()
    data = read(tmp_path, family, [{"task": "exact", **one} for one in records], stage=stage, prompts_per_batch=4)
    rollouts = [RolloutCallback(RewardSum([RewardTerm(length)]), SAMPLING)] if stage == "rl" else []
    trainer = Trainer(
        accelerator="cpu", devices=1, max_epochs=-1, max_steps=2, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, limit_val_batches=0, callbacks=rollouts,
        default_root_dir=tmp_path,
    )  # fmt: skip
    policy = PolicyModule(family, optimizer=OptimizerSettings(lr=1e-3))
    trainer.fit(policy, datamodule=data)
    assert trainer.global_step == 2
    assert all(torch.isfinite(parameter).all() for parameter in policy.model.parameters())
    assert not (tmp_path / "skipped.jsonl").exists() or not (tmp_path / "skipped.jsonl").read_text()
