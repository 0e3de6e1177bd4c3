"""What a data module refuses, and how long a prompt is."""

from dataclasses import replace

import pytest
import torch
from PIL import Image

from longrl.datamodules.loading.render import RowRenderer
from longrl.datamodules.longvideo_reason import LongVideoReason
from longrl.datamodules.media.sampling import VideoSampling
from longrl.types import UnusableSample
from tests.datamodules.media.test_video import write
from tests.tiny import omni_family, qwen3_vl_family, row, text_family, vila_family, vl_family


@pytest.mark.parametrize(
    ("option", "template", "message"),
    [
        ("question_template", "{problem} {options}", r"may name \{problem\}, .*, got \{options\} in '"),
        ("response_template", "{reason}{answer}", r"may name \{reasoning\}, \{answer\}, \{option\}, got \{reason\}"),
        ("answer_template", "{problem}", r"may name .*, got \{problem\} in '\{problem\}'; correct the name"),
    ],
)
def test_a_name_that_nothing_fills_is_refused(option, template, message):
    with pytest.raises(ValueError, match=rf"data\.{option} {message}"):
        LongVideoReason(text_family(), **{option: template})


def test_other_braces_are_text():
    LongVideoReason(
        text_family(),
        question_template=r"{problem} Answer in \boxed{}, {1, 2} or \frac{1}{2}.",
        response_template=r"{reasoning} \boxed{{answer}} {option}",
        answer_template='{"answer": "{answer}"}',
    )


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_a_blind_share_is_between_0_and_1(share):
    with pytest.raises(ValueError, match=rf"data\.blind_share must be between 0 and 1, got {share}"):
        LongVideoReason(text_family(), blind_share=share)


@pytest.mark.parametrize("make", [vl_family, qwen3_vl_family, vila_family, omni_family])
def test_the_limit_counts_the_tokens_that_the_model_reads_whatever_its_patches(tmp_path, make):
    Image.new("RGB", (150, 90)).save(tmp_path / "i.png")
    family = make()
    renderer = RowRenderer(family, VideoSampling(fps=None, num_frames=6))
    asked = row("a", videos=(str(write(tmp_path / "v.mp4", 8)),), images=(str(tmp_path / "i.png"),))
    prompt = renderer(asked)
    placeholders = sum(family.num_features(item) for item in prompt.media)
    assert len(prompt.input_ids) > placeholders > 0
    replace(renderer, max_prompt_tokens=len(prompt.input_ids))(asked)
    with pytest.raises(UnusableSample, match=f"has {len(prompt.input_ids)} tokens, above {len(prompt.input_ids) - 1}"):
        replace(renderer, max_prompt_tokens=len(prompt.input_ids) - 1)(asked)


def test_a_text_of_megabytes_is_refused_before_it_is_tokenized():
    renderer = RowRenderer(text_family(), VideoSampling(), max_prompt_tokens=1000)
    with pytest.raises(UnusableSample, match=r"5000000 characters, at least 19531 tokens: more than 1000"):
        renderer(replace(row("a"), problem="words " * 833_333 + "wo"))


@pytest.mark.parametrize("make", [vl_family, qwen3_vl_family, vila_family, omni_family])
def test_patches_in_the_encoders_precision_give_the_same_features_to_the_last_bit(tmp_path, monkeypatch, make):
    """And an encoder asks for them without waiting: from pinned memory a copy to a GPU then goes on by itself."""
    Image.new("RGB", (150, 90), "teal").save(tmp_path / "i.png")
    family = make(dtype="bfloat16")
    model = family.build()
    plain = RowRenderer(family, VideoSampling(fps=None, num_frames=6))
    asked = row("a", videos=(str(write(tmp_path / "v.mp4", 8)),), images=(str(tmp_path / "i.png"),))
    wanted = plain(asked).media
    found = replace(plain, patch_dtype=torch.bfloat16)(asked).media
    of_bytes = make is vila_family
    assert {item.patches.dtype for item in wanted} == {torch.uint8 if of_bytes else torch.float32}
    assert {item.patches.dtype for item in found} == {torch.uint8 if of_bytes else torch.bfloat16}

    waited = []
    to = torch.Tensor.to

    def noted(tensor, *args, **options):
        if any(tensor.untyped_storage().data_ptr() == item.patches.untyped_storage().data_ptr() for item in found):
            waited.append(not options.get("non_blocking"))
        return to(tensor, *args, **options)

    with torch.no_grad():
        features = family.encode_media(model, wanted)
        monkeypatch.setattr(torch.Tensor, "to", noted)
        same = family.encode_media(model, found)
    assert waited
    assert not waited[0]
    assert all(torch.equal(one, other) for one, other in zip(features, same, strict=True))
