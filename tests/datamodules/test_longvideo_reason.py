import copy
import json
import pickle
import re
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from PIL import Image

from longrl.datamodules.loading.render import RowRenderer
from longrl.datamodules.loading.shown_media import ordered_media
from longrl.datamodules.loading.templates import fill_template
from longrl.datamodules.longvideo_reason import LongVideoReason
from longrl.datamodules.media.sampling import VideoSampling
from longrl.datamodules.media.video import VideoReader
from longrl.strategies.parallel import Parallel
from longrl.testing.synthetic_videos import SyntheticConfig, generate_videos
from longrl.types import Row
from tests.tiny import text_family, vl_family

# What Lightning says of the checkpoints of these short runs.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec"),
]
CONFIGS = Path(__file__).parents[2] / "configs" / "data"
PROMPT_FILES = ("geneval", "ocr_prompts", "prompts")
"""Of another data module: tests/diffusion/test_prompt_files.py."""


@pytest.fixture(scope="session")
def synthetic(tmp_path_factory) -> Path:
    """3 training videos of 4 questions, 1 for evaluation, 2 with descriptions; 56 x 56 pixels, 8 to 10 seconds."""
    folder = tmp_path_factory.mktemp("data") / "synthetic"
    generate_videos(folder, SyntheticConfig(3, 1, 2, scene_s=2.0, size=56))
    return folder


def write(folder: Path, records: list[dict], name: str = "rows.jsonl") -> str:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(folder / name)


def sums(count: int) -> list[dict]:
    return [{"problem": f"{n} + 1?", "answer": f"{n + 1}", "reasoning": "I count."} for n in range(count)]


def texts(folder: Path, count: int = 7, **options) -> LongVideoReason:
    """A data module of `count` short text rows, set up to train."""
    source = options.pop("train", None) or write(folder, sums(count))
    return LongVideoReason(text_family(), train=source, **{"prompts_per_batch": 2, **options})


def clips(folder: Path, **options) -> LongVideoReason:
    sampling = VideoSampling(fps=1.0)
    train = {"train": str(folder / "train.jsonl"), "val": str(folder / "eval.jsonl")}
    return LongVideoReason(
        vl_family(), **{**train, "video": sampling, "prompts_per_batch": 4, "allow_outside_paths": True, **options}
    )


def ids(batches) -> list[list[str]]:
    return [[prompt.id for prompt in batch.prompts] for batch in batches]


# ---- prompts ----


def test_rl_prompts_have_their_video_and_no_target(synthetic):
    module = clips(synthetic)
    module.setup("fit")
    batches = list(module.train_dataloader())
    prompts = [prompt for batch in batches for prompt in batch.prompts]
    assert len(batches) == 3
    assert sorted(int(prompt.id) for prompt in prompts) == list(range(12))
    assert len({len(prompt.input_ids) for prompt in prompts}) > 1  # different lengths in one batch
    for prompt in prompts:
        assert [item.kind for item in prompt.media] == ["video"]
        assert prompt.response is None
        assert prompt.position_ids.shape == (3, len(prompt.input_ids))
    assert len({prompt.media[0].key for prompt in prompts}) == 3  # four questions share a video


def test_sft_targets_are_reasoning_and_answer(synthetic):
    module = clips(synthetic, stage="sft")
    module.setup("fit")
    (prompt, *_) = module.draw_prompts(1)
    text = module.renderer.family.decode(prompt.response.token_ids)
    assert text == f"<think>{prompt.row.reasoning}</think><answer>{prompt.row.answer}</answer>"
    assert prompt.response.token_ids[-1] == module.renderer.family.tokenizer.eos_token_id


