"""Tiny models of the true architectures, built from code: for tests, the demo, and anyone without a model hub.

A folder made here is an ordinary Hugging Face folder (config, tokenizer with chat template, processor), without
weights: families build it with `random_init: true`. Sizes are in tiny_models.yaml.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any

import transformers
import yaml

Overrides = dict[str, Any] | None
SIZES: dict[str, Any] = yaml.safe_load(files(__package__).joinpath("tiny_models.yaml").read_text())
CHAT_TEMPLATE = files(__package__).joinpath("tiny_chatml.jinja").read_text()
"""ChatML with the media marks of Qwen-VL and Qwen3-Omni."""
QWEN3_5_TEMPLATE = files(__package__).joinpath("tiny_qwen3_5.jinja").read_text()
"""Opens `<think>` in the prompt, or closes it there if `enable_thinking` is false."""
OMNI_TEMPLATE = files(__package__).joinpath("tiny_omni.jinja").read_text()
"""The released template, without numbered media."""
INTERNVL_TEMPLATE = files(__package__).joinpath("tiny_internvl.jinja").read_text()
"""Writes what the released template does."""


def tiny_tokenizer(corpus: Iterable[str] = tuple(SIZES["text_corpus"]), vocab_size: int = 640) -> Any:
    """A byte-level BPE tokenizer trained on `corpus`, with ChatML and media tokens and one token per answer tag."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SIZES["answer_tags"]),
        special_tokens=SIZES["special_tokens"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(corpus, trainer)
    bpe.add_tokens([AddedToken(tag, normalized=False) for tag in SIZES["answer_tags"]])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=SIZES["special_tokens"][1:],
        chat_template=CHAT_TEMPLATE,
    )


