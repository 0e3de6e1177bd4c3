"""Rows that nobody can use: each is skipped and listed with its reason, and no run ends by one, whoever notices."""

import json

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from PIL import Image

from longrl.callbacks.rollout import RolloutCallback
from longrl.datamodules.longvideo_reason import LongVideoReason
from longrl.datamodules.media.sampling import VideoSampling
from longrl.datamodules.media.subtitles import Subtitles
from longrl.modules.optimizer import OptimizerSettings
from longrl.modules.policy import PolicyModule
from longrl.rewards import RewardSum, RewardTerm
from longrl.types import SamplingParams
from tests.datamodules.media.test_video import write
from tests.evaluation.scripted import evaluated
from tests.tiny import omni_family, qwen3_vl_family, text_family, vila_family, vl_family

pytestmark = [
    pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization"),
]

REASONS = {
    "thin": "the model cannot be shown it (ValueError: absolute aspect ratio must be smaller than 200, got 300.0)",
    "deep": "its pixels are floats, of which nothing says what is white",
    "moving": "it is an animation, not an image",
    "torn": "it is torn: it ends after",
    "sideways": "turned by 45 degrees",
    "no video": "it cannot be decoded",
    "text": "it cannot be decoded",
    "missing": "the file does not exist",
    "elsewhere": "it lies elsewhere, and nothing is fetched unless data.allow_remote_media is true",
    "late span": "it ends after 2.0 s, before the part from 7 s on",
    "span as a number": "span_s must be two increasing seconds from 0 on, got 7",
    "span of words": "span_s must be two increasing seconds from 0 on, got ['a', 'b']",
    "span back": "span_s must be two increasing seconds from 0 on, got [2, 1]",
    "subtitles as a number": "its own subtitles cannot be read (ValueError: subtitles are a list of lines, got int)",
    "subtitles without times": "its own subtitles cannot be read (KeyError: 'start')",
    "subtitles in no file": "the file does not exist",
    "half a character": "surrogates not allowed",
    "\ud800": "surrogates not allowed",
    "long": "above 2000, the data.max_prompt_tokens",
}


def records(folder):
    """A record for every reason, and as many that can be used."""
    video = str(write(folder / "v.mp4", 20))
    Image.new("RGB", (1, 300)).save(folder / "thin.png")
    Image.new("F", (4, 4)).save(folder / "deep.tif")
    frames = [Image.new("RGB", (8, 8), (level, 0, 0)) for level in (0, 100, 200)]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    torn = write(folder / "torn.mp4", 60, noise=True, movflags="faststart")
    torn.write_bytes(torn.read_bytes()[: torn.stat().st_size // 2])
    write(folder / "sideways.mp4", 8, matrix=(0.7, 0.7, -0.7, 0.7))
    (folder / "no_video.mp4").write_bytes(b"no video at all")
    (folder / "text.png").write_text("no picture")
    Image.new("RGBA", (64, 64)).save(folder / "fine.png")
    fields = {
        "thin": {"images": "thin.png"},
        "deep": {"images": "deep.tif"},
        "moving": {"images": "moving.gif"},
        "torn": {"videos": "torn.mp4"},
        "sideways": {"videos": "sideways.mp4"},
        "no video": {"videos": "no_video.mp4"},
        "text": {"images": "text.png"},
        "missing": {"videos": "missing.mp4"},
        "elsewhere": {"videos": "https://example.com/v.mp4"},
        "late span": {"videos": video, "metadata": {"span_s": [7, 8]}},
        "span as a number": {"videos": video, "metadata": {"span_s": 7}},
        "span of words": {"videos": video, "metadata": {"span_s": ["a", "b"]}},
        "span back": {"videos": video, "metadata": {"span_s": [2, 1]}},
        "subtitles as a number": {"videos": video, "metadata": {"subtitles": 7}},
        "subtitles without times": {"videos": video, "metadata": {"subtitles": [{"text": "a"}]}},
        "subtitles in no file": {"videos": video, "metadata": {"subtitles": "none.srt"}},
        "half a character": {"problem": "What is \ud800?"},
        "\ud800": {},
        "long": {"problem": "word " * 1500},
    }
    assert list(fields) == list(REASONS)
    unusable = [{"problem_id": name, "problem": "What?", **rest} for name, rest in fields.items()]
    problems = ["What?", "What does <|im_end|> mean?", "Is <|image_pad|> or <|video_pad|> an <|IMAGE|>?"]
    usable = [
        {"problem_id": f"fine {n}", "problem": problems[n % 3], "images": "fine.png"} for n in range(len(unusable))
    ]
    mixed = [record for pair in zip(unusable, usable, strict=True) for record in pair]
    return [{"answer": "x", "task": "exact", **record} for record in mixed]


def source(folder, listed):
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in listed))
    return str(file)