def test_rows_without_reasoning_teach_the_answer_alone_and_text_mixes_with_video(synthetic):
    module = clips(synthetic, stage="sft", train=str(synthetic / "pretrain.jsonl"), question_template="{problem}")
    module.setup("fit")
    prompts = [prompt for batch in module.train_dataloader() for prompt in batch.prompts]
    family = module.renderer.family
    assert {len(prompt.media) for prompt in prompts} == {0, 1}
    for prompt in prompts:
        assert family.decode(prompt.response.token_ids) == prompt.row.answer


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_render_the_same_prompts(synthetic, workers):
    module, inline = clips(synthetic, num_workers=workers), clips(synthetic)
    for one in (module, inline):
        one.setup("fit")
    for found, wanted in zip(module.draw_prompts(5), inline.draw_prompts(5), strict=True):
        assert found.id == wanted.id
        assert torch.equal(found.input_ids, wanted.input_ids)
        assert torch.equal(found.media[0].patches, wanted.media[0].patches)
    module.teardown("fit")


def test_a_blind_model_gets_the_question_without_media(synthetic):
    module = clips(synthetic, blind=True, media_root="/nowhere")
    module.setup("fit")
    (prompt,) = module.draw_prompts(1)
    assert prompt.media == ()
    assert prompt.row.videos == ()


def test_images_and_videos_follow_the_tags_of_the_question(synthetic, tmp_path):
    for name, size in (("a.png", (40, 60)), ("b.png", (56, 56))):
        Image.new("RGB", size, "red").save(tmp_path / name)
    video = str(synthetic / "videos" / "train_000000.mp4")
    record = {"problem": "<image> then <video> then <image>?", "answer": "yes", "images": ["a.png", "b.png"]}
    module = LongVideoReason(
        vl_family(),
        train=write(tmp_path, [{**record, "videos": video}]),
        prompts_per_batch=1,
        question_template="{problem}",
        allow_outside_paths=True,
    )
    module.setup("fit")
    (prompt,) = module.draw_prompts(1)
    assert [item.kind for item in prompt.media] == ["image", "video", "image"]


def test_media_without_tags_come_images_first():
    row = Row(id="0", problem="?", answer="1", videos=("v",), images=("i", "j"))
    assert ordered_media(row) == [("image", "i"), ("image", "j"), ("video", "v")]


def test_a_template_keeps_braces_that_are_not_its_fields():
    assert fill_template(r"{problem} \boxed{} {other}", problem="{answer}?") == r"{answer}? \boxed{} {other}"


def test_a_worker_keeps_the_media_it_decoded_last(synthetic, monkeypatch):
    read = []
    real = VideoReader.chunks
    monkeypatch.setattr(VideoReader, "chunks", lambda reader, count: read.append(reader.path) or real(reader, count))
    for kept, reads in ((0, 12), (3, 3)):
        read.clear()
        module = clips(synthetic, cached_media=kept)
        module.setup("fit")
        module.draw_prompts(12)
        assert len(read) == reads


# ---- bad input ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts_per_batch": 0}, r"data\.prompts_per_batch must be at least 1, got 0"),
        ({"max_train_rows": 0}, r"data\.max_train_rows must be at least 1"),
        ({"num_workers": -1}, r"data\.num_workers must be at least 0, got -1"),
        ({"max_skipped_share": 1.5}, r"data\.max_skipped_share must be between 0 and 1, got 1\.5"),
        (
            {"question_template": "What?"},
            r"data\.question_template must contain \{problem\} or \{asked\}, got 'What\?'",
        ),
        ({"row_function": "nothing.here"}, r"data\.row_function 'nothing\.here': there is no module 'nothing'"),
    ],
)
def test_an_impossible_option_is_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        LongVideoReason(text_family(), **options)


def test_a_stage_without_its_source_says_which():
    with pytest.raises(ValueError, match=r"`test` reads data\.test, which is not set"):
        LongVideoReason(text_family(), train="x.jsonl").setup(TrainerFn.TESTING)  # as Lightning calls it


def test_a_batch_larger_than_the_data_is_refused_in_setup(tmp_path):
    with pytest.raises(
        ValueError, match=r"prompts_per_batch=8 .* data\.train has 7 rows; lower data\.prompts_per_batch"
    ):
        texts(tmp_path, prompts_per_batch=8).setup("fit")


BAD = [{"problem": "What?"}, {"problem": "Which?\nA. one\nB. two", "answer": "C"}]


