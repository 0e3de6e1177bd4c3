"""Tiny models of the true architectures, built from code: for tests, the demo, and anyone without a model hub.

A folder made here is an ordinary Hugging Face folder (config, tokenizer with chat template, processor), without
weights: families build it with `random_init: true`.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any

CHAT_TEMPLATE = """{%- for message in messages -%}
<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}{% else %}{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>
{%- elif part['type'] == 'video' -%}<|vision_start|><|video_pad|><|vision_end|>
{%- else -%}{{ part['text'] }}{%- endif -%}{%- endfor -%}{% endif %}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}"""
"""ChatML with Qwen-VL's media marks."""

SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>",
    "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
ANSWER_TAGS = ("<think>", "</think>", "<answer>", "</answer>")

TEXT_CORPUS = (
    "What comes right after the red circle? A. blue square B. green triangle C. yellow cross D. white circle",
    "The answer is 12, because 5 + 7 = 12. Describe the video. Which option is right? top left bottom right",
)


def tiny_tokenizer(corpus: Iterable[str] = TEXT_CORPUS, vocab_size: int = 640) -> Any:
    """A byte-level BPE tokenizer trained on `corpus`, with ChatML and media tokens and one token per answer tag."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(ANSWER_TAGS),
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(corpus, trainer)
    bpe.add_tokens([AddedToken(tag, normalized=False) for tag in ANSWER_TAGS])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=list(SPECIAL_TOKENS[1:]),
        chat_template=CHAT_TEMPLATE,
    )


def tiny_qwen2_5_vl(
    folder: str | Path,
    tokenizer: Any | None = None,
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
) -> Path:
    """Writes config, tokenizer and processor of a small Qwen2.5-VL.

    Args:
        folder: where to write; made if missing.
        tokenizer: from `tiny_tokenizer`, or None for its default.
        text: overrides of the text config, e.g. `{"hidden_size": 128}`; the head size must stay even.
        vision: overrides of the vision config.

    Returns:
        The folder.
    """
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    tokenizer = tokenizer or tiny_tokenizer()
    text_config = _mrope_text_config(tokenizer, text)
    config = Qwen2_5_VLConfig(
        text_config=text_config,
        vision_config=_windowed_vision(text_config, tokens_per_second=2) | (vision or {}),
        tie_word_embeddings=text_config["tie_word_embeddings"],
        **_media_tokens(tokenizer),
        architectures=["Qwen2_5_VLForConditionalGeneration"],
    )
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(),
        video_processor=Qwen2VLVideoProcessor(cap_pixels_per_frame=False),
        tokenizer=tokenizer,
        chat_template=CHAT_TEMPLATE,
    )
    return _save(folder, config, processor, tokenizer)


OMNI_TOKENS = {
    "image_token": "<|IMAGE|>", "video_token": "<|VIDEO|>", "audio_token": "<|AUDIO|>",
    "vision_bos_token": "<|vision_bos|>", "vision_eos_token": "<|vision_eos|>",
    "audio_bos_token": "<|audio_bos|>", "audio_eos_token": "<|audio_eos|>",
}  # fmt: skip
"""Qwen2.5-Omni's media marks, by the names its processor asks for."""
OMNI_TEMPLATE = files(__package__).joinpath("tiny_omni.jinja").read_text()
"""The released template, without numbered media."""


