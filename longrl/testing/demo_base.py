"""The demo's base model before training: a Qwen2.5-VL of 1.3 million parameters and a tokenizer for its small world.

    python -m longrl.testing.demo_base configs/demo/base
    python -m longrl.testing.demo_base configs/demo/qwen3_5/base qwen3_5

writes config, tokenizer and processor; `configs/demo/pretrain.yaml` trains the weights that ship beside them. The
second is a Qwen3.5, whose weights `configs/demo/qwen3_5/pretrain.yaml` trains; none ship.
"""

from __future__ import annotations

import sys
from pathlib import Path

from longrl.testing.synthetic_videos import Record, SyntheticConfig, make_records
from longrl.testing.tiny import tiny_qwen2_5_vl, tiny_qwen3_5, tiny_tokenizer

TEXT = {
    "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.08,
}  # fmt: skip
"""At this width 0.02, the default, starts attention so flat that training stalls for hundreds of steps."""
VISION = {"hidden_size": 96, "num_heads": 3, "depth": 2, "intermediate_size": 192, "fullatt_block_indexes": [1]}
QWEN3_5_TEXT = TEXT | {
    "head_dim": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 32,
    "linear_value_head_dim": 32, "full_attention_interval": 2,
}  # fmt: skip
QWEN3_5_VISION = {"hidden_size": 96, "num_heads": 3, "depth": 2, "intermediate_size": 192}


def write_demo_base(folder: str | Path) -> Path:
    """Writes config, tokenizer and processor; an existing `model.safetensors` in the folder is left alone."""
    return tiny_qwen2_5_vl(folder, tiny_tokenizer(_corpus(), vocab_size=432), text=TEXT, vision=VISION)


def write_qwen3_5_demo_base(folder: str | Path) -> Path:
    """As `write_demo_base`; its tokenizer has also seen the times that stand before the frames of a video."""
    times = [f"<{second}.0 seconds>" for second in range(60)] * 4
    tokenizer = tiny_tokenizer([*_corpus(), *times], vocab_size=448)
    return tiny_qwen3_5(folder, tokenizer, text=QWEN3_5_TEXT, vision=QWEN3_5_VISION)


def _corpus() -> list[str]:
    records, _ = make_records(SyntheticConfig(num_train_videos=200, num_eval_videos=0, num_pretrain_videos=200, seed=1))
    return [_text(row) for rows in records.values() for row in rows]


def _text(row: Record) -> str:
    """A record as the tokenizer's training sees it: question, reasoning with the letter behind it, answer."""
    if row["reasoning"] is None:
        return f"{row['problem']}\n {row['answer']}"
    letter = row["answer"].removeprefix("<answer>").removesuffix("</answer>")
    return f"{row['problem']}\n{row['reasoning'].removesuffix('.')} {letter}. {row['answer']}"


if __name__ == "__main__":
    write = write_qwen3_5_demo_base if sys.argv[2:] == ["qwen3_5"] else write_demo_base
    write(sys.argv[1])