def test_bad_records_are_an_error_in_setup(tmp_path):
    train = write(tmp_path, sums(4) + BAD)
    with pytest.raises(
        ValueError, match=r"2 of 6 records of data\.train .* the first: record 4 .* needs 'answer'.*=skip"
    ):
        texts(tmp_path, train=train).setup("fit")


def spelled(number: int) -> dict:
    """A question in one of the spellings that users have."""
    answer = ["B", "a dog", 1, "(B) a dog", "b."][number % 5]
    return {"question": "What is it?", "options": ["a cat", "a dog"], "answer": answer, "video": "clip.mp4"}


@pytest.mark.parametrize("bad_records", ["error", "skip"])
def test_records_of_another_schema_name_the_row_function_that_would_read_them(tmp_path, bad_records, caplog):
    train = write(tmp_path, sums(2) + [spelled(number) for number in range(40)])
    module = texts(tmp_path, train=train, bad_records=bad_records, max_skipped_share=1.0, skipped_dir=str(tmp_path))
    told = (
        r"40 of 42 records .* needs 'problem'.*; 40 of the first 40 of them would be read by --data\.row_function "
        r"longrl\.datamodules\.rows\.canonical_row"
    )
    if bad_records == "error":
        with pytest.raises(ValueError, match=told):
            module.setup("fit")
    else:
        module.setup("fit")
        assert re.search(told, caplog.text)


@pytest.mark.parametrize(
    ("record", "name"),
    [
        ({"question": "1 + 1?", "answer": "2"}, "canonical_row"),
        ({"doc": {"question": "Which?", "a0": "x", "a1": "y", "answer": 1, "video_name": "c"}}, "lmms_eval_row"),
        ({"problem": "How many?", "solution": "<answer>3</answer>", "path": "c.mp4"}, "video_r1_row"),
    ],
)
def test_each_schema_is_recognised(tmp_path, record, name):
    with pytest.raises(ValueError, match=rf"this record would be read by .*\.{name}\. Or leave"):
        texts(tmp_path, train=write(tmp_path, [*sums(4), record])).setup("fit")


def test_a_function_that_would_drop_the_media_or_read_nothing_is_not_named(tmp_path):
    for record in ({"question": "1 + 1?", "answer": "2", "videos": "clip.mp4"}, {"ask": "?"}):
        with pytest.raises(ValueError, match="needs 'problem'") as error:
            texts(tmp_path, train=write(tmp_path, [*sums(4), record])).setup("fit")
        assert "would be read" not in str(error.value)


def test_a_clip_that_exists_twice_is_told_with_both_paths(synthetic, tmp_path):
    clip = (synthetic / "videos" / "train_000000.mp4").read_bytes()
    for place in ("a/twin.mp4", "b/twin.mp4", "two.mp4", "two.mkv", "alone.mp4"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).write_bytes(clip)
    names = ["alone"] * 4 + ["twin.mp4", "two"]
    records = [{"problem": "How many?", "answer": "3", "data_type": "video", "videos": name} for name in names]
    module = clips(synthetic, train=write(tmp_path, records), skipped_dir=str(tmp_path), max_skipped_share=1.0)
    module.setup("fit")
    module.draw_prompts(1)
    reasons = {json.loads(line)["id"]: json.loads(line)["reason"] for line in (tmp_path / "skipped.jsonl").open()}
    assert reasons.keys() == {"4", "5"}
    for number, places in (("4", ("a/twin.mp4", "b/twin.mp4")), ("5", ("two.mkv", "two.mp4"))):
        one, other = (tmp_path / place for place in places)
        assert f"it exists 2 times, as {one} and {other}; write the one that is meant" in reasons[number]


def test_bad_records_may_be_left_out_and_are_listed(tmp_path):
    train = write(tmp_path, sums(4) + BAD)
    module = texts(tmp_path, train=train, bad_records="skip", skipped_dir=str(tmp_path / "run"))
    module.setup("fit")
    assert sorted(prompt.id for prompt in module.draw_prompts(4)) == ["0", "1", "2", "3"]
    lines = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == ["record 4", "record 5"]
    assert "must be one of the options A, B, got 'C'" in lines[1]["reason"]


