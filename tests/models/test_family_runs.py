"""Every family from its YAML through the command line: SFT, GRPO on its checkpoint, an export that others load."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from longrl.commands.main import main
from longrl.engines.hf import HFEngine
from longrl.features.cache import FeatureCache
from longrl.models.vila import VilaFamily
from longrl.testing.plain_forward import plain_logits, qwen_media_inputs
from longrl.types import SamplingParams
from tests.families import FAMILIES, TEXT, every
from tests.runs import ROOT, checkpoint, metrics, videos
from tests.sounds import write_clip
from tests.tiny import frames, internvl_media_inputs, row

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization"),
    pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec"),
]
CONFIGS = ROOT / "configs"


@dataclass(frozen=True)
class Stages:
    """Files in configs/ that a family is trained from."""

    family: str
    sft: str
    grpo: str


MATH = "qwen2_5_text_math_grpo"
STAGES = {
    "qwen2.5": Stages("qwen2_5_text", MATH, MATH),
    "qwen3": Stages("qwen3_text", MATH, MATH),
    "llama3": Stages("llama3_text", MATH, MATH),
    "qwen2-vl": Stages("qwen2_vl_7b", "qwen2_5_vl_7b_longvideo_sft", "qwen2_5_vl_7b_longvideo_grpo"),
    "qwen2.5-vl": Stages("qwen2_5_vl_7b", "qwen2_5_vl_7b_longvideo_sft", "qwen2_5_vl_7b_longvideo_grpo"),
    "qwen3-vl": Stages("qwen3_vl_8b", "qwen2_5_vl_7b_longvideo_sft", "qwen3_vl_4b_longvideo_grpo"),
    "qwen3-vl-moe": Stages("qwen3_vl_30b_a3b", "qwen2_5_vl_7b_longvideo_sft", "qwen3_vl_4b_longvideo_grpo"),
    "qwen3.5": Stages("qwen3_5_9b", "qwen3_5_9b_longvideo_sft", "qwen3_5_9b_longvideo_grpo"),
    "qwen3.5-moe": Stages("qwen3_5_35b_a3b", "qwen3_5_9b_longvideo_sft", "qwen3_5_9b_longvideo_grpo"),
    "qwen3.5-text": Stages("qwen3_5_text", MATH, MATH),
    "qwen2.5-omni": Stages("qwen2_5_omni_7b", "qwen2_5_omni_7b_avqa_grpo", "qwen2_5_omni_7b_avqa_grpo"),
    "qwen3-omni": Stages("qwen3_omni_30b_a3b", "qwen2_5_omni_7b_avqa_grpo", "qwen2_5_omni_7b_avqa_grpo"),
    "internvl3.5": Stages("internvl3_5_8b", "qwen2_5_vl_7b_longvideo_sft", "internvl3_5_8b_longvideo_grpo"),
    "nvila": Stages("nvila_8b", "longvila_7b_longvideo_sft", "longvila_7b_longvideo_grpo"),
    "longvila-r1": Stages("longvila_r1_7b", "longvila_7b_longvideo_sft", "longvila_7b_longvideo_grpo"),
}


@pytest.fixture(scope="module")
def sums(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("sums") / "train.jsonl"
    lines = [{"problem": f"{n} + 1?", "reasoning": "One more.", "answer": str(n + 1)} for n in range(4)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """4 questions about two videos with a shorter and a longer sound track."""
    folder = tmp_path_factory.mktemp("clips")
    names = [write_clip(folder / f"{n}.mp4", 3.0, 2.0 + 2 * n).name for n in range(2)]
    asked = {"question": "Which tone?", "options": ["low", "high"], "answer": "low"}
    lines = [json.dumps({"id": n, "video": names[n % 2], **asked}) + "\n" for n in range(4)]
    (folder / "train.jsonl").write_text("".join(lines))
    return folder / "train.jsonl"


def first_bit(completion, row) -> float:
    """Differs within nearly every group."""
    return float(int(completion.token_ids.sum()) % 2)


def fit(folder: Path, recipe: str, name: str, data: Path, *more: str) -> Path:
    """Two steps of a recipe with the family's YAML, on one CPU, with a tiny model and tiny data."""
    made = FAMILIES[name].make()
    pixels = {key: getattr(made, key, None) for key in ("min_pixels", "max_pixels")}
    args = [
        "fit", f"--config={CONFIGS / recipe}.yaml", f"--model.family={CONFIGS / 'family' / STAGES[name].family}.yaml",
        f"--trainer={CONFIGS / 'trainer' / 'cpu.yaml'}", f"--run_dir={folder}", "--trainer.max_steps=2",
        "--trainer.strategy=auto", f"--rollout.engine={CONFIGS / 'rollout' / 'hf.yaml'}",
        f"--model.family.init_args.model={made.model_path}", "--model.family.init_args.random_init=true",
        "--model.family.init_args.dtype=float32", "--model.optimizer.lr=1e-3", "--model.optimizer.warmup_steps=0",
        *(f"--model.family.init_args.{key}={value}" for key, value in pixels.items() if value is not None),
        f"--data.train={data}", "--data.val=null", "--data.test=null", "--data.num_workers=0",
        "--data.prompts_per_batch=2", "--rollout.sampling.max_completion_tokens=4", *more,
    ]  # fmt: skip
    if name not in TEXT:
        args.append("--data.media_root=null")
    with mock.patch.object(sys, "argv", ["longrl", *args]):
        main(args)
    return folder


