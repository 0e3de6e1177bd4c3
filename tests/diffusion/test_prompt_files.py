"""Prompt files: what is read, what is refused and on which line, and what a resumed run sees."""

import json
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn

from longrl.datamodules.loading.row_order import permutation
from longrl.diffusion.prompt_files import PromptBatch, PromptFiles
from longrl.diffusion.prompt_rows import geneval_row, ocr_row, prompt_row, read_prompts
from longrl.types import Row

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization"),
    pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]
GENEVAL = {
    "tag": "counting",
    "include": [{"class": "clock", "count": 2}],
    "exclude": [{"class": "clock", "count": 3}],
    "prompt": "a photo of two clocks",
}


def text_file(folder: Path, *lines: str, name: str = "prompts.txt") -> str:
    (folder / name).write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return str(folder / name)


def jsonl(folder: Path, *records: object, name: str = "prompts.jsonl") -> str:
    return text_file(folder, *map(json.dumps, records), name=name)


def module(folder: Path, count: int = 7, **options) -> PromptFiles:
    """`count` prompts "p1", "p2", ... in batches of two."""
    train = text_file(folder, *(f"p{n}" for n in range(1, count + 1)), name="train.txt")
    return PromptFiles(**{"train": train, "prompts_per_batch": 2, **options})


def problems(batches) -> list[list[str]]:
    return [[row.problem for row in batch.prompts] for batch in batches]


# ---- what is read ----


def test_a_line_of_text_is_a_prompt_and_its_number_the_id(tmp_path):
    path = text_file(tmp_path, "\ufeffa red square", "", "  ein grünes Haus ", "line\u2028separator")
    assert read_prompts(path, prompt_row) == [
        Row(id="1", problem="a red square", answer="", task="generation"),
        Row(id="3", problem="ein grünes Haus", answer="", task="generation"),
        Row(id="4", problem="line\u2028separator", answer="", task="generation"),
    ]


def test_other_fields_of_a_record_are_metadata(tmp_path):
    (row,) = read_prompts(jsonl(tmp_path, {"id": 9, "prompt": "x", "answer": "y", "seed": 3, "tag": "t"}), prompt_row)
    assert row == Row("9", "x", "y", task="generation", category="t", metadata={"seed": 3, "tag": "t"})


def test_a_geneval_record_keeps_what_must_be_seen(tmp_path):
    (row,) = read_prompts(jsonl(tmp_path, GENEVAL), geneval_row)
    assert (row.problem, row.category) == ("a photo of two clocks", "counting")
    assert row.metadata == {name: GENEVAL[name] for name in ("tag", "include", "exclude")}


def test_the_text_that_a_picture_must_show_is_the_answer(tmp_path):
    path = jsonl(tmp_path, {"prompt": 'a sign that says "Open"'}, {"prompt": "a shop", "answer": "Closed"})
    assert [row.answer for row in read_prompts(path, ocr_row)] == ["Open", "Closed"]


def test_a_parquet_file_is_read_too(tmp_path):
    from pyarrow import Table, parquet

    parquet.write_table(Table.from_pylist([{"prompt": "a"}, {"prompt": None}]), tmp_path / "p.parquet")
    first, second = read_prompts(str(tmp_path / "p.parquet"), prompt_row)
    assert first.problem == "a"
    assert str(second).startswith(f"record 2 of {tmp_path / 'p.parquet'}: a record needs its text in 'prompt'")


# ---- what is refused ----


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{not json", "no JSON: .*; a file of plain prompts is named .txt"),
        (b'["a list"]', "must hold a record such as .*, got list"),
        (b'{"caption": "a dog"}', 'needs its text in \'prompt\', got {"caption": "a dog"}'),
        (b'{"prompt": "  "}', "needs its text in 'prompt'"),
        (b'{"prompt": 3}', "needs its text in 'prompt'"),
        (b'{"prompt": "\xff"}', "no UTF-8 at byte 12"),
    ],
)
def test_a_bad_line_is_an_error_with_its_number(tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"prompt": "fine"}\n\n' + line + b"\n" + line + b"\n")
    data = PromptFiles(train=str(path))
    with pytest.raises(ValueError, match=rf"2 of 3 prompts of data\.train.*first: line 3 of {path}: .*{message}"):
        data.setup("fit")


def test_bytes_that_are_no_text_are_found_in_plain_files_too(tmp_path):
    path = tmp_path / "bad.txt"
    path.write_bytes(b"good\nb\xe4d\n")
    with pytest.raises(ValueError, match=rf"1 of 2 .*line 2 of {path}: no UTF-8 at byte 1; save the file as UTF-8"):
        PromptFiles(train=str(path)).setup("fit")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "x", "tag": "t"}, "needs 'tag' and a list 'include', got .'prompt', 'tag'."),
        ({**GENEVAL, "include": [{"class": "cat"}]}, "needs 'class' and 'count', got {'class': 'cat'}"),
    ],
)
def test_a_geneval_record_without_its_objects_is_an_error(tmp_path, record, message):
    data = PromptFiles(train=jsonl(tmp_path, GENEVAL, record), row_function=f"{geneval_row.__module__}.geneval_row")
    with pytest.raises(ValueError, match=f"line 2 of .*{message}"):
        data.setup("fit")


def test_a_prompt_for_ocr_without_quotes_is_an_error(tmp_path):
    data = PromptFiles(train=text_file(tmp_path, 'say "hi"', "say hi"), row_function=f"{ocr_row.__module__}.ocr_row")
    with pytest.raises(ValueError, match=r"line 2 of .*must hold its text in double quotes, got 'say hi'"):
        data.setup("fit")


