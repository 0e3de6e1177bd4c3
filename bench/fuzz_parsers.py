"""The parsers that read what strangers write, each with its seeds, its words and the errors that it may raise."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import fuzz_inputs as inputs
import torch
from common import ROOT
from fuzz_seeds import (
    ANSWERS,
    FORMULA_WORDS,
    FORMULAS,
    FRAME_LIST,
    LINES,
    PROBLEM,
    QUESTION,
    RECORD_WORDS,
    RECORDS,
    REPLY,
    ROWS,
    SRT,
    SUBTITLE_WORDS,
    VTT,
    WORDS,
)
from jsonargparse import get_loader

from longrl.chat.client import ReplyCache
from longrl.chat.endpoint import read_reply
from longrl.commands import run_config
from longrl.datamodules.media.frame_lists import FRAME_LIST_SUFFIX, read_frame_list
from longrl.datamodules.media.subtitles import Subtitles, read_subtitles, subtitle_text
from longrl.datamodules.rows.question_rows import RowFunction, make_rows
from longrl.datamodules.rows.sources import read_records
from longrl.diffusion.prompt_rows import geneval_row, ocr_row, prompt_row, read_prompts
from longrl.engines.server_protocol import check_message, dump_requests, load_requests, pack_message, unpack_message
from longrl.environments.calculator import Calculator
from longrl.evaluation import published_rules
from longrl.evaluation.curves import read_metrics
from longrl.evaluation.report_page import mark_answer
from longrl.evaluation.samples import read_samples
from longrl.features.files import FeatureFiles, pack_features
from longrl.io.append_log import AppendLog
from longrl.modules.initial_weights import saved_weights
from longrl.modules.skipped_steps import StepRecord, load_step_record, write_step_record
from longrl.pipeline.parsing import parse_question
from longrl.rewards.answers import think_answer_format
from longrl.rewards.judge import judge_score
from longrl.rewards.math import is_equal
from longrl.rewards.numeric import number, numbers
from longrl.rewards.options import parse_options
from longrl.rewards.reward_sum import accuracy, accuracy_lenient, check_answer
from longrl.types import Completion

EMPTY = torch.zeros(0)
Input = Any


@dataclass(frozen=True)
class Parser:
    """What is fed and how."""

    name: str
    make: Callable[[random.Random], Input]
    """An input; a text or bytes, or JSON values."""
    read: Callable[[Input], object]
    refusals: tuple[type[Exception], ...] = ()
    """Documented errors: how the parser says no. A result that is an error counts as one."""
    own_limit: float | None = None
    """Seconds that the parser itself allows an input, in a process of its own; None for the rule of all."""


# ---- texts of models ----


def completion(text: str) -> Completion:
    """A completion of a text."""
    return Completion(EMPTY, EMPTY, text, "stop")


def answer_text(rng: random.Random) -> str:
    """What a model might answer, with its tags or the bare content."""
    text = inputs.text(rng, ANSWERS, WORDS)
    return f"<answer>{text}</answer>" if rng.random() < 0.3 else text


def judged(task: str) -> Callable[[str], object]:
    """Both judges of a task."""
    row = ROWS[task]
    return lambda text: (accuracy(completion(text), row), accuracy_lenient(completion(text), row))


def judged_truth(task: str) -> Callable[[str], object]:
    """As `judged`, and the text as the truth of a row."""
    judge = judged(task)

    def read(text: str) -> object:
        with contextlib.suppress(ValueError):
            check_answer(replace(ROWS[task], answer=text))
        return judge(text)

    return read


def options_and_rules(text: str) -> object:
    """The text as a question, and as an answer under the rules of published protocols."""
    row = ROWS["multiple_choice"]
    rules = (published_rules.lmms_eval_letter, published_rules.long_rl_exact_letter, published_rules.qwen_option)
    return parse_options(text), [rule(completion(text), row) for rule in rules]


def formula(rng: random.Random) -> tuple[str, str]:
    """A ground truth and what is said to equal it."""
    gold, said = rng.choice(FORMULAS)
    return gold, inputs.text(rng, (gold, said), FORMULA_WORDS)


# ---- records ----

PROMPT_FUNCTIONS = (prompt_row, geneval_row, ocr_row)


def record_texts(rng: random.Random) -> Callable[[], str]:
    """Texts for the fields of records."""
    seeds = (*ANSWERS, PROBLEM, "v.mp4", "B", "3.5")
    return lambda: inputs.text(rng, seeds, RECORD_WORDS)


def record(rng: random.Random) -> tuple[RowFunction, object]:
    """A row function and a record, at times of another schema."""
    function, seed = rng.choice(RECORDS)
    if rng.random() < 0.15:
        function, _ = rng.choice(RECORDS)
    change = inputs.with_hostile_text if rng.random() < 0.6 else inputs.mutated_value
    return function, change(rng, seed, record_texts(rng))


def refused_or(make: Callable[[], object]) -> object:
    """The result, or the ValueError in its place."""
    try:
        return make()
    except ValueError as error:
        return error


class Files:
    """Parsers of files, each of which is written anew to one folder.

    Args:
        folder: an empty one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.count = 0

    def write(self, suffix: str, content: bytes) -> Path:
        """A file of a name that no cache knows."""
        self.count += 1
        path = self.folder / f"{self.count % 7}" / f"input{self.count}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        for earlier in path.parent.iterdir():
            earlier.unlink()
        path.write_bytes(content)
        return path

    def rows(self, made: tuple[RowFunction, Any]) -> object:
        """Rows, errors among them."""
        function, value = made
        listed = value if isinstance(value, dict) else {"problem": value}
        if function in PROMPT_FUNCTIONS:
            return refused_or(lambda: function(listed, 0, None))
        return make_rows([listed], function, str(self.folder))

    def records(self, made: tuple[str, bytes]) -> object:
        """Records of a file."""
        return read_records(self.write(*made))

    def prompts(self, content: bytes) -> object:
        """Prompts of a file, errors among them."""
        return read_prompts(str(self.write(".jsonl", content)), ocr_row)

    def subtitles(self, made: tuple[str, bytes]) -> object:
        """Lines of a file."""
        return read_subtitles(self.write(*made))

    def frame_list(self, content: bytes) -> object:
        """Frames that a file names."""
        return read_frame_list(self.write(FRAME_LIST_SUFFIX, content))

    def features(self, content: bytes) -> object:
        """Features of a file; None where it is to be encoded again."""
        files = FeatureFiles(self.folder / "features", "encoder", 1 << 40)
        files.path("key").write_bytes(content)
        return files.read("key")

    def step_record(self, content: bytes) -> object:
        """A step that was left out."""
        return load_step_record(self.write(".safetensors", content))

    def checkpoint(self, content: bytes) -> object:
        """Weights of a checkpoint."""
        return saved_weights(self.write(".ckpt", content))

    def journal(self, content: bytes) -> object:
        """Entries of a journal, and what they cost."""
        path = self.write(".jsonl", content)
        entries = list(AppendLog(path.parent).read())
        return entries, ReplyCache(path.parent).spent

    def metrics(self, content: bytes) -> object:
        """Curves of a metrics.csv."""
        return read_metrics(self.write(".csv", content))

    def samples(self, content: bytes) -> object:
        """The questions of a report."""
        path = self.write(".jsonl", content)
        path.rename(path.with_name("samples.jsonl"))
        return list(read_samples(path.parent))