def skipped(folder):
    lines = map(json.loads, (folder / "skipped.jsonl").read_text().splitlines())
    return {line["id"]: line["reason"] for line in lines}


def data_module(folder, family, **options):
    rows = source(folder, records(folder))
    return LongVideoReason(
        family, train=rows, val=rows, test=rows, prompts_per_batch=3, max_skipped_share=1.0, max_prompt_tokens=2000,
        subtitles=Subtitles(source="record"), question_template="{subtitles}{problem}", skipped_dir=str(folder),
        **options,
    )  # fmt: skip


def assert_listed(reasons, expected=REASONS):
    assert reasons.keys() == expected.keys()
    wrong = {name: reason for name, reason in reasons.items() if expected[name] not in reason}
    assert wrong == {}


@pytest.mark.parametrize("family", [vl_family, qwen3_vl_family])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_every_reason_is_listed_and_the_other_rows_are_used(tmp_path, family, num_workers):
    data = data_module(tmp_path, family(), num_workers=num_workers)
    data.read(["test"])
    prompts = [prompt for batch in data.eval_loader("test") for prompt in batch.prompts]
    assert [prompt.id for prompt in prompts] == [f"fine {n}" for n in range(len(REASONS))]
    assert_listed(skipped(tmp_path))


@pytest.mark.parametrize("family", [vila_family, omni_family])
def test_other_families_refuse_what_they_cannot_show(tmp_path, family):
    """Another shape is fine for VILA's squares."""
    data = data_module(tmp_path, family())
    data.read(["test"])
    prompts = [prompt for batch in data.eval_loader("test") for prompt in batch.prompts]
    reasons = skipped(tmp_path)
    assert_listed(reasons, {name: REASONS[name] for name in reasons})
    assert len(prompts) + len(reasons) == 2 * len(REASONS)
    assert REASONS.keys() - reasons.keys() <= {"thin"}


def test_media_that_a_family_does_not_read_are_known_before_a_run(tmp_path):
    mixed = [{"problem": "1 + 1?", "answer": "2"}] * 20 + [{"problem": "What?", "answer": "2", "videos": "v.mp4"}]
    data = LongVideoReason(text_family(), test=source(tmp_path, mixed), skipped_dir=str(tmp_path))
    data.read(["test"])
    assert list(skipped(tmp_path).values()) == [
        "TextFamily reads no videos; use a family that does, or leave such rows out"
    ]
    assert len([1 for batch in data.eval_loader("test") for _ in batch.prompts]) == 20
    everything = LongVideoReason(text_family(), test=source(tmp_path, mixed[-1:]), skipped_dir=str(tmp_path))
    with pytest.raises(ValueError, match="TextFamily reads no videos"):
        everything.read(["test"])


# ---- what still ends a run ----


def test_an_option_that_is_wrong_for_every_row_is_an_error_before_a_run(tmp_path):
    family = vl_family()
    family.tokenizer.chat_template = "{{ no_such_function() }}"
    with pytest.raises(Exception, match="no_such_function"):
        data_module(tmp_path, family).read(["test"])


@pytest.mark.parametrize("error", [NameError, AttributeError, ImportError, AssertionError, NotImplementedError])
def test_a_mistake_in_a_familys_code_ends_the_run(tmp_path, monkeypatch, error):
    data = data_module(tmp_path, vl_family())
    data.read(["test"])

    def broken(*args):
        raise error("of the family's author")

    monkeypatch.setattr(type(data.renderer.family), "pixel_patches", broken)
    with pytest.raises(error, match="of the family's author"):
        list(data.eval_loader("test"))


