"""`python -m longrl init DIR`: a folder to start from, with configs of SFT and RL, records, a reward and a README."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from longrl.commands.parsers import ShortErrors
from longrl.io.atomic import atomic_folder, atomic_write
from longrl.io.disk_space import check_writable
from longrl.io.shipped_files import shipped

if TYPE_CHECKING:
    from longrl.commands.init_records import StartRecords

DESCRIPTION = """Writes a folder to start from: sft.yaml and rl.yaml with every value explained, family.yaml (which
model), records, a stub of a row function and of a reward, and README.md with the next commands. All of it is yours to
change, and the commands work from any folder."""
EPILOG = """example: python -m longrl init my_run --videos my/videos --questions my/questions.jsonl"""
TEMPLATES = Path(__file__).parent / "init_files"
MODELS = (
    "qwen2_5_vl_3b", "qwen2_5_vl_7b", "qwen2_vl_7b", "qwen3_vl_4b", "qwen3_vl_8b", "qwen3_5_9b", "internvl3_5_8b",
    "qwen2_5_omni_7b",
)  # fmt: skip
"""Files of configs/family whose models read videos and train with adapters on one GPU of 80 GB."""
SFT_PROMPTS, RL_PROMPTS = 16, 8
"""Records of a step, where there are as many."""
DEMO_MODEL = "configs/demo/base"
FAMILY_COMMENTS = {
    "model": "hub id or folder",
    "dtype": "of the frozen weights; adapters are float32 whatever this says",
    "lora": "adapters are trained; null trains all weights, which need dtype float32 and several times the memory",
    "freeze_vision_encoder": "each video is encoded once per step, without gradient",
    "gradient_checkpointing": "less memory for about a third more time per update",
    "min_pixels": "the least that a frame is enlarged to",
    "max_pixels": "the most of a frame: fewer pixels are fewer tokens",
    "max_video_pixels": "the most of a whole video",
}


@dataclass(frozen=True)
class Scale:
    """What depends on the model's size and on the machine."""

    sft_lr: str = "1.0e-4"
    rl_lr: str = "1.0e-5"
    sft_steps: int = 100
    rl_steps: int = 200
    accelerator: str = "gpu"
    precision: str = "bf16-mixed  # training steps compute in bfloat16"
    fps: float = 1.0
    max_frames: int = 128
    completion_tokens: int = 1024
    micro_batch: int = 16_384
    num_workers: int = 4
    templates: str = ""
    """Lines of `data`: what the demo's model is asked, and how it answers."""


DEMO_TEMPLATES = """\
  # The demo's model is too small to be told how to answer, and to find an option's letter: it says the wording.
  question_template: "{problem}"
  response_template: "<think>{reasoning}</think><answer>{option}</answer>"
  answer_template: "<think></think><answer>{option}</answer>"
"""
LAPTOP = Scale(
    sft_lr="1.0e-3",
    rl_lr="4.0e-4",
    rl_steps=100,
    accelerator="cpu",
    precision="32-true  # compute in the family's dtype",
    fps=0.5,
    max_frames=64,
    completion_tokens=80,
    num_workers=0,
    templates=DEMO_TEMPLATES,
)


