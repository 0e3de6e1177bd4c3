"""Options of a family that bound memory: what the backward pass keeps, and where; names stay those of a plain model."""

import pytest
import torch

from longrl.models.checkpoint_offload import OffloadedCheckpoints
from longrl.models.chunked_mlp import ChunkedMLP
from longrl.models.lora import LoRASettings
from longrl.modules.initial_weights import build_from
from longrl.packing.pack import pack
from tests.tiny import (
    assert_same_gradients,
    gradients,
    qwen3_5_text_family,
    random_completions,
    row,
    text_family,
    vl_family,
)

OPTIONS = {"gradient_checkpointing": True, "offload_checkpoints": True}


def update(family, dtype=torch.float32):
    """(model, tokens of its only micro-batch) after a backward pass."""
    model = build_from(family, None).to(dtype).train()
    prompt = family.render(row(), "Which one? " * 4)
    (packed,) = pack([prompt], random_completions(family, [[5, 7]]), 10_000)
    family.forward(model, packed, {}).logp.sum().backward()
    return model, len(packed.input_ids)


def test_only_layer_inputs_and_the_final_norm_go_to_the_host(monkeypatch):
    shapes = []
    keep = OffloadedCheckpoints._keep

    def note(self, tensor):
        kept = keep(self, tensor)
        if kept is not tensor:
            shapes.append(tuple(tensor.shape))
        return kept

    monkeypatch.setattr(OffloadedCheckpoints, "_keep", note)
    model, length = update(text_family(**OPTIONS))
    plain, _ = update(text_family())
    layers = len(model.model.layers)
    assert set(shapes) == {(1, length, model.config.hidden_size)}
    assert layers <= len(shapes) <= layers + 3  # the norm's input, its copy and the normalised one
    assert_same_gradients(gradients(model), gradients(plain), 1e-6)


def test_no_tensor_of_the_mlps_width_is_kept_in_pieces():
    family = text_family(mlp_chunk_tokens=5)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        model, _ = update(family)
    width = model.config.intermediate_size
    assert not [shape for shape in kept if len(shape) == 3 and shape[-1] == width]


@pytest.mark.parametrize("tokens", [1, 5, 1000])
@pytest.mark.parametrize("lora", [None, LoRASettings(rank=2)])
def test_pieces_change_no_gradient(tokens, lora):
    found, _ = update(text_family(mlp_chunk_tokens=tokens, lora=lora), torch.float64)
    wanted, _ = update(text_family(lora=lora), torch.float64)
    assert_same_gradients(gradients(found), gradients(wanted), 1e-12)


@pytest.mark.parametrize("experts", [False, True])
def test_no_option_changes_a_gradient_of_a_hybrid_model(experts):
    """Layers that are computed again fork the same states, to the bit; pieces of an MLP round otherwise.

    What rounds otherwise differs by the noise of the rule's own gradients: 2e-5 of those of `dt_bias`, the smallest.
    """
    wanted, _ = update(qwen3_5_text_family(experts))
    for options in ({"gradient_checkpointing": True}, OPTIONS):
        found, _ = update(qwen3_5_text_family(experts, **options))
        assert_same_gradients(gradients(found), gradients(wanted), 0)
    found, _ = update(qwen3_5_text_family(experts, mlp_chunk_tokens=5, **OPTIONS))
    assert_same_gradients(gradients(found), gradients(wanted), 1e-4)


@pytest.mark.parametrize("lora", [None, LoRASettings(rank=2)])
def test_weights_keep_their_names(lora):
    chunked = build_from(vl_family(mlp_chunk_tokens=4, lora=lora, freeze_vision_encoder=True), None)
    plain = build_from(vl_family(lora=lora, freeze_vision_encoder=True), None)
    assert any(isinstance(module, ChunkedMLP) for module in chunked.modules())
    assert list(chunked.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in chunked.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert not [name for name, module in chunked.model.visual.named_modules() if isinstance(module, ChunkedMLP)]


def test_an_option_without_effect_gets_a_warning_and_a_wrong_one_an_error(caplog):
    text_family(offload_checkpoints=True)
    assert "offload_checkpoints has no effect without gradient_checkpointing" in caplog.text
    with pytest.raises(ValueError, match=r"mlp_chunk_tokens must be at least 1, got 0; 8192 is usual"):
        text_family(mlp_chunk_tokens=0)


def test_an_mlp_that_holds_weights_itself_is_refused():
    mlp = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"mlp_chunk_tokens needs weights in linear layers, but Linear holds its own"):
        ChunkedMLP(mlp, 4)