def test_missing_empty_and_unnamed_sources_are_errors(tmp_path):
    with pytest.raises(ValueError, match="'nowhere.txt' does not exist"):
        PromptFiles(train="nowhere.txt").setup("fit")
    with pytest.raises(ValueError, match=r"holds no prompt; write one on each line"):
        PromptFiles(train=text_file(tmp_path, "", " ")).setup("fit")
    with pytest.raises(ValueError, match=r"`test` reads data\.test, which is not set"):
        PromptFiles(train="x.txt").setup(TrainerFn.TESTING)  # as Lightning calls it
    with pytest.raises(ValueError, match=r"data\.max_train_rows must be at least 1, got 0"):
        PromptFiles(train="x.txt", max_train_rows=0)
    with pytest.raises(ValueError, match=r"prompts_per_batch=8 .* data\.train has 7 rows"):
        module(tmp_path, prompts_per_batch=8).setup("fit")
    same = jsonl(tmp_path, {"id": "a", "prompt": "x"}, {"id": "a", "prompt": "y"})
    with pytest.raises(ValueError, match="must have different ids, but 2 have 'a'"):
        PromptFiles(train=same).setup("fit")


# ---- batches ----


def test_batches_hold_rows_in_an_order_that_the_seed_decides(tmp_path):
    data = module(tmp_path, seed=3)
    data.setup("fit")
    loader = data.train_dataloader()
    (first, *_) = batches = list(loader)
    wanted = [f"p{index + 1}" for index in permutation(7, 3, 0)]
    assert problems(batches) == [wanted[0:2], wanted[2:4], wanted[4:6]]
    assert isinstance(first, PromptBatch)
    assert first.to(torch.device("cpu")) is first
    assert [row.problem for row in data.draw_prompts(2)] == [wanted[6], f"p{permutation(7, 3, 1)[0] + 1}"]


def test_sources_are_joined_with_ids_that_name_them(tmp_path):
    one, two = text_file(tmp_path, "a", "b", name="one.txt"), text_file(tmp_path, "c", name="two.txt")
    data = PromptFiles(train=[one, two], val=one, max_train_rows=3, max_eval_rows=1, prompts_per_batch=1)
    data.setup("fit")
    assert [(row.id, row.problem) for row in data.rows["train"]] == [("one/1", "a"), ("one/2", "b"), ("two/1", "c")]
    assert [row.id for row in data.rows["val"]] == ["1"]


def test_ranks_read_different_prompts_and_evaluate_all_of_them_once(tmp_path):
    train, val = [], []
    for rank in range(2):
        data = module(tmp_path, val=text_file(tmp_path, *"abcde", name="val.txt"), eval_prompts_per_batch=2)
        data.trainer = SimpleNamespace(distributed_sampler_kwargs={"rank": rank, "num_replicas": 2})
        data.setup("fit")
        train += problems(data.train_dataloader())
        val.append(problems(data.val_dataloader()))
    assert train == [[f"p{permutation(7, 0, 0)[place] + 1}" for place in places] for places in ((0, 2), (1, 3))]
    assert val == [[["a", "c"], ["e"]], [["b", "d"], []]]


# ---- resuming a Lightning run ----


class Recorder(LightningModule):
    """Notes which prompts every step saw, and asks for a refill in some steps, as dynamic sampling does."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: dict[int, list[str]] = {}

    def training_step(self, batch, batch_idx):
        step = self.global_step
        extra = self.trainer.datamodule.draw_prompts(step % 3 % 2)
        self.seen[step] = [row.problem for row in (*batch.prompts, *extra)]
        self.optimizers().step()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train(folder: Path, data: PromptFiles, checkpoint: Path | None = None) -> dict[int, list[str]]:
    """Three epochs with a checkpoint after every step; returns what each step saw."""
    keep_all = ModelCheckpoint(folder / "checkpoints", "{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = Trainer(
        default_root_dir=folder, accelerator="cpu", logger=False, callbacks=[keep_all], max_epochs=3,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    recorder = Recorder()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not resumable.*")
        trainer.fit(recorder, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    return recorder.seen


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory) -> tuple[Path, dict[int, list[str]]]:
    folder = tmp_path_factory.mktemp("run")
    seen = train(folder, module(folder, val=text_file(folder, "v1", "v2", name="val.txt")))
    assert [len(prompts) for prompts in seen.values()] == [2, 3, 2] * 3
    return folder, seen


@pytest.mark.parametrize("step", [1, 3, 4, 6, 8])  # an epoch ends after steps 3 and 6
def test_a_killed_run_goes_on_with_the_same_prompts(whole_run, tmp_path, step):
    folder, seen = whole_run
    again = train(tmp_path, module(folder, val=str(folder / "val.txt")), folder / "checkpoints" / f"step={step}.ckpt")
    assert again == {number: prompts for number, prompts in seen.items() if number >= step}


def test_a_run_with_other_prompts_or_another_seed_refuses_the_checkpoint(whole_run, tmp_path):
    folder, _ = whole_run
    with pytest.raises(ValueError, match=r"its seed was 0 and is now 1; restore data\.train and data\.seed"):
        train(tmp_path, module(folder, seed=1), folder / "checkpoints" / "step=2.ckpt")
    other = PromptFiles(train=text_file(tmp_path, *"abcdefg"), prompts_per_batch=2)
    with pytest.raises(ValueError, match="fingerprint of the rows"):
        train(tmp_path, other, folder / "checkpoints" / "step=2.ckpt")