def main(args: Sequence[str]) -> None:
    """Command line of `write_start`."""
    parser = ShortErrors(prog="python -m longrl init", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("folder", metavar="DIR", help="folder to write; new, or empty")
    models = f"{', '.join(MODELS)}, or the hub id of one of them"
    parser.add_argument("--model", default=MODELS[0], help=f"which model is trained: {models}")
    parser.add_argument("--cpu", action="store_true", help="the demo's model of 1.3 million weights, for a laptop")
    parser.add_argument("--videos", help="folder of your videos, which the records' paths start in")
    parser.add_argument("--questions", help="your records: a .jsonl, .json, .csv or .tsv file")
    shares = "share of the videos whose questions are kept for `test`"
    parser.add_argument("--test_share", type=float, default=0.1, help=shares)
    options = parser.parse_args(list(args))
    sys.stdout.write(write_start(**options.as_dict()))


def write_start(
    folder: str,
    model: str = MODELS[0],
    cpu: bool = False,
    videos: str | None = None,
    questions: str | None = None,
    test_share: float = 0.1,
) -> str:
    """Writes the folder.

    Args:
        folder: new, or empty.
        model: one of `MODELS`, or its hub id.
        cpu: the demo's model in its place.
        videos: folder of the user's videos; None for that of the questions.
        questions: file of the user's records; None draws three example videos with a question each.
        test_share: share of the videos whose questions are not trained on.

    Returns:
        What was written, and the next command, as lines for people.

    Raises:
        ValueError: the folder holds something, there is no such model, or the records cannot be read.
    """
    from longrl.commands.init_records import example_records, own_records

    root = Path(folder).expanduser().resolve()
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise ValueError(f"{folder} holds something already, and nothing is replaced; name a new folder")
    if videos and not questions:
        raise ValueError(
            "--videos needs --questions, a file with a question and its answer about each video; to have questions "
            f"made by a model: python -m longrl pipeline all --videos {videos} --out data/mine"
        )
    family = _demo_family(root) if cpu else adapted_family(model)
    records = own_records(questions, videos, test_share) if questions else None
    check_writable(str(root.parent), "parent folder of DIR")
    with atomic_folder(root) as work:
        records = records or example_records(work, root)
        records.write(work)
        if cpu:
            shutil.copytree(shipped(DEMO_MODEL), work / "model")
        _write_files(work, root, family, records, LAPTOP if cpu else Scale())
    return "\n".join([*records.told, *_written(folder, records, cpu), ""])


# ---------------------------------------------------------------------------------------------------------- the parts


def adapted_family(model: str) -> dict[str, Any]:
    """`class_path` and `init_args` of a model, with adapters on frozen bfloat16 weights."""
    import yaml

    known = {name: yaml.safe_load(shipped(f"configs/family/{name}.yaml").read_text("utf-8")) for name in MODELS}
    by_hub_id = {family["init_args"]["model"]: family for family in known.values()}
    found = known.get(model) or by_hub_id.get(model)
    if found is None:
        raise ValueError(
            f"--model must be one of {', '.join(MODELS)}, or the hub id of one, got {model!r}; for weights in a "
            "folder name the model that they are of here, and the folder in family.yaml"
        )
    adapted = {"dtype": "bfloat16", "lora": {"rank": 32, "alpha": 32}}
    given = {name: value for name, value in found["init_args"].items() if value is not None}
    return {"class_path": found["class_path"], "init_args": given | adapted}


def _demo_family(root: Path) -> dict[str, Any]:
    """The demo's model, which is copied into the folder."""
    options = {"model": str(root / "model"), "min_pixels": 3136, "max_pixels": 3136}
    return {"class_path": "longrl.models.qwen_vl.Qwen2_5_VLFamily", "init_args": options}


def _write_files(work: Path, root: Path, family: dict[str, Any], records: StartRecords, scale: Scale) -> None:
    """Configs, stubs and README, whose paths are those of `root`."""
    engine = "longrl.engines.hf.HFEngine"
    if scale.accelerator == "gpu" and find_spec("vllm") is not None:
        engine = "longrl.engines.vllm.VLLMEngine"
    runs = root / "runs"
    own_function = _quoted(f"{root / 'my_rows.py'}:to_row")
    of_configs = {
        "sft_run": _quoted(str(runs / "sft")),
        "rl_run": _quoted(str(runs / "rl")),
        "init_from": _quoted(str(runs / "sft")) if records.has_reasoning else "null",
        "train": _quoted(str(root / records.train)),
        "test": _quoted(str(root / records.test)),
        "media_root": _quoted(records.media_root),
        "row_function": records.row_function or own_function,
        "reward": _quoted(f"{root / 'my_reward.py'}:my_reward"),
        "bad_records": "skip" if records.num_unread else "error",
        "engine": engine,
        "sft_prompts": min(SFT_PROMPTS, records.num_train),
        "rl_prompts": min(RL_PROMPTS, records.num_train),
    }
    question, video = records.example
    of_commands = {
        "root": shlex.quote(str(root)),
        "start": "sft.yaml" if records.has_reasoning else "rl.yaml",
        "question": shlex.quote(question),
        "video": shlex.quote(video),
        "test_file": records.test,
    }
    values = {**vars(scale), **of_configs, **of_commands}
    for name in ("sft.yaml", "rl.yaml", "README.md"):
        template = Template((TEMPLATES / name).read_text(encoding="utf-8"))
        atomic_write(work / name, template.substitute(values))
    for name in ("my_reward.py", "my_rows.py", "ask.py"):
        atomic_write(work / name, (TEMPLATES / name).read_text(encoding="utf-8"))
    atomic_write(work / "family.yaml", _family_text(family))


def _quoted(text: str) -> str:
    """A text as a YAML scalar, whatever letters it has."""
    return json.dumps(text, ensure_ascii=False)


def _family_text(family: dict[str, Any]) -> str:
    """family.yaml: a line for each option, with what it does."""
    lines = ["# Which model is trained: value of `model.family` in sft.yaml and rl.yaml."]
    lines += [f"class_path: {family['class_path']}", "init_args:"]
    for name, value in family["init_args"].items():
        comment = FAMILY_COMMENTS.get(name)
        lines.append(f"  {name}: {json.dumps(value, ensure_ascii=False)}" + (f"  # {comment}" if comment else ""))
    return "\n".join([*lines, ""])


def _written(folder: str, records: StartRecords, cpu: bool) -> list[str]:
    """What was written, and the next command."""
    files = {
        "sft.yaml": "stage 1, SFT; every value is explained there",
        "rl.yaml": "stage 2, GRPO",
        "family.yaml": "which model is trained",
        **({"model/": "the demo's model, 1.3 million weights"} if cpu else {}),
        **{name: f"{len(listed)} records" for name, listed in records.files.items()},
        **({} if records.told else {"videos/": "the examples' videos"}),
        "my_rows.py": "how a record becomes a question, for records in another form",
        "my_reward.py": "a reward of yours",
        "ask.py": "asks the exported model, by transformers alone",
        "README.md": "all commands, in order",
    }
    config = Path(folder) / ("sft.yaml" if records.has_reasoning else "rl.yaml")
    command = shlex.join(["python", "-m", "longrl", "fit", "--config", str(config), "--resume", "auto"])
    return [f"wrote {folder}:", *(f"  {name:<16}{text}" for name, text in files.items()), f"next: {command}"]