def tiny_qwen_omni(
    folder: str | Path,
    tokenizer: Any | None = None,
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
    audio: dict[str, Any] | None = None,
) -> Path:
    """Writes config, tokenizer and processor of a small Qwen2.5-Omni in the released layout: a thinker among others.

    Args:
        folder: where to write; made if missing.
        tokenizer: from `tiny_tokenizer`, or None for its default; it gets Omni's tokens.
        text: overrides of the thinker's text config.
        vision: overrides of its vision config.
        audio: overrides of its audio config; windows stay as long as in the released model, 2 s.

    Returns:
        The folder.
    """
    from transformers import (
        Qwen2_5OmniConfig,
        Qwen2_5OmniProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
        WhisperFeatureExtractor,
    )

    tokenizer = _omni_tokenizer(tokenizer or tiny_tokenizer())
    text_config = _mrope_text_config(tokenizer, text)
    audio_config = {
        "d_model": 32, "encoder_attention_heads": 2, "encoder_layers": 2, "encoder_ffn_dim": 64, "num_mel_bins": 32,
        "output_dim": text_config["hidden_size"],
    } | (audio or {})  # fmt: skip
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in OMNI_TOKENS.items()}
    thinker = {
        "text_config": text_config, "audio_config": audio_config,
        "vision_config": _windowed_vision(text_config, tokens_per_second=25) | (vision or {}),
        "image_token_index": ids["image_token"], "video_token_index": ids["video_token"],
        "audio_token_index": ids["audio_token"], "audio_start_token_id": ids["audio_bos_token"],
        "audio_end_token_id": ids["audio_eos_token"], "vision_start_token_id": ids["vision_bos_token"],
        "vision_end_token_id": ids["vision_eos_token"], "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": text_config["tie_word_embeddings"],
        "architectures": ["Qwen2_5OmniThinkerForConditionalGeneration"],
    }  # fmt: skip
    config = Qwen2_5OmniConfig(thinker_config=thinker, architectures=["Qwen2_5OmniModel"])
    processor = Qwen2_5OmniProcessor(
        image_processor=Qwen2VLImageProcessor(),
        video_processor=Qwen2VLVideoProcessor(cap_pixels_per_frame=False),
        feature_extractor=WhisperFeatureExtractor(feature_size=audio_config["num_mel_bins"], chunk_length=30),
        tokenizer=tokenizer,
        chat_template=OMNI_TEMPLATE,
    )
    return _save(folder, config, processor)


def _omni_tokenizer(tokenizer: Any) -> Any:
    """The same with Omni's marks, under the names that its processor reads."""
    from transformers import PreTrainedTokenizerFast

    tokenizer.add_tokens(list(OMNI_TOKENS.values()), special_tokens=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        eos_token=tokenizer.eos_token,
        pad_token=tokenizer.pad_token,
        extra_special_tokens=OMNI_TOKENS,
        chat_template=OMNI_TEMPLATE,
    )


def tiny_qwen3_vl(
    folder: str | Path,
    tokenizer: Any | None = None,
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
    experts: bool = False,
) -> Path:
    """Writes config, tokenizer and processor of a small Qwen3-VL.

    Args:
        folder: where to write; made if missing.
        tokenizer: from `tiny_tokenizer`, or None for its default.
        text: overrides of the text config; without `head_dim` heads share `hidden_size`.
        vision: overrides of the vision config.
        experts: a mixture of experts in every layer instead of one MLP.

    Returns:
        The folder.
    """
    from transformers import (
        Qwen2VLImageProcessor,
        Qwen3VLConfig,
        Qwen3VLMoeConfig,
        Qwen3VLProcessor,
        Qwen3VLVideoProcessor,
    )

    tokenizer = tokenizer or tiny_tokenizer()
    text_config = _text_config(tokenizer) | {"num_hidden_layers": 3} | (text or {})
    text_config.setdefault("head_dim", text_config["hidden_size"] // text_config["num_attention_heads"])
    space = text_config["head_dim"] // 2 * 5 // 16  # Qwen's 24 : 20 : 20 of half the head size
    section = [text_config["head_dim"] // 2 - 2 * space, space, space]
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": section, "mrope_interleaved": True}
    text_config.setdefault("rope_parameters", rope)
    if experts:
        few = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
        text_config = few | text_config
    vision_config = {
        "hidden_size": 32, "num_heads": 2, "depth": 3, "intermediate_size": 64, "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0, 1], "out_hidden_size": text_config["hidden_size"],
    } | (vision or {})  # fmt: skip
    config = (Qwen3VLMoeConfig if experts else Qwen3VLConfig)(
        text_config=text_config,
        vision_config=vision_config,
        tie_word_embeddings=text_config["tie_word_embeddings"],
        **_media_tokens(tokenizer),
        architectures=[f"Qwen3VL{'Moe' if experts else ''}ForConditionalGeneration"],
    )
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}  # of the released models, not of the classes
    processor = Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(patch_size=16, **half),
        video_processor=Qwen3VLVideoProcessor(cap_pixels_per_frame=False, **half),
        tokenizer=tokenizer,
        chat_template=CHAT_TEMPLATE,
    )
    return _save(folder, config, processor, tokenizer)