def record_file(rng: random.Random) -> tuple[str, bytes]:
    """A data file."""
    suffix = rng.choice((".jsonl", ".json", ".csv", ".tsv"))
    texts = record_texts(rng)
    chosen = [rng.choice(RECORDS)[1] for _ in range(rng.randint(1, 3))]
    if suffix == ".json":
        return suffix, inputs.json_bytes(rng, chosen, texts)
    if suffix == ".jsonl":
        return suffix, b"\n".join(inputs.json_bytes(rng, each, texts) for each in chosen)
    table = inputs.text(rng, ("problem,answer,id\nWhat?,B,1\n", "problem\tanswer\nx\ty\n"), (",", "\t", '"', "\n"))
    return suffix, inputs.mutated_bytes(rng, table.encode("utf-8", "surrogatepass"))


# ---- subtitles ----


def subtitle_file(rng: random.Random) -> tuple[str, bytes]:
    """A subtitle file of each kind."""
    suffix = rng.choice((".srt", ".vtt", ".json"))
    if suffix == ".json":
        seed: Any = LINES if rng.random() < 0.5 else {"segments": LINES}
        return suffix, inputs.json_bytes(rng, seed, lambda: inputs.text(rng, ("0:12", "hello"), SUBTITLE_WORDS))
    content = inputs.text(rng, (SRT if suffix == ".srt" else VTT,), SUBTITLE_WORDS).encode("utf-8", "surrogatepass")
    return suffix, inputs.mutated_bytes(rng, content) if rng.random() < 0.3 else content


def inline_subtitles(value: Any) -> object:
    """The text in place of `{subtitles}` for lines that stand in a record."""
    row = replace(ROWS["exact"], metadata={"subtitles": value}, videos=("v.mp4",))
    return subtitle_text(row, Subtitles(source="record", lines="all", times=True, when_blind="keep"), None)