@every(["SFT", "RL", "export"])
def test_sft_then_grpo_then_an_exported_folder(name, tmp_path, sums, clips):
    stages = STAGES[name]
    data = sums if name in TEXT else clips if "omni" in name else videos() / "train.jsonl"
    sft = fit(tmp_path / "sft", stages.sft, name, data, "--data.stage=sft")
    grpo = fit(
        tmp_path / "grpo", stages.grpo, name, data, f"--model.init_from={sft}", "--model.algorithm.kl_coef=0.1",
        '--rollout.reward={"terms": [{"function": "tests.models.test_family_runs.first_bit"}]}',
    )  # fmt: skip
    losses = [float(metrics(sft)[step, "train/loss"]) for step in range(2)]
    assert losses[1] < losses[0]  # the same rows twice or rows alike, at a learning rate that is felt
    assert float(metrics(grpo)[0, "train/kl_ref"]) == pytest.approx(0, abs=1e-6)  # the reference is the SFT model
    before, after = (checkpoint(folder)["state_dict"] for folder in (sft, grpo))
    assert before.keys() == after.keys()
    assert all(float(metrics(grpo)[step, "train/grad_norm"]) > 0 for step in range(2))
    assert any(not torch.equal(before[key], after[key]) for key in after)

    out = tmp_path / "exported"
    main(["export", f"--run={grpo}", f"--out={out}"])
    loaded, processing = load(name, out)
    assert all(torch.equal(value, after[f"model.{key}"]) for key, value in loaded.state_dict().items())
    assert len(loaded.state_dict()) == len(after)
    assert processing(text="Which?")["input_ids"]
    if "vila" not in stages.family:
        assert_same_greedy_tokens(name, out, loaded)


def assert_same_greedy_tokens(name: str, folder: Path, plain: torch.nn.Module) -> None:
    """HFEngine's from the exported folder are the plain model's likeliest, token by token."""
    family = type(FAMILIES[name].make())(str(folder))
    media_inputs = internvl_media_inputs if "internvl" in name else qwen_media_inputs
    (prompt, *_), model = FAMILIES[name].prompts(family), family.build()
    features = FeatureCache(family).get_or_encode(model, [prompt])
    ((found,),) = HFEngine().generate(family, model, [prompt], features, SamplingParams(1, 6, 0.0), seed=0)
    with torch.no_grad():
        logits = plain_logits(plain.eval(), prompt, found.token_ids, media_inputs)
    assert torch.equal(logits.argmax(-1), found.token_ids)


def load(name: str, folder: Path):
    """The exported model by a class that is not longrl's, where there is one, and what turns text into ids."""
    if name in TEXT:
        return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    if "vila" in name:
        assert AutoModelForCausalLM.from_pretrained(folder / "llm").config.model_type == "qwen2"
        family = VilaFamily(str(folder))
        assert family.render(row(), "What?", [frames(3)]).media
        return family.build(), AutoTokenizer.from_pretrained(folder / "llm")
    if name == "qwen2.5-omni":
        from transformers import Qwen2_5OmniThinkerForConditionalGeneration as Thinker

        return Thinker.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    return AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