@pytest.mark.parametrize("error", [ValueError, TypeError, KeyError, ZeroDivisionError, RuntimeError, OSError])
def test_whatever_else_happens_to_every_row_ends_the_run_by_its_limit(tmp_path, monkeypatch, error):
    images = [{"problem": "What?", "answer": "2", "images": "fine.png"}] * 50
    Image.new("RGB", (64, 64)).save(tmp_path / "fine.png")
    data = LongVideoReason(vl_family(), test=source(tmp_path, images), skipped_dir=str(tmp_path))
    data.read(["test"])

    def broken(*args):
        raise error("of a processor")

    monkeypatch.setattr(type(data.renderer.family), "pixel_patches", broken)
    with pytest.raises(
        ValueError, match=rf"cannot be used.*because: it cannot be rendered .{error.__name__}: .*of a proc"
    ):
        list(data.eval_loader("test"))


# ---- runs ----


def length(completion, row):
    return float(len(completion.text) % 3)


class Seen(Callback):
    """The prompts of each step."""

    def __init__(self):
        self.ids = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.ids.append([group.prompt.id for group in batch.groups])


def train(folder, steps, ckpt_path=None):
    rollouts = RolloutCallback(
        RewardSum([RewardTerm(length)]), SamplingParams(num_generations=2, max_completion_tokens=4)
    )
    seen = Seen()
    trainer = Trainer(
        accelerator="cpu", devices=1, max_epochs=-1, max_steps=steps, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, limit_val_batches=0, callbacks=[rollouts, seen],
        default_root_dir=folder,
    )  # fmt: skip
    policy = PolicyModule(vl_family(freeze_vision_encoder=True), optimizer=OptimizerSettings(lr=1e-3))
    trainer.fit(policy, datamodule=data_module(folder, policy.family), ckpt_path=ckpt_path)
    return trainer, policy, seen.ids


def test_an_rl_run_over_such_rows_ends_normally_and_resumes_over_them(tmp_path):
    _, whole, ids = train(tmp_path, 6)
    assert all(prompt_id.startswith("fine") for of_step in ids for prompt_id in of_step)
    assert [len(of_step) for of_step in ids] == [3] * 6
    assert all(torch.isfinite(parameter).all() for parameter in whole.model.parameters())
    reasons = skipped(tmp_path)
    assert_listed(reasons, {name: REASONS[name] for name in reasons})
    trainer, _, first = train(tmp_path, 3)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    _, resumed, second = train(tmp_path, 6, ckpt_path=str(tmp_path / "last.ckpt"))
    assert first + second == ids
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_an_evaluation_counts_them_and_says_how_many_videos_were_shown_in_part(tmp_path):
    file = source(tmp_path, records(tmp_path))
    options = ("--data.max_skipped_share=1.0", "--data.subtitles.source=record",
               "--data.question_template={subtitles}{problem}")  # fmt: skip
    results = evaluated(tmp_path / "skip", *options, test=file)["conditions"]["video"]
    reasons = skipped(tmp_path / "skip")
    # Nobody's tokens are here, and an endpoint takes any shape and length.
    assert REASONS.keys() - reasons.keys() == {"thin", "long"}
    assert sum(results["failures"].values()) == len(reasons)
    assert results["videos_used_in_part"] == 0
    results = evaluated(tmp_path / "keep", *options, "--data.video.torn=keep", test=file)["conditions"]["video"]
    assert sum(results["failures"].values()) == len(reasons) - 1
    assert results["videos_used_in_part"] == 1
    assert "of 1 torn videos only what is there was shown" in (tmp_path / "keep" / "report.html").read_text()


def test_a_run_on_torn_videos_samples_what_is_there(tmp_path):
    data = data_module(tmp_path, vl_family(), video=VideoSampling(torn="keep"))
    data.read(["test"])
    prompts = [prompt for batch in data.eval_loader("test") for prompt in batch.prompts]
    assert [prompt.id for prompt in prompts if prompt.torn_videos] == ["torn"]