def inline_value(rng: random.Random) -> Any:
    """Lines, a text, or a file's name."""
    return inputs.mutated_value(
        rng, rng.choice((LINES, SRT, {"segments": LINES})), lambda: inputs.text(rng, (SRT,), WORDS)
    )


# ---- replies ----


def judge_reply(rng: random.Random) -> bytes:
    """The body of a server's answer."""
    texts = ("SCORE: 1", "The answer is right.\nSCORE: 0.25", "SCORE: 7", "I refuse.")
    return inputs.json_bytes(
        rng, REPLY, lambda: inputs.text(rng, texts, ("SCORE", ":", "1.", "0", "<think>", "</think>"))
    )


def judge(content: bytes) -> object:
    """The score in it."""
    return judge_score(read_reply(content)[1])


def question_reply(rng: random.Random) -> str:
    """A model's question, in prose or fences."""
    content = inputs.json_bytes(rng, QUESTION, lambda: inputs.text(rng, ("dog", "B", "1:15"), WORDS))
    text = content.decode("utf-8", "surrogateescape")
    before, behind = rng.choice(
        (("", ""), ("Here:\n```json\n", "\n```"), ('{"a": ', "}"), ("{" * inputs.length(rng), ""))
    )
    return before + text + behind


def question(text: str) -> object:
    """Both kinds of a question."""
    try:
        parse_question(text, "open_ended")
    finally:
        made = parse_question(text, "multiple_choice")
    return made


# ---- tool calls ----


def tool_turn(rng: random.Random) -> str:
    """A turn with calls of tools."""
    call = {"name": "calculate", "arguments": {"expression": "(1 + 2) * 3"}}
    form = "<function=calculate>\n<parameter=expression>\n1 + 2\n</parameter>\n</function>"
    texts = inputs.text(rng, (form, json.dumps(call)), ("<tool_call>", "</tool_call>", "</parameter>", "{", '"name":'))
    content = inputs.json_bytes(rng, call, lambda: inputs.text(rng, ("1 + 2", "9 ** 9"), WORDS))
    json_call = f"<tool_call>{content.decode('utf-8', 'surrogateescape')}</tool_call>"
    return json_call + f"<tool_call>{texts}</tool_call>"


def tool_answers(text: str) -> object:
    """What a calculator answers to it."""
    return Calculator().step(text)


# ---- configs ----


def config_text(rng: random.Random, seeds: Sequence[str]) -> tuple[str, bytes]:
    """A command that reads a config, and a YAML text."""
    words = (
        "&a",
        "*a",
        "<<:",
        "!!python/name:os.system",
        "!!int",
        "- ",
        "{",
        "[",
        "? ",
        "|",
        "%YAML",
        "---",
        "class_path:",
        "0x1f",
        "1_0",
    )
    content = inputs.text(rng, seeds, words).encode("utf-8", "surrogatepass")
    return rng.choice(("fit", "evaluate")), inputs.mutated_bytes(rng, content) if rng.random() < 0.3 else content


def read_config(made: tuple[str, bytes]) -> object:
    """A config file's values, as the command line has them."""
    command, content = made
    check = run_config.evaluation_config
    if command == "fit":
        check = lambda values, path: run_config.training_config(values, path, "language")  # noqa: E731
    run_config.set_config_reader(check)
    try:
        return get_loader("yaml")(content.decode(), "given.yaml")
    finally:
        run_config.set_config_reader()


def config_seeds() -> list[str]:
    """The smaller ones of our own configs."""
    paths = sorted((ROOT / "configs").rglob("*.yaml"))
    return [path.read_text() for path in paths if path.stat().st_size < 3000]


# ---- binary files ----


def server_message(body: bytes) -> object:
    """The requests of a message."""
    message, tensors = unpack_message(body)
    check_message(message)
    return load_requests(message["requests"], tensors)


def server_request(content: bytes) -> object:
    """Requests without tensors."""
    return load_requests(content.decode("latin-1"), {}, 4)