def videos(synthetic: Path, folder: Path, broken: int, missing: int, good: int) -> str:
    """Records of `good` whole videos, `broken` cut-off ones and `missing` ones."""
    (folder / "broken.mp4").write_bytes((synthetic / "videos" / "train_000000.mp4").read_bytes()[:300])
    whole = str(synthetic / "videos" / "train_000000.mp4")
    paths = [whole] * good + ["broken.mp4"] * broken + ["missing.mp4"] * missing
    records = [{"problem": "How many?", "answer": "3", "data_type": "video", "videos": path} for path in paths]
    return write(folder, records)


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_and_missing_videos_are_skipped_and_listed(synthetic, tmp_path, workers):
    train = videos(synthetic, tmp_path, broken=1, missing=1, good=6)
    module = clips(synthetic, train=train, val=train, num_workers=workers, skipped_dir=str(tmp_path))
    module.setup("fit")
    whole = [str(number) for number in range(6)]
    for _ in range(2):
        assert sorted(prompt.id for prompt in module.draw_prompts(6)) == whole
    assert sorted(prompt.id for batch in module.val_dataloader() for prompt in batch.prompts) == whole
    lines = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert sorted((line["split"], line["id"]) for line in lines) == [
        ("train", "6"), ("train", "7"), ("val", "6"), ("val", "7"),
    ]  # fmt: skip
    assert {Path(line["path"]).name for line in lines} == {"broken.mp4", "missing.mp4"}
    module.teardown("fit")


def test_too_many_missing_videos_are_an_error_in_setup(synthetic, tmp_path):
    train = videos(synthetic, tmp_path, broken=0, missing=4, good=6)
    module = clips(synthetic, train=train, skipped_dir=str(tmp_path))
    with pytest.raises(ValueError, match=r"4 of all 10 cannot be used, .*missing\.mp4: the file does not exist"):
        module.setup("fit")


def test_too_many_broken_videos_are_an_error_in_training(synthetic, tmp_path):
    train = videos(synthetic, tmp_path, broken=4, missing=0, good=6)
    module = clips(synthetic, train=train, skipped_dir=str(tmp_path))
    module.setup("fit")
    with pytest.raises(
        ValueError, match=r"data\.max_skipped_share=0\.05 of the train rows .* 4 of all 10 cannot be used"
    ):
        module.draw_prompts(10)


def test_prompts_over_the_limit_are_skipped_with_the_limit_as_reason(tmp_path):
    records = sums(6)
    records[2]["problem"] = "many words " * 100
    module = texts(tmp_path, train=write(tmp_path, records), max_prompt_tokens=200, skipped_dir=str(tmp_path))
    module.setup("fit")
    assert "2" not in [prompt.id for prompt in module.draw_prompts(10)]
    (line,) = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert line["id"] == "2"
    assert "above 200, the data.max_prompt_tokens; raise that to" in line["reason"]


# ---- several sources, limits, evaluation ----


def test_sources_may_be_joined_and_cut(tmp_path):
    both = [write(tmp_path, sums(3), "a.jsonl"), write(tmp_path, sums(5), "b.jsonl")]
    module = texts(tmp_path, train=both, test=both[0], max_train_rows=6, max_eval_rows=2)
    module.setup("fit")
    assert [row.problem for row in module.datasets["train"].rows] == ["0 + 1?", "1 + 1?", "2 + 1?"] * 2
    module.setup("test")
    assert ids(module.test_dataloader()) == [["0", "1"]]


def test_evaluation_batches_are_in_order_and_the_last_is_smaller(tmp_path):
    module = texts(tmp_path, val=write(tmp_path, sums(5), "val.jsonl"), eval_prompts_per_batch=2)
    module.setup("validate")
    assert ids(module.val_dataloader()) == [["0", "1"], ["2", "3"], ["4"]]


def test_a_data_module_travels_to_spawned_workers(synthetic):
    module = clips(synthetic)
    module.setup("fit")
    dataset = pickle.loads(pickle.dumps(module.datasets["train"]))
    assert torch.equal(dataset[0].input_ids, module.datasets["train"][0].input_ids)