def tiny_vila(
    folder: str | Path,
    tokenizer: Any | None = None,
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
    projector: str = "mlp_downsample_2x2_fix",
    **values: Any,
) -> Path:
    """Writes config, tokenizer and pixel settings of a small VILA in the released layout: 4 tokens for a frame.

    Args:
        folder: where to write; made if missing.
        tokenizer: from `tiny_tokenizer`, or None for its default; it gets VILA's tokens.
        text: overrides of the language model's config.
        vision: overrides of the encoder's config.
        projector: `mm_projector_type`.
        values: further fields of the top config, e.g. `image_aspect_ratio="dynamic"`.

    Returns:
        The folder.
    """
    import json

    from transformers import Qwen2Config, SiglipVisionConfig

    from longrl.models.vila import EXTRA_TOKENS

    folder, tokenizer = Path(folder), tokenizer or tiny_tokenizer()
    tokenizer.add_tokens(list(EXTRA_TOKENS), special_tokens=True)
    vision_encoder: dict[str, Any] = {
        "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 3, "intermediate_size": 64,
        "image_size": 56, "patch_size": 14, "vision_use_head": False, "architectures": ["SiglipVisionModel"],
    } | (vision or {})  # fmt: skip
    llm = _text_config(tokenizer) | {"architectures": ["Qwen2ForCausalLM"]} | (text or {})
    Qwen2Config(**llm).save_pretrained(folder / "llm")
    tokenizer.save_pretrained(folder / "llm")
    SiglipVisionConfig(**vision_encoder).save_pretrained(folder / "vision_tower")
    size = {"height": vision_encoder["image_size"], "width": vision_encoder["image_size"]}
    top = {
        "model_type": "vila", "architectures": ["VILAForCausalLM"], "mm_vision_select_feature": "cls_patch",
        "mm_vision_select_layer": -2, "image_aspect_ratio": "resize",
    } | values  # fmt: skip
    files = {
        "vision_tower/preprocessor_config.json": {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": size},
        "mm_projector/config.json": {"model_type": "v2l_projector", "mm_projector_type": projector},
        "config.json": top,
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content, indent=2))
    return folder


def _media_tokens(tokenizer: Any) -> dict[str, Any]:
    """The ids of a vision-language config's own tokens."""
    names = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
    return {f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>") for name, token in names.items()}


def tiny_text(folder: str | Path, model_type: str = "qwen2", tokenizer: Any | None = None, **overrides: Any) -> Path:
    """Writes config and tokenizer of a small text model: `qwen2` (Qwen2.5) or `qwen3`."""
    from transformers import AutoConfig

    tokenizer = tokenizer or tiny_tokenizer()
    values = _text_config(tokenizer) | overrides
    values.setdefault("head_dim", values["hidden_size"] // values["num_attention_heads"])
    values.setdefault("architectures", [f"{model_type.capitalize()}ForCausalLM"])
    return _save(folder, AutoConfig.for_model(model_type, **values), tokenizer)


def _save(folder: str | Path, *parts: Any) -> Path:
    for part in parts:
        part.save_pretrained(folder)
    return Path(folder)


def _text_config(tokenizer: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer), "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 32_768,
        "tie_word_embeddings": True, "use_sliding_window": False,
        "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip


def _mrope_text_config(tokenizer: Any, overrides: dict[str, Any] | None) -> dict[str, Any]:
    """Rotary frequencies for time, height and width in Qwen's proportion 16 : 24 : 24 of half the head size."""
    config = _text_config(tokenizer) | (overrides or {})
    half = config["hidden_size"] // config["num_attention_heads"] // 2
    space = half * 3 // 8
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [half - 2 * space, space, space]}
    return {"rope_parameters": rope} | config


def _windowed_vision(text_config: dict[str, Any], tokens_per_second: int) -> dict[str, Any]:
    return {
        "hidden_size": 32, "num_heads": 2, "depth": 2, "intermediate_size": 64, "fullatt_block_indexes": [1],
        "window_size": 56, "out_hidden_size": text_config["hidden_size"], "tokens_per_second": tokens_per_second,
    }  # fmt: skip