def packed_files(folder: Path) -> tuple[bytes, bytes, bytes, bytes]:
    """A whole file of features, of a step, of a checkpoint and of a server's message."""
    tensor = torch.arange(12.0).reshape(3, 4)
    features = pack_features({"key": "key", "provenance": "encoder"}, tensor, 1.5)
    step = folder / "step.safetensors"
    tensors = {"input_ids.0": torch.arange(5), "completions.0": torch.arange(3), "weights": torch.ones(1)}
    write_step_record(step, StepRecord([ROWS["exact"]], tensors, {"num_completions": 1}), {"global_step": 1})
    checkpoint = folder / "whole.ckpt"
    torch.save({"state_dict": {"model.a": tensor, "model.b": tensor[0]}, "global_step": 3}, checkpoint)
    tensors = {}
    requests = dump_requests([{"prompt_token_ids": [1, 2], "multi_modal_data": {"video": tensor}}], tensors)
    fields = {"version": "run:3", "requests": requests, "tensors": list(tensors), "params": [{"n": 2}]}
    message = pack_message(fields, tensors)
    return features, step.read_bytes(), checkpoint.read_bytes(), message


def all_parsers(folder: Path) -> Iterable[Parser]:
    """Every parser; files are written to an empty folder."""
    files = Files(folder)
    (folder / "features").mkdir()
    features, step, checkpoint, message = packed_files(folder)
    seeds = config_seeds()
    journal = {"key": "k", "time": 1.0, "response": REPLY, "prompt_tokens": 3, "completion_tokens": 1, "cost": 0.5}
    sample = {
        "id": "q",
        "task": "exact",
        "category": "c",
        "problem": "What?",
        "answer": "B",
        "text": "B",
        "correct": True,
    }
    metrics = "step,epoch,train/loss,reward/mean\n1,0,0.5,\n2,0,nan,0.25\n"
    texts = lambda rng: lambda: inputs.text(rng, ANSWERS, WORDS)  # noqa: E731
    binary = lambda seed: lambda rng: inputs.mutated_bytes(rng, seed)  # noqa: E731
    valued = lambda seed: lambda rng: inputs.json_bytes(rng, seed, texts(rng))  # noqa: E731

    def lines(seed: object) -> Callable[[random.Random], bytes]:
        return lambda rng: b"\n".join(valued(seed)(rng) for _ in range(rng.randint(1, 3))) + b"\n"

    def csv_bytes(rng: random.Random) -> bytes:
        content = inputs.text(rng, (metrics,), (",", '"', "\n", "nan", "1e999", "step"))
        return content.encode("utf-8", "surrogatepass")

    return (
        Parser("records", record, files.rows),
        Parser("record files", record_file, files.records, (ValueError,)),
        Parser("prompt files", lines({"prompt": 'A sign that says "open"', "id": 1}), files.prompts, (ValueError,)),
        Parser("answers: format", answer_text, lambda text: think_answer_format(completion(text), ROWS["exact"])),
        Parser("answers: option choice", answer_text, judged("multiple_choice")),
        Parser("answers: options, protocols", answer_text, options_and_rules),
        Parser("answers: exact", answer_text, judged("exact")),
        Parser("answers: ocr", answer_text, judged("ocr")),
        Parser("answers: free form", answer_text, judged_truth("free_form")),
        Parser("intervals", answer_text, judged_truth("temporal_iou")),
        Parser("timed boxes", answer_text, judged_truth("box_iou")),
        Parser("numbers", answer_text, judged_truth("numeric")),
        Parser("numbers: in texts", answer_text, lambda text: (number(text), numbers(text))),
        Parser("math", formula, lambda pair: is_equal(*pair), own_limit=10.0),
        Parser("subtitles: files", subtitle_file, files.subtitles, (ValueError,)),
        Parser("subtitles: inline", inline_value, inline_subtitles, (ValueError,)),
        Parser("frame lists", valued(FRAME_LIST), files.frame_list, (ValueError,)),
        Parser("feature headers", binary(features), files.features),
        Parser("checkpoint headers", binary(checkpoint), files.checkpoint, (ValueError,)),
        Parser("step records", binary(step), files.step_record, (ValueError,)),
        Parser("server messages", binary(message), server_message, (ValueError,)),
        Parser("server requests", valued([{"a": [1], "b": {"tensor:": "c"}}]), server_request, (ValueError,)),
        Parser("tool calls", tool_turn, tool_answers),
        Parser("judge replies", judge_reply, judge, (ValueError,)),
        Parser("pipeline replies", question_reply, question, (ValueError,)),
        Parser("configs", lambda rng: config_text(rng, seeds), read_config, (ValueError,)),
        Parser("journals", lines(journal), files.journal),
        Parser("metrics.csv", csv_bytes, files.metrics, (ValueError,)),
        Parser("reports: answers", answer_text, mark_answer),
        Parser("samples.jsonl", lines(sample), files.samples, (ValueError,)),
    )


def shown(value: Input) -> str:
    """An input for people: its beginning."""
    text = value if isinstance(value, str) else json.dumps(value, default=repr)
    return ascii(text)[:300]