def tiny_qwen2_5_vl(
    folder: str | Path, tokenizer: Any = None, text: Overrides = None, vision: Overrides = None
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
    tokenizer = tokenizer or tiny_tokenizer()
    text_config = _mrope_text_config(tokenizer, text)
    vision_config = SIZES["windowed_vision"] | {"tokens_per_second": 2} | (vision or {})
    parts = _model_config(tokenizer, "qwen_token_ids", text_config, vision_config)
    config = transformers.Qwen2_5_VLConfig(**parts, architectures=["Qwen2_5_VLForConditionalGeneration"])
    return _save_model(folder, config, transformers.Qwen2_5_VLProcessor, tokenizer)


def tiny_qwen2_vl(folder: str | Path, tokenizer: Any = None, text: Overrides = None, vision: Overrides = None) -> Path:
    """Writes config, tokenizer and processor of a small Qwen2-VL, with the arguments of `tiny_qwen2_5_vl`."""
    tokenizer = tokenizer or tiny_tokenizer()
    text_config = _mrope_text_config(tokenizer, text)
    vision_config = SIZES["qwen2_vision"] | {"hidden_size": text_config["hidden_size"]} | (vision or {})
    parts = _model_config(tokenizer, "qwen_token_ids", text_config, vision_config)
    del parts["vision_config"]["out_hidden_size"]  # its name is hidden_size
    config = transformers.Qwen2VLConfig(**parts, architectures=["Qwen2VLForConditionalGeneration"])
    return _save_model(folder, config, transformers.Qwen2VLProcessor, tokenizer)


def tiny_qwen_omni(
    folder: str | Path, tokenizer: Any = None, text: Overrides = None, vision: Overrides = None, audio: Overrides = None
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
    tokenizer = _with_named_tokens(tokenizer or tiny_tokenizer(), SIZES["omni_tokens"], OMNI_TEMPLATE)
    text_config = _mrope_text_config(tokenizer, text)
    audio_config = SIZES["omni_audio"] | {"output_dim": text_config["hidden_size"]} | (audio or {})
    vision_config = SIZES["windowed_vision"] | {"tokens_per_second": 25} | (vision or {})
    thinker = _model_config(tokenizer, "omni_token_ids", text_config, vision_config) | {
        "audio_config": audio_config,
        "pad_token_id": tokenizer.pad_token_id,
        "architectures": ["Qwen2_5OmniThinkerForConditionalGeneration"],
    }
    config = transformers.Qwen2_5OmniConfig(thinker_config=thinker, architectures=["Qwen2_5OmniModel"])
    extractor = transformers.WhisperFeatureExtractor(feature_size=audio_config["num_mel_bins"], chunk_length=30)
    processor = transformers.Qwen2_5OmniProcessor
    return _save_model(folder, config, processor, tokenizer, feature_extractor=extractor, chat_template=OMNI_TEMPLATE)


def tiny_qwen3_omni(
    folder: str | Path, tokenizer: Any = None, text: Overrides = None, vision: Overrides = None, audio: Overrides = None
) -> Path:
    """Writes config, tokenizer and processor of a small Qwen3-Omni in the released layout: a thinker among others.

    Args:
        folder: where to write; made if missing.
        tokenizer: from `tiny_tokenizer`, or None for its default; it gets Qwen3-Omni's tokens for sound.
        text: overrides of the thinker's text config.
        vision: overrides of its vision config.
        audio: overrides of its audio config; chunks stay as long as in the released model, 1 s, windows are 2 of them.

    Returns:
        The folder.
    """
    tokenizer = _with_named_tokens(tokenizer or tiny_tokenizer(), SIZES["qwen3_omni_tokens"], CHAT_TEMPLATE)
    text_config = SIZES["qwen3_experts"] | _qwen3_text_config(tokenizer, text)
    audio_config = SIZES["qwen3_omni_audio"] | {"output_dim": text_config["hidden_size"]} | (audio or {})
    vision_config = SIZES["qwen3_omni_vision"] | (vision or {})
    thinker = _model_config(tokenizer, "qwen3_omni_token_ids", text_config, vision_config) | {
        "audio_config": audio_config,
        "position_id_per_seconds": 13,
        "architectures": ["Qwen3OmniMoeThinkerForConditionalGeneration"],
    }
    config = transformers.Qwen3OmniMoeConfig(
        thinker_config=thinker, architectures=["Qwen3OmniMoeForConditionalGeneration"]
    )
    extractor = transformers.WhisperFeatureExtractor(feature_size=audio_config["num_mel_bins"], chunk_length=30)
    image = transformers.Qwen2VLImageProcessor(patch_size=16, **SIZES["pixels"])
    video = transformers.Qwen2VLVideoProcessor(patch_size=16, cap_pixels_per_frame=False, **SIZES["pixels"])
    return _save_model(
        folder, config, transformers.Qwen3OmniMoeProcessor, tokenizer, image_processor=image, video_processor=video,
        feature_extractor=extractor,
    )  # fmt: skip


def tiny_qwen3_vl(
    folder: str | Path, tokenizer: Any = None, text: Overrides = None, vision: Overrides = None, experts: bool = False
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
    tokenizer = tokenizer or tiny_tokenizer()
    text_config = _qwen3_text_config(tokenizer, text)
    if experts:
        text_config = SIZES["qwen3_experts"] | text_config
    parts = _model_config(tokenizer, "qwen_token_ids", text_config, SIZES["qwen3_vision"] | (vision or {}))
    config = (transformers.Qwen3VLMoeConfig if experts else transformers.Qwen3VLConfig)(
        **parts, architectures=[f"Qwen3VL{'Moe' if experts else ''}ForConditionalGeneration"]
    )
    image = transformers.Qwen2VLImageProcessor(patch_size=16, **SIZES["pixels"])
    video = transformers.Qwen3VLVideoProcessor(cap_pixels_per_frame=False, **SIZES["pixels"])
    processor = transformers.Qwen3VLProcessor
    return _save_model(folder, config, processor, tokenizer, image_processor=image, video_processor=video)


def tiny_qwen3_5(
    folder: str | Path, tokenizer: Any = None, text: Overrides = None, vision: Overrides = None, experts: bool = False
) -> Path:
    """Writes config, tokenizer and processor of a small Qwen3.5: three gated delta nets and a layer of attention.

    Args:
        folder: where to write; made if missing.
        tokenizer: from `tiny_tokenizer`, or None for its default.
        text: overrides of the text config.
        vision: overrides of the vision config.
        experts: a mixture of experts in every layer instead of one MLP.

    Returns:
        The folder.
    """
    tokenizer = tokenizer or tiny_tokenizer()
    tokenizer.chat_template = QWEN3_5_TEMPLATE
    text_config = _qwen3_5_text_config(tokenizer, experts) | (text or {})
    parts = _model_config(tokenizer, "qwen_token_ids", text_config, SIZES["qwen3_5_vision"] | (vision or {}))
    config = (transformers.Qwen3_5MoeConfig if experts else transformers.Qwen3_5Config)(
        **parts, architectures=[f"Qwen3_5{'Moe' if experts else ''}ForConditionalGeneration"]
    )
    image = transformers.Qwen2VLImageProcessor(patch_size=16, **SIZES["pixels"])
    video = transformers.Qwen3VLVideoProcessor(cap_pixels_per_frame=False, **SIZES["pixels"])
    processors = {"image_processor": image, "video_processor": video}
    return _save_model(folder, config, transformers.Qwen3VLProcessor, tokenizer, QWEN3_5_TEMPLATE, **processors)


def tiny_qwen3_5_text(folder: str | Path, tokenizer: Any = None, experts: bool = False, **overrides: Any) -> Path:
    """Writes config and tokenizer of a small Qwen3.5 language model."""
    tokenizer = tokenizer or tiny_tokenizer()
    tokenizer.chat_template = QWEN3_5_TEMPLATE
    values = _qwen3_5_text_config(tokenizer, experts) | overrides
    values.setdefault("architectures", [f"Qwen3_5{'Moe' if experts else ''}ForCausalLM"])
    model_type = f"qwen3_5_{'moe_' if experts else ''}text"
    transformers.AutoConfig.for_model(model_type, **values).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)


def tiny_internvl(
    folder: str | Path,
    tokenizer: Any = None,
    text: Overrides = None,
    vision: Overrides = None,
    model_type: str = "qwen3",
) -> Path:
    """Writes config, tokenizer and processor of a small InternVL3.5: 4 tokens for a tile of 56 x 56.

    Args:
        folder: where to write; made if missing.
        tokenizer: from `tiny_tokenizer`, or None for its default; it gets InternVL's tokens.
        text: overrides of the text config.
        vision: overrides of the vision config.
        model_type: of the text stack: `qwen3`, or `qwen2` as in InternVL3.

    Returns:
        The folder.
    """
    tokenizer = tokenizer or tiny_tokenizer()
    tokens = SIZES["internvl_tokens"]
    tokenizer.add_tokens(list(tokens.values()), special_tokens=True)
    tokenizer = transformers.PreTrainedTokenizerFast(  # under the names that the processor reads
        tokenizer_object=tokenizer.backend_tokenizer,
        eos_token=tokenizer.eos_token,
        pad_token=tokenizer.pad_token,
        extra_special_tokens=dict(tokens),
        chat_template=INTERNVL_TEMPLATE,
    )
    text_config = _text_config(tokenizer, "qwen3_text") | {"model_type": model_type} | (text or {})
    text_config.setdefault("head_dim", text_config["hidden_size"] // text_config["num_attention_heads"])
    vision_config = SIZES["internvl_vision"] | (vision or {})
    (side, _), (patch, _) = vision_config["image_size"], vision_config["patch_size"]
    tokens_per_tile = (side // patch // 2) ** 2
    config = transformers.InternVLConfig(
        text_config=text_config,
        vision_config=vision_config,
        image_token_id=tokenizer.convert_tokens_to_ids(tokens["context_image_token"]),
        image_seq_length=tokens_per_tile,
        tie_word_embeddings=text_config["tie_word_embeddings"],
        architectures=["InternVLForConditionalGeneration"],
    )
    size = {"height": side, "width": side}
    image = transformers.GotOcr2ImageProcessor(size=size, **SIZES["imagenet_pixels"])
    video = transformers.InternVLVideoProcessor(size=size, **SIZES["imagenet_pixels"])
    processor = functools.partial(transformers.InternVLProcessor, image_seq_length=tokens_per_tile)
    parts = {"image_processor": image, "video_processor": video}
    return _save_model(folder, config, processor, tokenizer, chat_template=INTERNVL_TEMPLATE, **parts)


def tiny_vila(
    folder: str | Path,
    tokenizer: Any = None,
    text: Overrides = None,
    vision: Overrides = None,
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
    from longrl.models.vila import EXTRA_TOKENS

    folder, tokenizer = Path(folder), tokenizer or tiny_tokenizer()
    tokenizer.add_tokens(list(EXTRA_TOKENS), special_tokens=True)
    vision_encoder = SIZES["vila_vision"] | (vision or {})
    llm = _text_config(tokenizer) | {"architectures": ["Qwen2ForCausalLM"]} | (text or {})
    transformers.Qwen2Config(**llm).save_pretrained(folder / "llm")
    tokenizer.save_pretrained(folder / "llm")
    transformers.SiglipVisionConfig(**vision_encoder).save_pretrained(folder / "vision_tower")
    size = dict.fromkeys(("height", "width"), vision_encoder["image_size"])
    configs = {
        "vision_tower/preprocessor_config.json": SIZES["pixels"] | {"size": size},
        "mm_projector/config.json": {"model_type": "v2l_projector", "mm_projector_type": projector},
        "config.json": SIZES["vila"] | values,
    }
    for name, content in configs.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content, indent=2))
    return folder


def tiny_text(folder: str | Path, model_type: str = "qwen2", tokenizer: Any = None, **overrides: Any) -> Path:
    """Writes config and tokenizer of a small text model: `qwen2` (Qwen2.5) or `qwen3`."""
    tokenizer = tokenizer or tiny_tokenizer()
    values = _text_config(tokenizer) | overrides
    values.setdefault("head_dim", values["hidden_size"] // values["num_attention_heads"])
    values.setdefault("architectures", [f"{model_type.capitalize()}ForCausalLM"])
    transformers.AutoConfig.for_model(model_type, **values).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)


def _model_config(tokenizer: Any, token_ids: str, text: dict[str, Any], vision: dict[str, Any]) -> dict[str, Any]:
    """The fields of a config that all models of text and media have; `token_ids` are those of their media."""
    vision = {"out_hidden_size": text["hidden_size"]} | vision
    fields = {"text_config": text, "vision_config": vision, "tie_word_embeddings": text["tie_word_embeddings"]}
    return fields | {name: tokenizer.convert_tokens_to_ids(token) for name, token in SIZES[token_ids].items()}


def _save_model(
    folder: str | Path, config: Any, processor: Any, tokenizer: Any, chat_template: str = CHAT_TEMPLATE, **parts: Any
) -> Path:
    """Writes config, processor and tokenizer; `parts` are those of the processor that differ from Qwen2.5-VL's."""
    parts.setdefault("image_processor", transformers.Qwen2VLImageProcessor())
    parts.setdefault("video_processor", transformers.Qwen2VLVideoProcessor(cap_pixels_per_frame=False))
    for part in (config, processor(tokenizer=tokenizer, chat_template=chat_template, **parts), tokenizer):
        part.save_pretrained(folder)
    return Path(folder)


def _text_config(tokenizer: Any, kind: str = "text") -> dict[str, Any]:
    tokens = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return SIZES[kind] | {"vocab_size": len(tokenizer)} | tokens


def _qwen3_5_text_config(tokenizer: Any, experts: bool) -> dict[str, Any]:
    """Rotary frequencies in a quarter of a head, for time, height and width in Qwen's proportion 11 : 11 : 10."""
    config = _text_config(tokenizer, "qwen3_5_text")
    rope = _rope([2, 1, 1]) | {"mrope_interleaved": True, "partial_rotary_factor": 0.25}
    return config | {"rope_parameters": rope} | (SIZES["qwen3_5_experts"] if experts else {})


def _mrope_text_config(tokenizer: Any, overrides: Overrides) -> dict[str, Any]:
    """Rotary frequencies for time, height and width in Qwen's proportion 16 : 24 : 24 of half the head size."""
    config = _text_config(tokenizer) | (overrides or {})
    half = config["hidden_size"] // config["num_attention_heads"] // 2
    space = half * 3 // 8
    return {"rope_parameters": _rope([half - 2 * space, space, space])} | config


def _qwen3_text_config(tokenizer: Any, overrides: Overrides) -> dict[str, Any]:
    """Rotary frequencies for time, height and width in Qwen3's proportion 24 : 20 : 20 of half the head size."""
    config = _text_config(tokenizer, "qwen3_text") | (overrides or {})
    head_dim = config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    space = head_dim // 2 * 5 // 16
    rope = _rope([head_dim // 2 - 2 * space, space, space]) | {"mrope_interleaved": True}
    return {"rope_parameters": rope} | config


def _with_named_tokens(tokenizer: Any, tokens: dict[str, str], chat_template: str) -> Any:
    """A tokenizer that has media tokens under the names that a processor reads."""
    tokenizer.add_tokens(list(tokens.values()), special_tokens=True)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        eos_token=tokenizer.eos_token,
        pad_token=tokenizer.pad_token,
        extra_special_tokens=dict(tokens),
        chat_template=chat_template,
    )


def _rope(section: list[int]) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": section}
