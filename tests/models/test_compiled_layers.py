"""Layers that torch compiles: the results of plain ones, and no graph more for further layers, layouts and lengths."""

import functools
import shutil
from itertools import chain

import pytest
import torch

from longrl.engines.hf import HFEngine
from longrl.models.lora import LoRASettings
from longrl.modules.initial_weights import build_from
from longrl.packing.pack import pack
from longrl.testing.tiny import tiny_text
from longrl.types import SamplingParams
from tests.tiny import (
    assert_same_gradients,
    frames,
    gradients,
    qwen3_5_text_family,
    qwen3_vl_family,
    random_completions,
    row,
    text_family,
)

BATCHES = {"Which one? " * 4: [5, 7], "Which? " * 9: [3, 4, 6], "x": [30], "Why " * 20: [2, 3, 4, 5]}
"""Completion lengths of a question: other layouts and other lengths."""
INDUCTOR = "inductor"
TRACED = "eager"
"""Traces graphs as for compilation and runs them as they are: to the last bit, and in seconds."""


@pytest.fixture
def compiled_by(monkeypatch):
    """Lets a test choose what runs the graphs, and counts them."""
    torch.compiler.reset()
    graphs = []
    compile_with = torch.compile

    def choose(backend):
        def count(graph, inputs):
            graphs.append(graph)
            return torch._dynamo.lookup_backend(backend)(graph, inputs)

        monkeypatch.setattr(torch, "compile", functools.partial(compile_with, backend=count))
        return graphs

    yield choose
    torch.compiler.reset()


def updates(family):
    """(log-probabilities without and with gradient, gradients) of every batch."""
    model = build_from(family, None).train()
    results = []
    for question, lengths in BATCHES.items():
        media = [frames(4, 60, 90, question)] if family.media_encoders(model) else []
        prompt = family.render(row(), question, media)
        features = dict(zip((item.key for item in prompt.media), family.encode_media(model, prompt.media), strict=True))
        (packed,) = pack([prompt], random_completions(family, [lengths]), 10_000)
        model.zero_grad()
        with torch.no_grad():
            before = family.forward(model, packed, features).logp
        logp = family.forward(model, packed, features).logp
        logp.sum().backward()
        results.append((before, logp.detach(), gradients(model)))
    return results


def assert_equal(found, wanted, tolerance):
    for (before, logp, grads), (plain_before, plain_logp, plain_grads) in zip(found, wanted, strict=True):
        torch.testing.assert_close(before, plain_before, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(logp, plain_logp, rtol=tolerance, atol=tolerance)
        assert_same_gradients(grads, plain_grads, tolerance)


def test_graphs_give_the_bits_of_plain_layers_and_are_those_of_the_first_layer(compiled_by, tmp_path):
    folder = str(tiny_text(tmp_path, num_hidden_layers=10))  # more than the 8 graphs that torch keeps of a function
    make = functools.partial(text_family, gradient_checkpointing=True)
    deep = make()
    deep.model_path = folder
    plain = updates(deep)
    graphs = compiled_by(TRACED)
    deep.compile_layers = True
    assert_equal(updates(deep), plain, 0)
    assert 3 <= len(graphs) <= 12  # before, between and behind attention, with and without gradient


def test_graphs_of_a_hybrid_model_stop_at_the_recurrence(compiled_by):
    make = functools.partial(qwen3_5_text_family, gradient_checkpointing=True)
    plain = updates(make())
    graphs = compiled_by(TRACED)
    assert_equal(updates(make(compile_layers=True)), plain, 1e-6)
    assert 3 <= len(graphs) <= 24  # of two kinds of layers


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"lora": LoRASettings(rank=2)}], ids=["all weights", "adapters"])
def test_pieces_of_an_mlp_are_compiled_and_their_number_is_not(options, compiled_by):
    family = functools.partial(text_family, mlp_chunk_tokens=16, gradient_checkpointing=True, **options)
    graphs = compiled_by(TRACED)
    assert_equal(updates(family(compile_layers=True)), updates(family()), 0)
    assert len(graphs) <= 24


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler")
@pytest.mark.parametrize("make", [text_family, qwen3_vl_family])
def test_fused_kernels_round_and_nothing_else(make, compiled_by):
    """torch's own compiler, here for CPUs; Qwen3-VL adds features behind its first layers."""
    graphs = compiled_by(INDUCTOR)
    assert_equal(updates(make(compile_layers=True)), updates(make()), 1e-5)
    assert graphs


def test_weights_keep_their_names_and_plain_is_the_default(caplog):
    plain = build_from(text_family(mlp_chunk_tokens=8), None)
    with caplog.at_level("INFO", "longrl.models.compiled_layers"):
        compiled = build_from(text_family(mlp_chunk_tokens=8, compile_layers=True), None)
    assert list(compiled.state_dict()) == list(plain.state_dict())
    assert all(layer._compiled_call_impl is None for layer in plain.model.layers)
    assert all(layer._compiled_call_impl is not None for layer in compiled.model.layers)
    assert caplog.messages == ["2 layers of the text stack are compiled when they first run"]


def test_the_reference_engine_generates_the_same_with_compiled_layers(compiled_by):
    family = text_family()
    prompts = [family.render(row(), question) for question in ("Which?", "Which one then?")]
    sampling = SamplingParams(2, 6)
    compiled_by(TRACED)
    family.compile_layers = True
    found = HFEngine().generate(family, build_from(family, None).eval(), prompts, {}, sampling, seed=0)
    family.compile_layers = False
    wanted = HFEngine().generate(family, build_from(family, None).eval(), prompts, {}, sampling, seed=0)
    for ours, theirs in zip(chain(*found), chain(*wanted), strict=True):
        assert torch.equal(ours.token_ids, theirs.token_ids)
        assert torch.equal(ours.logprobs, theirs.logprobs)
