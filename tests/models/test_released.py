"""Folders as the models were released: their names, shapes and config fields at a reduced width, random values.

What a released file holds is written out below from what is public of it, not from the classes that read it:

- Qwen2.5-VL: names and shapes of all 729 tensors of the 7B, as sangoi-exe/stable-diffusion-webui-codex checks them in
  its reader of that model; `visual.`, `model.` and `lm_head.` are "original checkpoint" names to vLLM 0.32
  (model_executor/models/qwen2_5_vl.py, hf_to_vllm_mapper), `model.language_model.` those since transformers 4.52.
- Qwen2-VL: those names of its text stack, and of its encoder those that vLLM 0.32 reads (qwen2_vl.py).
- Qwen3-VL: weight_map of a model with its architecture at 8B (model.safetensors.index.json in sarcascoder/
  nvidia-reason2), and names of DeepStack's mergers in several readers of the released 4B and 8B.
- Qwen3-VL-30B-A3B: all experts of a layer in two tensors, transposed: transformers 5.19 (conversion_mapping.py,
  qwen3_vl_moe) turns them around, vLLM 0.32 reads them so (qwen3_vl_moe.py, is_fused_checkpoint_transposed).
- Qwen3.5-35B-A3B: names and shapes of all 1,811 tensors as a reader of the released file lists them, and as FlashRT
  checks those of the text stack; experts of a layer are two tensors, not transposed, but one by one in the head for
  further tokens. 9B and 27B have an MLP there instead; all have the published number of parameters to the unit.
- Qwen3.5 text alone: the same names behind `model.`, as Qwen3.8-2.4T-A95B (qwen3_5_moe_text) was released; no dense one
  was. vLLM 0.32 (qwen3_5.py) and transformers 5.19 take the prefix `model.language_model.` as well.
- Qwen2.5-Omni: names and shapes of the thinker as infinigence/ApxInf checks them before it reads the released file,
  talker and token2wav beside it.
- InternVL3.5: names of InternVL3_5-2B-HF as a reader of that file lists them (imp, tests of its weight map), and what
  OpenGVLab/InternVL's own internvl_custom2hf.py writes of the vision encoder and the projector.
- Qwen3-Omni-30B-A3B: names in the released model.safetensors.index.json, without their numbers, as the tests of a
  public reader list them; every expert in tensors of its own, which transformers 5.19 joins (conversion_mapping.py,
  qwen2_moe). Fields of its config as a public report of the loaded model prints them.
- Qwen2.5, Qwen3 and Llama 3 text: transformers 4's names, unchanged since their release.
- Fields of config.json: configs/shapes/ holds released ones; of Qwen2.5-Omni what transformers writes.

VILA's folders are in test_vila_folders.py.
"""

from __future__ import annotations

import copy
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from longrl.models.base import CausalFamily
from longrl.models.internvl import InternVLFamily
from longrl.models.qwen2_vl import Qwen2VLFamily
from longrl.models.qwen3_5 import Qwen3_5Family, Qwen3_5TextFamily
from longrl.models.qwen3_omni import Qwen3OmniFamily
from longrl.models.qwen3_vl import Qwen3VLFamily
from longrl.models.qwen_omni import QwenOmniFamily
from longrl.models.qwen_vl import Qwen2_5_VLFamily
from longrl.models.text import LlamaFamily, TextFamily
from longrl.testing.tiny import tiny_qwen_omni
from tests.families import proves
from tests.runs import ROOT

Shapes = dict[str, tuple[int, ...]]
SHAPES = ROOT / "configs" / "shapes"


# ---- what released files hold ----