@pytest.mark.parametrize(
    ("weights", "compute", "wanted"),
    [
        ("float32", None, torch.float32),
        ("bfloat16", None, torch.bfloat16),
        ("float32", "bfloat16", torch.bfloat16),
        ("bfloat16", "float32", torch.float32),  # nothing is rounded that the encoder would not round
    ],
)
def test_patches_leave_the_loader_in_the_precision_that_the_encoder_computes_in(
    synthetic, monkeypatch, weights, compute, wanted
):
    module = clips(synthetic, num_workers=1)
    module.renderer.family = vl_family(dtype=weights)
    monkeypatch.setattr(module, "_parallel", lambda: Parallel(compute_dtype=compute))
    module.setup("fit")
    (batch, *_) = module.train_dataloader()
    assert {item.patches.dtype for prompt in batch.prompts for item in prompt.media} == {wanted}


def test_patches_are_pinned_for_a_gpu_alone(synthetic):
    for device in ("cpu", "cuda"):
        module = clips(synthetic, num_workers=1)
        strategy = SimpleNamespace(root_device=torch.device(device))
        module.trainer = SimpleNamespace(
            strategy=strategy,
            distributed_sampler_kwargs=None,
            lightning_module=SimpleNamespace(parallel=Parallel()),
            default_root_dir=".",
            is_global_zero=False,
        )
        module.setup("fit")
        assert module.stream.options.pin_memory == (device == "cuda")


# ---- resuming a Lightning run ----


class Recorder(LightningModule):
    """Notes which prompts every step saw, and asks for a refill in some steps, as dynamic sampling does."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.parallel = Parallel()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: dict[int, list[str]] = {}

    def training_step(self, batch, batch_idx):
        step = self.global_step
        extra = self.trainer.datamodule.draw_prompts(step % 3 % 2)
        self.seen[step] = [prompt.id for prompt in (*batch.prompts, *extra)]
        self.optimizers().step()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train(folder: Path, module: LongVideoReason, checkpoint: Path | None = None, **limits) -> dict[int, list[str]]:
    """Trains with a checkpoint after every step; returns what each step saw."""
    keep_all = ModelCheckpoint(folder / "checkpoints", "{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        callbacks=[keep_all],
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_epochs": 3, **limits},
    )
    recorder = Recorder()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not resumable.*")
        trainer.fit(recorder, datamodule=module, ckpt_path=checkpoint, weights_only=True)
    return recorder.seen


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory) -> tuple[Path, dict[int, list[str]]]:
    """Three epochs of three steps, uninterrupted, with validation after each epoch."""
    folder = tmp_path_factory.mktemp("run")
    seen = train(folder, texts(folder, val=write(folder, sums(2), "val.jsonl")))
    assert list(seen) == list(range(9))
    assert [len(prompts) for prompts in seen.values()] == [2, 3, 2] * 3
    return folder, seen


# An epoch ends after steps 3 and 6.
@pytest.mark.parametrize(("step", "workers"), [(1, 0), (2, 0), (2, 2), (3, 0), (3, 2), (4, 0), (6, 2), (8, 0)])
def test_a_killed_run_goes_on_with_the_same_prompts(whole_run, tmp_path, step, workers):
    folder, seen = whole_run
    module = texts(folder, val=str(folder / "val.jsonl"), num_workers=workers)
    again = train(tmp_path, module, folder / "checkpoints" / f"step={step}.ckpt")
    assert again == {number: prompts for number, prompts in seen.items() if number >= step}


@pytest.mark.parametrize("step", [2, 3, 5, 6])
def test_a_run_that_stopped_at_max_steps_goes_on_with_the_same_prompts(whole_run, tmp_path, step):
    folder, seen = whole_run
    val = {"val": str(folder / "val.jsonl")}
    first = train(tmp_path, texts(folder, **val), max_steps=step, max_epochs=-1)
    again = train(
        tmp_path, texts(folder, **val), tmp_path / "checkpoints" / f"step={step}.ckpt", max_steps=9, max_epochs=-1
    )
    assert {**first, **again} == seen
    assert list(again) == list(range(step, 9))


def test_a_checkpoint_saved_at_the_end_of_an_epoch_resumes_with_the_next(whole_run, tmp_path):
    folder, seen = whole_run
    trainer = Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        logger=False,
        max_epochs=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Recorder(), datamodule=texts(folder))
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    again = train(tmp_path, texts(folder), tmp_path / "end.ckpt")
    assert again == {number: prompts for number, prompts in seen.items() if number >= 3}


def test_a_run_with_other_data_refuses_the_checkpoint(whole_run, tmp_path):
    folder, _ = whole_run
    with pytest.raises(ValueError, match=r"its seed was 0 and is now 1; restore data\.train and data\.seed"):
        train(tmp_path, texts(folder, seed=1), folder / "checkpoints" / "step=2.ckpt")


def test_validating_a_checkpoint_needs_no_training_data(whole_run, tmp_path):
    folder, _ = whole_run
    module = LongVideoReason(text_family(), val=str(folder / "val.jsonl"))
    trainer = Trainer(default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_progress_bar=False)
    trainer.validate(Recorder(), datamodule=module, ckpt_path=folder / "checkpoints" / "step=2.ckpt", weights_only=True)


def test_a_state_loaded_before_setup_waits_for_it(tmp_path):
    first, again = texts(tmp_path), texts(tmp_path)
    first.setup("fit")
    first.draw_prompts(4)
    again.load_state_dict(first.state_dict())
    again.setup("fit")
    assert ids(again.train_dataloader()) == ids(first.train_dataloader())


# ---- configs ----


PIECES = [path for path in sorted(CONFIGS.glob("*.yaml")) if path.stem not in PROMPT_FILES]


@pytest.mark.parametrize("path", PIECES, ids=lambda path: path.stem)
def test_every_shipped_piece_parses(path):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(LongVideoReason, "data", skip={"family"}, instantiate=False)
    options = parser.instantiate(parser.parse_args([f"--data={path}"])).data
    assert LongVideoReason(vl_family(), **vars(options)).sources["test"]


def test_a_share_of_training_rows_comes_without_media_and_reasoning():
    renderer = RowRenderer(
        vl_family(), VideoSampling(), stage="sft", blind_share=0.3, answer_template="<think></think>{option}"
    )
    rows = [Row(str(i), "Which?\nA. a cat\nB. a dog", "B", reasoning="It barks.") for i in range(2_000)]
    blind = [row.id for row in rows if renderer.drops_media(row)]
    assert 500 < len(blind) < 700
    assert blind == [row.id for row in rows if renderer.drops_media(row)]
    prompt = renderer(rows[int(blind[0])])
    assert renderer.family.decode(prompt.response.token_ids) == "<think></think>a dog"


def test_a_target_may_name_the_option_instead_of_its_letter():
    template = "<think>{reasoning}</think><answer>{option}</answer>"
    renderer = RowRenderer(vl_family(), VideoSampling(), stage="sft", response_template=template)
    row = Row("1", "Which?\nA. a cat\nB. a dog", "B", reasoning="It barks.")
    assert renderer.response(row) == "<think>It barks.</think><answer>a dog</answer>"
    free = Row("2", "Why?", "because", task="open_ended", reasoning="So.")
    assert renderer.response(free) == "<think>So.</think><answer>because</answer>"


def test_the_command_line_reads_no_data_file_as_a_config(tmp_path):
    """It would take minutes for megabytes, and an empty file would be no file."""
    parser = ArgumentParser()
    parser.add_class_arguments(LongVideoReason, "data", skip={"family"}, sub_configs=True, instantiate=False)
    for content in ("", "[]", '["other.jsonl"]', '[{"source": "other.jsonl"}]'):
        file = tmp_path / "rows.json"
        file.write_text(content)
        given = [{"source": "a.jsonl", "weight": 2.0, "fields": {}, "streaming": False}]
        config = parser.parse_object({"data": {"train": str(file), "val": [str(file)], "test": copy.deepcopy(given)}})
        written = yaml.safe_load(parser.dump(config))["data"]
        assert (written["train"], written["val"], written["test"]) == (str(file), [str(file)], given)