def text_layers(prefix: str, text: dict[str, Any], *, bias: bool, head_norms: bool, mlp: bool = True) -> Shapes:
    """A language model without its head."""
    width, inner, heads = text["hidden_size"], text["intermediate_size"], text["num_attention_heads"]
    size = text.get("head_dim") or width // heads
    queries, keys = heads * size, text["num_key_value_heads"] * size
    found: Shapes = {f"{prefix}embed_tokens.weight": (text["vocab_size"], width), f"{prefix}norm.weight": (width,)}
    for n in range(text["num_hidden_layers"]):
        layer = f"{prefix}layers.{n}."
        found |= {f"{layer}{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
        for name, rows in (("q", queries), ("k", keys), ("v", keys)):
            found[f"{layer}self_attn.{name}_proj.weight"] = (rows, width)
            found |= {f"{layer}self_attn.{name}_proj.bias": (rows,)} if bias else {}
        found[f"{layer}self_attn.o_proj.weight"] = (width, queries)
        found |= {f"{layer}self_attn.{name}_norm.weight": (size,) for name in "qk"} if head_norms else {}
        if mlp:
            found |= {f"{layer}mlp.{name}_proj.weight": (inner, width) for name in ("gate", "up")}
            found[f"{layer}mlp.down_proj.weight"] = (width, inner)
    return found


def linear(name: str, rows: int, columns: int) -> Shapes:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def head(text: dict[str, Any], tied: bool, prefix: str = "") -> Shapes:
    return {} if tied else {f"{prefix}lm_head.weight": (text["vocab_size"], text["hidden_size"])}


def qwen2_5_tower(prefix: str, vision: dict[str, Any], *, one_matrix: bool) -> Shapes:
    """Of Qwen2.5-VL with queries, keys and values in one matrix, of Qwen2.5-Omni in three."""
    width, inner, merged = vision["hidden_size"], vision["intermediate_size"], vision["hidden_size"] * 4
    found: Shapes = {f"{prefix}patch_embed.proj.weight": (width, 3, 2, 14, 14)}
    for n in range(vision["depth"]):
        block = f"{prefix}blocks.{n}."
        found |= {f"{block}norm{k}.weight": (width,) for k in (1, 2)}
        if one_matrix:
            found |= linear(f"{block}attn.qkv", 3 * width, width)
        else:
            found |= {key: shape for k in "qkv" for key, shape in linear(f"{block}attn.{k}", width, width).items()}
        found |= linear(f"{block}attn.proj", width, width)
        found |= linear(f"{block}mlp.gate_proj", inner, width) | linear(f"{block}mlp.up_proj", inner, width)
        found |= linear(f"{block}mlp.down_proj", width, inner)
    found[f"{prefix}merger.ln_q.weight"] = (width,)
    return found | linear(f"{prefix}merger.mlp.0", merged, merged) | linear(
        f"{prefix}merger.mlp.2", vision["out_hidden_size"], merged
    )  # fmt: skip


def qwen2_5_vl(config: dict[str, Any]) -> Shapes:
    return (
        text_layers("model.", config, bias=True, head_norms=False)
        | qwen2_5_tower("visual.", config["vision_config"], one_matrix=True)
        | head(config, config["tie_word_embeddings"])
    )


def qwen2_vl(config: dict[str, Any]) -> Shapes:
    vision = config["vision_config"]
    width = vision["embed_dim"]
    inner, merged = vision["mlp_ratio"] * width, 4 * width
    found = text_layers("model.", config, bias=True, head_norms=False) | head(config, config["tie_word_embeddings"])
    found["visual.patch_embed.proj.weight"] = (width, 3, 2, 14, 14)
    for n in range(vision["depth"]):
        block = f"visual.blocks.{n}."
        found |= layer_norm(f"{block}norm1", width) | layer_norm(f"{block}norm2", width)
        found |= linear(f"{block}attn.qkv", 3 * width, width) | linear(f"{block}attn.proj", width, width)
        found |= linear(f"{block}mlp.fc1", inner, width) | linear(f"{block}mlp.fc2", width, inner)
    found |= layer_norm("visual.merger.ln_q", width) | linear("visual.merger.mlp.0", merged, merged)
    return found | linear("visual.merger.mlp.2", vision["hidden_size"], merged)


def layer_norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def experts_of(mlp: str, text: dict[str, Any]) -> Shapes:
    """A router and all experts, [out, in]."""
    count, width, inner = text["num_experts"], text["hidden_size"], text["moe_intermediate_size"]
    return {
        f"{mlp}gate.weight": (count, width),
        f"{mlp}experts.gate_up_proj": (count, 2 * inner, width),
        f"{mlp}experts.down_proj": (count, width, inner),
    }


def qwen3_vl(config: dict[str, Any]) -> Shapes:
    text, vision = config["text_config"], config["vision_config"]
    experts = text.get("num_experts", 0)
    found = text_layers("model.language_model.", text, bias=False, head_norms=True, mlp=not experts)
    for n in range(text["num_hidden_layers"] if experts else 0):
        for name, shape in experts_of(f"model.language_model.layers.{n}.mlp.", text).items():
            found[name] = (shape[0], shape[2], shape[1]) if ".experts." in name else shape
    found |= qwen3_tower("model.visual.", vision)
    return found | head(text, config["tie_word_embeddings"])


MERGER = ("norm", "linear_fc1", "linear_fc2")


def qwen3_tower(
    prefix: str, vision: dict[str, Any], levels: str = "deepstack_merger_list", parts: tuple[str, str, str] = MERGER
) -> Shapes:
    """Of Qwen3-VL and Qwen3-Omni, which differ in the names of `levels` and of a merger's `parts`."""
    width, inner, merged = vision["hidden_size"], vision["intermediate_size"], vision["hidden_size"] * 4
    found: Shapes = {
        f"{prefix}patch_embed.proj.weight": (width, 3, 2, 16, 16),
        f"{prefix}patch_embed.proj.bias": (width,),
    }
    found[f"{prefix}pos_embed.weight"] = (vision["num_position_embeddings"], width)
    for n in range(vision["depth"]):
        block = f"{prefix}blocks.{n}."
        found |= layer_norm(f"{block}norm1", width) | layer_norm(f"{block}norm2", width)
        found |= linear(f"{block}attn.qkv", 3 * width, width) | linear(f"{block}attn.proj", width, width)
        found |= linear(f"{block}mlp.linear_fc1", inner, width) | linear(f"{block}mlp.linear_fc2", width, inner)
    mergers = [(f"{levels}.{n}", merged) for n in range(len(vision["deepstack_visual_indexes"]))]
    norm, first, second = parts
    for name, normed in [("merger", width), *mergers]:
        found |= layer_norm(f"{prefix}{name}.{norm}", normed) | linear(f"{prefix}{name}.{first}", merged, merged)
        found |= linear(f"{prefix}{name}.{second}", vision["out_hidden_size"], merged)
    return found


def qwen3_5(config: dict[str, Any]) -> Shapes:
    text = config["text_config"]
    found = hybrid_layers("model.language_model.", text) | qwen3_tower("model.visual.", config["vision_config"])
    return found | head(text, config["tie_word_embeddings"]) | further_tokens(text)


def qwen3_5_text(config: dict[str, Any]) -> Shapes:
    return hybrid_layers("model.", config) | head(config, config["tie_word_embeddings"]) | further_tokens(config)


def hybrid_layers(prefix: str, text: dict[str, Any]) -> Shapes:
    width = text["hidden_size"]
    found: Shapes = {f"{prefix}embed_tokens.weight": (text["vocab_size"], width), f"{prefix}norm.weight": (width,)}
    keys = text["linear_num_key_heads"] * text["linear_key_head_dim"]
    heads = text["linear_num_value_heads"]
    values = heads * text["linear_value_head_dim"]
    for n, kind in enumerate(text["layer_types"]):
        layer = f"{prefix}layers.{n}."
        found |= layer_norms_and_mlp(layer, text)
        if kind == "full_attention":
            found |= gated_attention(layer, text)
            continue
        found |= {f"{layer}linear_attn.in_proj_qkv.weight": (2 * keys + values, width)}
        found |= {f"{layer}linear_attn.in_proj_z.weight": (values, width)}
        found |= {f"{layer}linear_attn.in_proj_{name}.weight": (heads, width) for name in "ab"}
        found |= {f"{layer}linear_attn.conv1d.weight": (2 * keys + values, 1, text["linear_conv_kernel_dim"])}
        found |= {f"{layer}linear_attn.{name}": (heads,) for name in ("A_log", "dt_bias")}
        found |= {f"{layer}linear_attn.norm.weight": (text["linear_value_head_dim"],)}
        found |= {f"{layer}linear_attn.out_proj.weight": (width, values)}
    return found


def layer_norms_and_mlp(layer: str, text: dict[str, Any]) -> Shapes:
    width = text["hidden_size"]
    found: Shapes = {f"{layer}{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
    prefix, inner = "mlp.", text.get("intermediate_size")
    if "num_experts" in text:
        found |= experts_of(f"{layer}mlp.", text) | {f"{layer}mlp.shared_expert_gate.weight": (1, width)}
        prefix, inner = "mlp.shared_expert.", text["shared_expert_intermediate_size"]
    found |= {f"{layer}{prefix}{name}_proj.weight": (inner, width) for name in ("gate", "up")}
    return found | {f"{layer}{prefix}down_proj.weight": (width, inner)}


def gated_attention(layer: str, text: dict[str, Any]) -> Shapes:
    """A layer's queries stand beside their gates."""
    width, size = text["hidden_size"], text["head_dim"]
    queries, keys = text["num_attention_heads"] * size, text["num_key_value_heads"] * size
    found: Shapes = {f"{layer}self_attn.q_proj.weight": (2 * queries, width)}
    found |= {f"{layer}self_attn.{name}_proj.weight": (keys, width) for name in "kv"}
    found |= {f"{layer}self_attn.{name}_norm.weight": (size,) for name in "qk"}
    return found | {f"{layer}self_attn.o_proj.weight": (width, queries)}


def further_tokens(text: dict[str, Any]) -> Shapes:
    width, layer = text["hidden_size"], "mtp.layers.0."
    found = {"mtp.fc.weight": (width, 2 * width), "mtp.norm.weight": (width,)}
    found |= {f"mtp.pre_fc_norm_{name}.weight": (width,) for name in ("embedding", "hidden")}
    found |= gated_attention(layer, text) | layer_norms_and_mlp(layer, text)
    if "num_experts" in text:
        del found[f"{layer}mlp.experts.gate_up_proj"], found[f"{layer}mlp.experts.down_proj"]
        inner = text["moe_intermediate_size"]
        for n in range(text["num_experts"]):
            expert = f"{layer}mlp.experts.{n}."
            found |= {f"{expert}{name}_proj.weight": (inner, width) for name in ("gate", "up")}
            found[f"{expert}down_proj.weight"] = (width, inner)
    return found


def qwen2_5_omni(config: dict[str, Any]) -> Shapes:
    thinker = config["thinker_config"]
    text, audio = thinker["text_config"], thinker["audio_config"]
    found = text_layers("thinker.model.", text, bias=True, head_norms=False) | head(text, False, "thinker.")
    found |= qwen2_5_tower("thinker.visual.", thinker["vision_config"], one_matrix=False)
    vision_encoder, width, inner = "thinker.audio_tower.", audio["d_model"], audio["encoder_ffn_dim"]
    for name, channels in (("conv1", audio["num_mel_bins"]), ("conv2", width)):
        found |= {f"{vision_encoder}{name}.weight": (width, channels, 3), f"{vision_encoder}{name}.bias": (width,)}
    found[f"{vision_encoder}audio_bos_eos_token.weight"] = (2, audio["output_dim"])
    for n in range(audio["encoder_layers"]):
        layer = f"{vision_encoder}layers.{n}."
        found |= layer_norm(f"{layer}self_attn_layer_norm", width) | layer_norm(f"{layer}final_layer_norm", width)
        for name in ("q_proj", "v_proj", "out_proj"):
            found |= linear(f"{layer}self_attn.{name}", width, width)
        found[f"{layer}self_attn.k_proj.weight"] = (width, width)
        found |= linear(f"{layer}fc1", inner, width) | linear(f"{layer}fc2", width, inner)
    found |= layer_norm(f"{vision_encoder}ln_post", width) | linear(f"{vision_encoder}proj", audio["output_dim"], width)
    others = {"talker.codec_head.weight": (5, 3), "talker.model.embed_tokens.weight": (5, 3)}
    others |= {"talker.model.layers.0.self_attn.q_proj.weight": (3, 3), **linear("talker.thinker_to_talker_proj", 3, 4)}
    others |= {"token2wav.code2wav_dit_model.proj_out.weight": (3, 3)}
    return found | others | {"token2wav.code2wav_bigvgan_model.conv_pre.weight": (3, 3, 7)}


def qwen3_omni(config: dict[str, Any]) -> Shapes:
    thinker = config["thinker_config"]
    text, audio, vision = thinker["text_config"], thinker["audio_config"], thinker["vision_config"]
    found = text_layers("thinker.model.", text, bias=False, head_norms=True, mlp=False) | head(text, False, "thinker.")
    width, inner = text["hidden_size"], text["moe_intermediate_size"]
    for n in range(text["num_hidden_layers"]):
        mlp = f"thinker.model.layers.{n}.mlp."
        found[f"{mlp}gate.weight"] = (text["num_experts"], width)
        for k in range(text["num_experts"]):
            found |= {f"{mlp}experts.{k}.{name}_proj.weight": (inner, width) for name in ("gate", "up")}
            found[f"{mlp}experts.{k}.down_proj.weight"] = (width, inner)
    found |= qwen3_tower("thinker.visual.", vision, "merger_list", ("ln_q", "mlp.0", "mlp.2"))
    encoder, width, inner = "thinker.audio_tower.", audio["d_model"], audio["encoder_ffn_dim"]
    channels = audio["downsample_hidden_size"]
    for n in (1, 2, 3):
        found[f"{encoder}conv2d{n}.weight"] = (channels, 1 if n == 1 else channels, 3, 3)
        found[f"{encoder}conv2d{n}.bias"] = (channels,)
    found[f"{encoder}conv_out.weight"] = (width, channels * audio["num_mel_bins"] // 8)
    for n in range(audio["encoder_layers"]):
        layer = f"{encoder}layers.{n}."
        found |= layer_norm(f"{layer}self_attn_layer_norm", width) | layer_norm(f"{layer}final_layer_norm", width)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            found |= linear(f"{layer}self_attn.{name}", width, width)
        found |= linear(f"{layer}fc1", inner, width) | linear(f"{layer}fc2", width, inner)
    found |= layer_norm(f"{encoder}ln_post", width) | linear(f"{encoder}proj1", width, width)
    found |= linear(f"{encoder}proj2", audio["output_dim"], width)
    others = {"talker.codec_head.weight": (5, 3), "talker.code_predictor.model.norm.weight": (3,)}
    for k in range(2):
        others |= {f"talker.model.layers.0.mlp.experts.{k}.{name}_proj.weight": (3, 4) for name in ("gate", "up")}
        others[f"talker.model.layers.0.mlp.experts.{k}.down_proj.weight"] = (4, 3)
    return found | others | {"code2wav.code_embedding.weight": (5, 3), "code2wav.decoder.0.conv.weight": (3, 3, 7)}


def qwen2_5_text(config: dict[str, Any]) -> Shapes:
    return text_layers("model.", config, bias=True, head_norms=False) | head(config, config["tie_word_embeddings"])


def qwen3_text(config: dict[str, Any]) -> Shapes:
    return text_layers("model.", config, bias=False, head_norms=True) | head(config, config["tie_word_embeddings"])


def internvl(config: dict[str, Any]) -> Shapes:
    text, vision = config["text_config"], config["vision_config"]
    found = text_layers("language_model.model.", text, bias=False, head_norms=True)
    found |= head(text, text["tie_word_embeddings"], "language_model.")
    width, inner, merged = vision["hidden_size"], vision["intermediate_size"], vision["hidden_size"] * 4
    num_patches = (vision["image_size"][0] // vision["patch_size"][0]) ** 2
    embeddings = "vision_tower.embeddings."
    found |= {f"{embeddings}cls_token": (1, 1, width), f"{embeddings}position_embeddings": (1, num_patches + 1, width)}
    found[f"{embeddings}patch_embeddings.projection.weight"] = (width, 3, *vision["patch_size"])
    found[f"{embeddings}patch_embeddings.projection.bias"] = (width,)
    for n in range(vision["num_hidden_layers"]):
        layer = f"vision_tower.encoder.layer.{n}."
        found |= {f"{layer}lambda_{k}": (width,) for k in (1, 2)}
        found |= layer_norm(f"{layer}layernorm_before", width) | layer_norm(f"{layer}layernorm_after", width)
        for name in ("q_proj", "k_proj", "v_proj", "projection_layer"):
            found |= linear(f"{layer}attention.{name}", width, width)
        found |= linear(f"{layer}mlp.fc1", inner, width) | linear(f"{layer}mlp.fc2", width, inner)
    projector = "multi_modal_projector."
    found |= layer_norm(f"{projector}layer_norm", merged)
    found |= linear(f"{projector}linear_1", text["hidden_size"], merged)
    return found | linear(f"{projector}linear_2", text["hidden_size"], text["hidden_size"])


def llama_text(config: dict[str, Any]) -> Shapes:
    return text_layers("model.", config, bias=False, head_norms=False) | head(config, config["tie_word_embeddings"])


# ---- their configs ----


def released(name: str) -> dict[str, Any]:
    (file,) = SHAPES.glob(f"*/{name}/config.json")
    return json.loads(file.read_text())


def qwen3_vl_30b_a3b() -> dict[str, Any]:
    """The 8B's fields, the experts' of the model's paper (arXiv:2511.21631: 128 experts, 8 at a time)."""
    config = released("Qwen3-VL-8B-Instruct")
    config |= {"architectures": ["Qwen3VLMoeForConditionalGeneration"], "model_type": "qwen3_vl_moe"}
    config["text_config"] |= {
        "model_type": "qwen3_vl_moe_text", "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
        "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True, "hidden_size": 2048,
        "intermediate_size": 6144, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4,
    }  # fmt: skip
    config["vision_config"] |= {"model_type": "qwen3_vl_moe", "out_hidden_size": 2048}
    return config


def qwen2_vl_7b() -> dict[str, Any]:
    """The 2.5's fields; of the encoder the defaults of its configuration class, which is made after this model."""
    config = released("Qwen2.5-VL-7B-Instruct")
    config |= {"architectures": ["Qwen2VLForConditionalGeneration"], "model_type": "qwen2_vl"}
    config["vision_config"] = {
        "depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "in_chans": 3, "hidden_size": 3584,
        "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14, "temporal_patch_size": 2,
    }  # fmt: skip
    return config


def text_alone(name: str) -> dict[str, Any]:
    """The text stack of a released model with a vision tower, as a model of its own."""
    kind = "Moe" if "A3B" in name else ""
    return released(name)["text_config"] | {"architectures": [f"Qwen3_5{kind}ForCausalLM"]}


def qwen2_5_omni_config() -> dict[str, Any]:
    return json.loads((tiny_qwen_omni(tempfile.mkdtemp(prefix="longrl-released-")) / "config.json").read_text())


def reduced(config: dict[str, Any]) -> dict[str, Any]:
    """The same fields; fewer layers, narrower, as many heads per key head."""
    if "thinker_config" in config:
        return config | {"thinker_config": reduced(config["thinker_config"])}
    small = copy.deepcopy(config)
    text, vision = small.get("text_config", small), small.get("vision_config")
    ratio = text["num_attention_heads"] // text["num_key_value_heads"]
    text |= {"hidden_size": 16 * ratio, "intermediate_size": 40, "num_hidden_layers": 2, "vocab_size": 64}
    text |= {"num_attention_heads": 2 * ratio, "num_key_value_heads": 2}
    if "head_dim" in text:
        # Sections of M-RoPE belong to a head of 128, or to a quarter of one of 256.
        text["head_dim"] = text["head_dim"] if vision or "layer_types" in text else 8
    if "num_experts" in text:
        text |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    if "linear_num_key_heads" in text:
        text |= {"layer_types": text["layer_types"][:4], "num_hidden_layers": 4, "linear_num_key_heads": 2}
        text |= {"linear_num_value_heads": 6, "linear_key_head_dim": 8, "linear_value_head_dim": 12}
    if "shared_expert_intermediate_size" in text:
        text["shared_expert_intermediate_size"] = 20
    if vision:
        vision |= {"intermediate_size": 48, "num_heads": 2, "depth": 3}
        is_first = "embed_dim" in vision  # whose hidden_size is the text stack's
        vision |= {"embed_dim": 32, "hidden_size": text["hidden_size"]} if is_first else {"hidden_size": 32}
        vision["out_hidden_size"] = text["hidden_size"]
        if "num_attention_heads" in vision:  # InternVL's
            vision |= {"num_attention_heads": 2, "num_hidden_layers": 3, "image_size": [56, 56]}
        elif is_first:
            text["rope_scaling"]["mrope_section"] = [2, 1, 1]
        elif "fullatt_block_indexes" in vision:
            text["rope_scaling"]["mrope_section"] = [2, 1, 1]
            vision["fullatt_block_indexes"] = [1]
        else:
            levels = [0, 1, 2] if vision["deepstack_visual_indexes"] else []
            vision |= {"deepstack_visual_indexes": levels, "num_position_embeddings": 16}
    if "audio_config" in small:
        small["audio_config"] |= {
            "d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 48,
            "downsample_hidden_size": 8, "num_mel_bins": 32, "output_dim": text["hidden_size"],
        }  # fmt: skip
    for key in ("bos_token_id", "eos_token_id"):
        text.pop(key, None)  # beyond the reduced vocabulary
    return small


CASES = {
    "Qwen2.5-1.5B": ("qwen2.5", TextFamily, lambda: released("Qwen2.5-1.5B-Instruct"), qwen2_5_text),
    "Qwen2.5-7B": ("qwen2.5", TextFamily, lambda: released("Qwen2.5-7B-Instruct"), qwen2_5_text),
    "Qwen3-1.7B": ("qwen3", TextFamily, lambda: released("Qwen3-1.7B"), qwen3_text),
    "Qwen3-4B": ("qwen3", TextFamily, lambda: released("Qwen3-4B"), qwen3_text),
    "Llama-3.2-1B": ("llama3", LlamaFamily, lambda: released("Llama-3.2-1B-Instruct"), llama_text),
    "Qwen2-VL-7B": ("qwen2-vl", Qwen2VLFamily, qwen2_vl_7b, qwen2_vl),
    "Qwen2.5-VL-3B": ("qwen2.5-vl", Qwen2_5_VLFamily, lambda: released("Qwen2.5-VL-3B-Instruct"), qwen2_5_vl),
    "Qwen2.5-VL-7B": ("qwen2.5-vl", Qwen2_5_VLFamily, lambda: released("Qwen2.5-VL-7B-Instruct"), qwen2_5_vl),
    "Qwen3-VL-4B": ("qwen3-vl", Qwen3VLFamily, lambda: released("Qwen3-VL-4B-Instruct"), qwen3_vl),
    "Qwen3-VL-8B": ("qwen3-vl", Qwen3VLFamily, lambda: released("Qwen3-VL-8B-Instruct"), qwen3_vl),
    "Qwen3-VL-30B-A3B": ("qwen3-vl-moe", Qwen3VLFamily, qwen3_vl_30b_a3b, qwen3_vl),
    "InternVL3.5-8B": ("internvl3.5", InternVLFamily, lambda: released("InternVL3_5-8B-HF"), internvl),
    "Qwen3.5-9B": ("qwen3.5", Qwen3_5Family, lambda: released("Qwen3.5-9B"), qwen3_5),
    "Qwen3.5-35B-A3B": ("qwen3.5-moe", Qwen3_5Family, lambda: released("Qwen3.5-35B-A3B"), qwen3_5),
    "Qwen3.5-9B-text": ("qwen3.5-text", Qwen3_5TextFamily, lambda: text_alone("Qwen3.5-9B"), qwen3_5_text),
    "Qwen3.5-A3B-text": ("qwen3.5-text", Qwen3_5TextFamily, lambda: text_alone("Qwen3.5-35B-A3B"), qwen3_5_text),
    "Qwen2.5-Omni": ("qwen2.5-omni", QwenOmniFamily, qwen2_5_omni_config, qwen2_5_omni),
    "Qwen3-Omni-30B-A3B": ("qwen3-omni", Qwen3OmniFamily, lambda: released("Qwen3-Omni-30B-A3B-Instruct"), qwen3_omni),
}
"""Model -> row of the table in docs/families.md, family, its config, and what its files hold."""
EVERY = pytest.mark.parametrize("model", CASES)
PROVEN = [pytest.param(model, marks=proves("released files", case[0])) for model, case in CASES.items()]


def folder_of(model: str, folder: Path) -> tuple[CausalFamily, dict[str, torch.Tensor]]:
    """A released folder with random values, its family, and the values."""
    _, kind, config, names = CASES[model]
    values = config() if model == "Qwen2.5-Omni" else reduced(config())
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(shape, generator=generator) for name, shape in names(values).items()}
    (folder / "config.json").write_text(json.dumps(values))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return kind(str(folder)), weights


def test_the_7b_has_as_many_tensors_as_released():
    assert len(qwen2_5_vl(released("Qwen2.5-VL-7B-Instruct"))) == 729


def test_qwen3_5_has_as_many_tensors_as_released():
    assert len(qwen3_5(released("Qwen3.5-35B-A3B"))) == 1811


@pytest.mark.parametrize(
    ("name", "text", "vision", "further"),
    [
        ("Qwen3.5-9B", 8_953_803_264, 456_010_480, 243_290_624),
        ("Qwen3.5-27B", 26_895_998_464, 460_730_096, 424_699_392),
        ("Qwen3.5-35B-A3B", 34_660_610_688, 446_571_248, 844_640_768),
    ],
)
def test_qwen3_5_has_the_published_number_of_parameters(name, text, vision, further):
    """Sums of 9,653,104,368, of 27,781,427,952 and of 35,951,822,704."""
    shapes = qwen3_5(released(name))
    counts = dict.fromkeys(("model.visual.", "mtp.", ""), 0)
    for tensor, shape in shapes.items():
        counts[next(prefix for prefix in counts if tensor.startswith(prefix))] += math.prod(shape)
    assert counts == {"model.visual.": vision, "mtp.": further, "": text}


@pytest.mark.parametrize("model", PROVEN)
def test_a_released_folder_loads_with_no_name_missing_or_left_over(model, tmp_path):
    """`build` raises ValueError for either. Every number of the file arrives, experts turned around."""
    family, weights = folder_of(model, tmp_path)
    built = family.build()
    read = {name: value for name, value in weights.items() if not name.startswith(family.ignored_weight_prefixes)}
    read = joined_experts(read)
    own = dict(built.named_parameters())  # a tied head is counted once
    assert len(own) == len(read)
    assert sum(value.numel() for value in own.values()) == sum(value.numel() for value in read.values())
    found = sorted(float(value.detach().double().sum()) for value in own.values())
    torch.testing.assert_close(found, sorted(float(value.double().sum()) for value in read.values()))


def joined_experts(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As many tensors as transformers has, all experts of a layer in two; their order is no matter here."""
    found: dict[str, list[torch.Tensor]] = {}
    for name, value in weights.items():
        layer, experts, part = name.partition(".mlp.experts.")
        down = "down" in part
        found.setdefault(f"{layer}{experts}{down}" if part.endswith(".weight") else name, []).append(value.flatten())
    return {name: torch.cat(values) for name, values in found.items()}


@EVERY
def test_what_is_written_has_the_released_names_and_bits(model, tmp_path):
    """vLLM and older readers know these; of an Omni model the thinker is written, as transformers names it alone."""
    family, weights = folder_of(model, tmp_path)
    family.save_weights(family.build(), tmp_path / "written")
    written = load_file(tmp_path / "written" / "model.safetensors")
    read = {name: value for name, value in weights.items() if not name.startswith(family.ignored_weight_prefixes)}
    renamed = {name.removeprefix("thinker."): value for name, value in read.items()}
    assert written.keys() == renamed.keys()
    assert all(torch.equal(value, written[name]) for name, value in renamed.items())


@EVERY
def test_a_name_too_few_or_too_many_is_told(model, tmp_path):
    family, weights = folder_of(model, tmp_path)
    lost = next(name for name in weights if name.endswith("layers.1.post_attention_layernorm.weight"))
    left = {name: value for name, value in weights.items() if name != lost} | {"surplus.weight": torch.ones(2)}
    save_file(left, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"does not hold the weights its config.* \(2 differences\)") as error:
        family.build()
    assert "layers.1.post_attention_layernorm.weight is missing" in str(error.value)
    assert "surplus.weight is unknown" in str(error.value)


def test_a_tied_head_may_be_in_the_file_too(tmp_path):
    family, weights = folder_of("Qwen2.5-VL-3B", tmp_path)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = family.build()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_experts_are_turned_around(tmp_path):
    family, weights = folder_of("Qwen3-VL-30B-A3B", tmp_path)
    state = family.build().state_dict()
    for name, value in weights.items():
        if ".mlp.experts." in name:
            assert torch.equal(state[name], value.transpose(1, 2))
            assert torch.equal(family.engine_tensor(name, state[name]), value)  # as vLLM reads it
    assert state["model.language_model.layers.0.mlp.experts.down_proj"].shape == (4, 128, 24)


def test_experts_of_their_own_are_joined_as_transformers_and_vllm_have_them(tmp_path):
    family, weights = folder_of("Qwen3-Omni-30B-A3B", tmp_path)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    joined = family.build().state_dict()[name]  # [experts, 2 inner, width]
    expert = f"thinker.{name.removesuffix('gate_up_proj')}3."
    parts = [weights[f"{expert}{part}_proj.weight"] for part in ("gate", "up")]
    assert torch.equal(joined[3], torch.cat(parts))
    assert family.engine_weight(name) == f"thinker.{name}"
    assert family.engine_tensor(name, joined) is joined


def test_a_weight_of_another_shape_is_told(tmp_path):
    family, weights = folder_of("Qwen3-VL-8B", tmp_path)
    weights["model.visual.pos_embed.weight"] = torch.zeros(25, 32)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"pos_embed.weight is \[25, 32\] instead of \[16, 32\] \(1 differences\)"):
        family.build()


@pytest.mark.parametrize("model", ["Qwen3.5-9B", "Qwen3.5-9B-text"])
def test_fused_projections_of_another_release_are_told_before_a_weight_is_read(model, tmp_path, monkeypatch):
    family, weights = folder_of(model, tmp_path)
    names = [name for name in weights if name.endswith(("in_proj_qkv.weight", "in_proj_z.weight"))]
    for name in names:
        value = weights.pop(name)
        if "qkv" in name:
            weights[name.replace("in_proj_qkv", "in_proj_qkvz")] = value
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr(family, "auto_class", lambda: pytest.fail("weights were read"))
    with pytest.raises(ValueError, match=r"holds .*in_proj_qkvz.weight, a projection fused as in Qwen3-Next, but"):
        family.build()


def test_text_alone_may_keep_the_names_of_the_model_it_comes_from(tmp_path):
    family, weights = folder_of("Qwen3.5-9B-text", tmp_path)
    before = family.build().state_dict()
    renamed = {name.replace("model.", "model.language_model.", 1): value for name, value in weights.items()}
    save_file(renamed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    after = family.build().state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
