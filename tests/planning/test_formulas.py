"""The memory model against numbers worked out by hand, and what it says of the released models."""

import dataclasses
import re

import pytest

from longrl.algorithms import Algorithm, optimal_token_baseline
from longrl.models.internvl import InternVLFamily
from longrl.models.qwen3_5 import Qwen3_5Family
from longrl.models.qwen3_vl import Qwen3VLFamily
from longrl.models.qwen_vl import Qwen2_5_VLFamily
from longrl.models.text import LlamaFamily, TextFamily
from longrl.modules.token_statistics import statistics_passes
from longrl.planning import flops, formulas, memory, shapes
from longrl.planning.hardware import HARDWARE, find_hardware
from longrl.planning.inputs import EncoderSizes, ModelSizes, Plan
from longrl.planning.micro_batches import micro_batch
from longrl.planning.run_plan import video_outline, with_needed_budget

TINY = ModelSizes(
    layer_params=(100, 100), root_params=50, hidden=8, num_heads=4, num_key_heads=2, head_size=2, mlp_width=16,
    vocabulary=32, head_norms=False, feature_size=8,
    vision_encoder=EncoderSizes(
        params=30, trains=False, width=4, mlp_width=8, num_layers=2, num_full_layers=1, window_patches=4,
        patch_values=12, merge=4,
    ),
)  # fmt: skip
RUN = Plan(
    TINY, devices=2, prompts_per_batch=2, prompt_tokens=100, media_tokens=80, spatial_patches=16, num_generations=4,
    completion_tokens=10, max_tokens_per_micro_batch=140, feature_cache_bytes=0, cuda=False,
)  # fmt: skip


def changed(**options):
    return dataclasses.replace(RUN, **options)


@pytest.fixture(scope="module")
def seven_b():
    """Qwen2.5-VL 7B on 3,600 frames of 336 x 336, 8 x 80 GB, G = 8."""
    family = shapes.find_config(
        Qwen2_5_VLFamily(
            "Qwen/Qwen2.5-VL-7B-Instruct", dtype="bfloat16", gradient_checkpointing=True, max_pixels=336 * 336,
            max_video_pixels=3600 * 336 * 336,
        )
    )  # fmt: skip
    video = video_outline(family, 3600, 720, 720)
    tokens, spatial_patches = family.num_features(video), video.grid_thw[1] * video.grid_thw[2]
    return Plan(
        ModelSizes.from_family(family), devices=8, sequence_parallel_size=8, weight_bytes=2, gathered_bytes=2,
        frames=3600, gradient_checkpointing=True, media_tokens=tokens, spatial_patches=spatial_patches,
        prompt_tokens=tokens + 512, workspace_bytes=3 << 30,
    )  # fmt: skip


# ---- by hand ----


def test_what_stands_is_the_shards_and_a_whole_tower():
    parts = formulas.standing_memory(RUN)
    assert parts["weights"] == 4 * 250 / 2
    assert parts["vision encoder"] == 4 * 30
    assert parts["optimizer"] == 2 * 4 * 250 / 2
    assert parts["features"] == 4 * 2 * 80 * 8  # both prompts, whole on every rank
    assert parts["reference"] == 0


def test_replicas_spread_the_weights_over_fewer_ranks_and_offload_over_none():
    assert formulas.weight_memory(changed(devices=4)) == 4 * 250 / 4
    assert formulas.weight_memory(changed(devices=4, num_replicas=2)) == 4 * 250 / 2
    assert formulas.optimizer_memory(changed(offload=True)) == 0


def test_a_tower_that_trains_is_sharded_and_has_gradients():
    trains = dataclasses.replace(TINY, vision_encoder=dataclasses.replace(TINY.vision_encoder, trains=True))
    plan = changed(sizes=trains)
    assert formulas.frozen_encoder_memory(plan) == 0
    assert formulas.trained_memory(plan) == 4 * 280 / 2


def test_a_reference_has_shards_a_tower_and_a_root_that_stays_gathered():
    assert formulas.reference_memory(changed(reference=True)) == 4 * (250 / 2 + 30) + 4 * 50


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({}, 0),
        ({"mini_batches": 2}, 1),
        ({"statistics_passes": 1}, 1),
        ({"statistics_passes": 1, "mini_batches": 2}, 1),  # entropies come with the old log-probabilities
        ({"statistics_passes": 2, "epochs": 2, "reference": True}, 3),
    ],
)
def test_tokens_are_scored_as_often_as_the_objective_reads_them(options, count):
    plan = changed(**{"mini_batches": 1, "epochs": 1, **options})
    assert flops.scoring_passes(plan) == count
    assert ("score" in memory.estimate_memory(plan).phases) == (count > 0)


def test_an_objective_says_how_often():
    assert statistics_passes(Algorithm()) == 0
    assert statistics_passes(Algorithm(top_entropy_share=0.2)) == 1
    assert statistics_passes(Algorithm(advantage=optimal_token_baseline, top_entropy_share=0.2)) == 2


def test_beside_adapters_nothing_else_has_gradients_optimizer_or_a_reference():
    adapted = dataclasses.replace(TINY, adapter_params=20, adapter_inputs=64)
    plan = changed(sizes=adapted, weight_bytes=2, reference=True)
    parts = formulas.standing_memory(plan)
    assert parts["weights"] == (2 * 250 + 4 * 20) / 2  # adapters are float32
    assert formulas.trained_memory(plan) == 4 * 20 / 2
    assert parts["optimizer"] == 2 * 4 * 20 / 2
    assert parts["reference"] == formulas.head_gradient(plan) == formulas.root_reduction(plan) == 0
    assert (
        memory.host_memory(dataclasses.replace(plan, offload=True), 0)["offloaded"] == 2 * 250 + 4 * 4 * 20
    )  # both ranks


def test_adapters_copy_their_input_into_their_own_precision_and_spare_the_frozen_layers():
    adapted = dataclasses.replace(TINY, adapter_params=20, adapter_inputs=64)  # q, k, v, o, gate, up of 8; down of 16
    in_bfloat16 = changed(sizes=adapted, weight_bytes=2, gathered_bytes=2)
    assert formulas.adapters_saved(in_bfloat16, 10) == 10 * (4 * 64 - 2 * (16 + 16))
    autocast = dataclasses.replace(in_bfloat16, autocast=True)
    assert formulas.adapters_saved(autocast, 10) == 10 * (2 * 64 - 2 * (16 + 16))
    assert formulas.adapters_saved(changed(sizes=adapted), 10) == 0  # all in float32: no copies
    batch = micro_batch(RUN)
    less = 2 * 200 * batch.tokens + 2 * 32 * 8 * batch.scored
    assert flops.spared_flops(in_bfloat16, batch) == less
    assert flops.spared_flops(RUN, batch) == 0


def test_a_layer_saves_two_norms_attention_and_the_mlp():
    # per row in float32: norms 2 * 8 * (4 + 4), their outputs 2 * 8 * 4, MLP 4 * 16 * 4
    # attention: q and output 8 each, k and v 4 each, all * 4, and 4 heads' log-sum-exp * 4
    assert formulas.layer_saved(RUN, 10) == 10 * (128 + 64 + 256 + 24 * 4 + 16)
    # bfloat16: halved, but the norms' float32 copies and the log-sum-exp
    half = changed(gathered_bytes=2)
    assert formulas.layer_saved(half, 10) == 10 * (2 * 8 * 8 + 32 + 128 + 48 + 16)


def test_checkpointing_keeps_the_input_of_each_layer():
    assert formulas.layers_saved(changed(gradient_checkpointing=True), 10) == 2 * 10 * 8 * 4
    assert formulas.layers_saved(RUN, 10) == 2 * formulas.layer_saved(RUN, 10)


def test_layer_inputs_in_host_memory_are_two_on_the_device():
    """One that a layer is computed from, and one on its way."""
    plan = changed(gradient_checkpointing=True, offload_checkpoints=True)
    assert formulas.layers_saved(plan, 10) == 2 * 10 * 8 * 4
    # two layers of 140 rows * 8 * 4 bytes, pinned as 8 KiB each, on both ranks
    assert memory.host_memory(plan, 0)["offloaded"] == 2 * 2 * 8192
    assert formulas.layers_saved(changed(offload_checkpoints=True), 10) == 2 * formulas.layer_saved(RUN, 10)


def test_layer_inputs_travel_beside_computing_and_moments_behind_it():
    plan = changed(gradient_checkpointing=True, offload_checkpoints=True, optimizer_offload=True)
    slow_host = dataclasses.replace(HARDWARE["H100"], host_bandwidth=1.0)
    efficiency = flops.Efficiency()
    update = flops.step_times(plan, slow_host, efficiency)["update"]
    inputs = flops.layer_inputs_s(plan, memory.micro_batch(plan), slow_host, efficiency)
    moments = flops.moments_s(plan, slow_host, efficiency)
    no_host = flops.step_times(changed(gradient_checkpointing=True), slow_host, efficiency)["update"]
    assert inputs > 100 * no_host
    assert update == pytest.approx(inputs + moments, rel=1e-2)
    assert moments == 2 * 2 * (4 * 250 / 2) / efficiency.bandwidth


def test_moments_in_host_memory_visit_the_device_one_weight_at_a_time():
    plan = changed(optimizer_offload=True, cuda=True, sizes=dataclasses.replace(TINY, vocabulary=20))
    assert formulas.optimizer_memory(plan) == 0
    assert formulas.optimizer_working_set(plan) == 3 * 4 * 8 * 20 / 2  # the embeddings, wider than the MLP; two shards
    assert memory.host_memory(plan, 0)["offloaded"] == 2 * (2 * 4 * 250 / 2)
    assert memory.host_memory(changed(offload=True, optimizer_offload=True), 0) == memory.host_memory(
        changed(offload=True), 0
    )


def test_a_step_of_adamw_makes_no_copies():
    """`foreach`, torch's own choice on a GPU, took the square roots of all second moments at once."""
    assert formulas.optimizer_working_set(changed(cuda=True)) == formulas.optimizer_working_set(RUN) == 0


def test_the_encoder_reads_so_many_temporal_patches_in_a_call():
    whole = formulas.encoder_activations(RUN)  # 320 patches in cells of 16, on one rank of two
    assert formulas.encoder_activations(changed(encoded_together=1)) == whole / 20
    assert formulas.encoder_activations(changed(encoded_together=99)) == whole


def test_moments_of_8_bits():
    plan = changed(moment_bytes=1 + 1 / 64, cuda=True)
    assert formulas.optimizer_memory(plan) == pytest.approx(formulas.optimizer_memory(RUN) * (1 + 1 / 64) / 4)
    assert formulas.optimizer_working_set(plan) == 0  # they change where they lie


def test_an_mlp_in_pieces_keeps_nothing_of_its_width():
    plan = changed(mlp_chunk_tokens=4)
    assert formulas.layer_saved(RUN, 10) - formulas.layer_saved(plan, 10) == 10 * 4 * 16 * 4
    assert formulas.layer_saved(plan, 4) == formulas.layer_saved(RUN, 4)  # no pieces
    # stream and the pieces' gradients, 10 * 8 each, and six tensors of a piece
    assert formulas.backward_working_set(plan, 10) == 2 * 10 * 8 * 4 + 10 * 8 * 4 + 4 * 6 * 16 * 4
    # stream, the MLP's input, its output in pieces and joined; three tensors of a piece
    assert formulas.forward_working_set(plan, 10) == 10 * 8 * 4 * (3 + 2) + 4 * 3 * 16 * 4
    batch = micro_batch(plan)
    assert flops.chunked_mlp_flops(plan, batch) == 2 * 6 * 8 * 16 * batch.tokens
    assert flops.chunked_mlp_flops(RUN, batch) == 0


def test_adapters_of_an_mlp_in_pieces_copy_a_piece_of_their_input():
    adapted = dataclasses.replace(TINY, adapter_params=20, adapter_inputs=64, adapter_mlp_inputs=32)
    plan = changed(sizes=adapted, weight_bytes=2, gathered_bytes=2, mlp_chunk_tokens=4)
    assert formulas.adapters_saved(plan, 10) == 10 * (4 * 32 - 2 * 8)
    without = dataclasses.replace(plan, sizes=TINY)
    more = formulas.backward_working_set(plan, 10) - formulas.backward_working_set(without, 10)
    assert more == 4 * (4 * 32 - 2 * (8 + 16))


def test_a_frozen_tower_is_kept_in_the_precision_of_computing():
    half = changed(gathered_bytes=2)
    assert formulas.frozen_encoder_memory(half) == 2 * 30
    assert formulas.feature_memory(half) == 2 * 2 * 80 * 8
    trains = dataclasses.replace(TINY, vision_encoder=dataclasses.replace(TINY.vision_encoder, trains=True))
    assert formulas.feature_memory(dataclasses.replace(half, sizes=trains)) == 4 * 2 * 80 * 8


def test_ranks_that_share_a_sequence_hold_all_rows_of_their_heads():
    plan = changed(sequence_parallel_size=2)  # 2 query heads and 1 key head of size 2 each, of 20 rows
    assert formulas.attention_saved(plan, 10) == 20 * ((2 + 1 + 1 + 2) * 2 * 4 + 4 * 2) + 10 * 8 * 4


def test_autocast_keeps_casts_of_all_layers_or_of_one():
    assert formulas.weight_casts(changed(autocast=True)) == 2 * 200
    assert formulas.weight_casts(changed(autocast=True, gradient_checkpointing=True)) == 2 * 100
    assert formulas.weight_casts(RUN) == 0


def test_keys_of_a_prompt_are_kept_once():
    assert formulas.kv_cache(RUN) == 2 * 2 * 4 * 4 * (2 * 100 + 2 * 4 * 10)
    # four ranks and two prompts: two completions each, of a prompt that each prefills
    four = changed(devices=4, sequence_parallel_size=4)
    assert formulas.kv_cache(four) == 2 * 2 * 4 * 4 * (100 + 2 * 10)


def test_a_prompt_is_prefilled_in_chunks():
    per_row = 2 * 8 * 4 + 8 * 4 + 3 * 16 * 4
    assert formulas.prefill_memory(RUN) == 200 * per_row  # two prompts of 100 in one chunk
    assert formulas.prefill_memory(changed(prefill_chunk_tokens=64)) == 64 * per_row


def test_decoding_holds_scores_of_own_tokens_and_one_output_per_tile_of_the_prompt():
    of_completion = 4 * 10 * (8 + 4) + 28 * 32
    assert formulas.decoding_memory(RUN) == 2 * 4 * (of_completion + 8 * (3 * 4 + 4))  # one tile
    long = changed(prompt_tokens=5000, max_tokens_per_micro_batch=6000)
    assert formulas.decoding_memory(long) == 2 * 4 * (of_completion + 2 * 8 * (3 * 4 + 4))


def test_what_completions_are_shown_is_read_and_encoded_but_neither_sampled_nor_scored():
    """6 of 10 tokens of each of 4 completions: 24 features more for a prompt, whose own are 80."""
    shown = changed(observed_tokens=6)
    batch, usual = micro_batch(shown), micro_batch(RUN)
    assert (batch.tokens, batch.scored) == (usual.tokens, usual.scored * 4 // 10)
    assert flops.forward_flops(shown, batch) == flops.forward_flops(RUN, usual)
    assert flops.head_flops(shown, batch) == flops.head_flops(RUN, usual) * 4 / 10
    assert flops.decode_flops(RUN) - flops.decode_flops(shown) == 2 * 32 * TINY.hidden * 6
    assert formulas.feature_memory(shown) == formulas.feature_memory(RUN) * (80 + 24) / 80
    operations, before = flops.step_flops(shown), flops.step_flops(RUN)
    assert operations["encode"] == pytest.approx(before["encode"] * (80 + 24) / 80)
    assert operations["prefill"] == before["prefill"]
    assert formulas.kv_cache(shown) == formulas.kv_cache(RUN)
    text = dataclasses.replace(shown, media_tokens=0)
    assert text.crop_tokens == 0
    assert flops.step_flops(text)["encode"] == 0


def test_logits_come_in_chunks(monkeypatch):
    monkeypatch.setattr(formulas, "MAX_LOGITS", 64)  # two rows
    assert formulas.logit_memory(RUN, 40, backward=True) == 2 * 32 * 16 + 40 * 8 * 4
    half = changed(gathered_bytes=2)
    for backward, copies in ((False, 4), (True, 8)):  # of a head of 32 x 8 that is computed in float32
        without = formulas.logit_memory(half, 40, backward=backward)
        with_copy = formulas.logit_memory(dataclasses.replace(half, fp32_lm_head=True), 40, backward=backward)
        assert with_copy == without + copies * 32 * 8
    assert formulas.logit_memory(changed(fp32_lm_head=True), 40, backward=True) == 2 * 32 * 16 + 40 * 8 * 4


def test_micro_batches_are_those_of_pack():
    assert dataclasses.astuple(micro_batch(RUN)) == (1, 4, 2, 140, 40)  # one group each
    assert dataclasses.astuple(micro_batch(changed(max_tokens_per_micro_batch=300))) == (2, 4, 1, 280, 80)
    assert dataclasses.astuple(micro_batch(changed(max_tokens_per_micro_batch=125))) == (1, 2, 4, 120, 20)  # split
    assert micro_batch(changed(sequence_parallel_size=2, max_tokens_per_micro_batch=70)).tokens == 140
    with pytest.raises(ValueError, match=r"100 tokens with one completion of 10 .* raise model.max_tokens_per_micro"):
        micro_batch(changed(max_tokens_per_micro_batch=100))


def test_operations_count_the_prompt_once_per_group():
    batch = micro_batch(RUN)
    pairs = 100**2 + 4 * (2 * 100 * 10 + 10**2)
    assert flops.forward_flops(RUN, batch) == 2 * 200 * 140 + 2 * 2 * 8 * pairs
    assert flops.head_flops(RUN, batch) == 2 * 32 * 8 * 40
    # 320 patches: 2 * 30 each, attention in windows of 4 and in cells of 16
    assert flops.encode_flops(RUN) == 320 * (60 + 4 * 4 * (4 + 16))


# ---- released models ----


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("Qwen/Qwen2.5-VL-7B-Instruct", 8_292_166_656),
        ("Qwen/Qwen2.5-VL-3B-Instruct", 3_754_622_976),
        ("Qwen/Qwen2.5-7B", 7_615_616_512),
        ("Qwen/Qwen2.5-1.5B-Instruct", 1_543_714_304),
        ("Qwen/Qwen3-1.7B", 1_720_574_976),
        ("meta-llama/Llama-3.2-1B-Instruct", 1_235_814_400),
        ("Qwen/Qwen3-VL-4B-Instruct", 4_437_815_808),
        ("Qwen/Qwen3-VL-8B-Instruct", 8_767_123_696),
        ("OpenGVLab/InternVL3_5-8B-HF", 8_528_318_464),
        # Less the head for further tokens, of 243,290,624, 424,699,392 and 844,640,768: 9,653,104,368 and so on.
        ("Qwen/Qwen3.5-9B", 9_409_813_744),
        ("Qwen/Qwen3.5-27B", 27_356_728_560),
        ("Qwen/Qwen3.5-35B-A3B", 35_107_181_936),
    ],
)
def test_shipped_shapes_have_the_published_number_of_parameters(name, params):
    readers = {
        "Intern": InternVLFamily,
        "Qwen3.5": Qwen3_5Family,
        "Qwen3-VL": Qwen3VLFamily,
        "VL": Qwen2_5_VLFamily,
        "Llama": LlamaFamily,
        "": TextFamily,
    }
    kind = next(kind for part, kind in readers.items() if part in name)
    family = shapes.find_config(kind(name))
    sizes = ModelSizes.from_family(family)
    assert sizes.text_params + (sizes.vision_encoder.params if sizes.vision_encoder else 0) == params
    assert sizes.head_norms == ("Qwen3" in name or "Intern" in name)


def test_an_unknown_model_is_an_error_that_names_the_shipped_ones(tmp_path, monkeypatch):
    def unreachable(self, source):
        raise OSError("no network")

    monkeypatch.setattr(TextFamily, "read_config", unreachable)
    with pytest.raises(ValueError, match=r"'Nobody/Nothing'.*Qwen/Qwen3-1.7B.*put its config.json into"):
        shapes.find_config(TextFamily("Nobody/Nothing"))


def test_3600_frames_are_256k_tokens_and_fit_one_node_of_80_gb_with_8_ranks_but_not_with_one(seven_b):
    assert seven_b.media_tokens == 1800 * 144
    eight, one = with_needed_budget(seven_b), with_needed_budget(dataclasses.replace(seven_b, sequence_parallel_size=1))
    available = HARDWARE["H100"].memory_bytes
    found = memory.fit_verdict(eight, available)
    assert found.fits
    assert found.text.startswith("fits: needs ")
    found = memory.fit_verdict(one, available)
    assert not found.fits
    assert re.match(r"does not fit: needs .* activations .*init_args.sequence_parallel_size=4", found.text)


def test_the_rollout_of_256k_tokens_is_bounded_by_the_chunk_not_by_the_prompt(seven_b):
    chunked, whole = with_needed_budget(seven_b), dataclasses.replace(seven_b, prefill_chunk_tokens=1 << 20)
    assert formulas.prefill_memory(whole) > 30 * memory.GIB
    assert formulas.prefill_memory(chunked) < 3 * memory.GIB
    assert formulas.decoding_memory(chunked) < 0.1 * memory.GIB


def test_28_heads_on_8_devices_work(seven_b):
    heads = seven_b.heads
    assert (heads.per_rank * heads.size, heads.per_rank) == (4, 1)  # 32 query heads, 4 of them padding
    assert formulas.attention_saved(seven_b, 1000) > 0


def test_memory_grows_with_the_prompt_and_the_longest_video_is_the_last_that_fits():
    def with_frames(plan, frames):
        tokens = 8 * -(-frames // 2)
        return with_needed_budget(
            dataclasses.replace(plan, frames=frames, media_tokens=tokens, prompt_tokens=tokens + 20)
        )

    run = changed(max_tokens_per_micro_batch=1)  # raised to one group: a larger one would hold more of short prompts
    needs = [memory.estimate_memory(with_frames(run, frames)).peak for frames in (1, 2, 8, 64, 512, 4096)]
    assert needs == sorted(needs)
    available = needs[3] + 1
    longest = memory.largest_frames(run, available, with_frames)
    assert memory.estimate_memory(with_frames(run, longest)).peak <= available
    assert memory.estimate_memory(with_frames(run, longest + 2)).peak > available
    assert memory.largest_frames(run, 1, with_frames) == 0


def test_the_remedy_makes_it_fit_with_as_little_as_possible():
    plan = changed(devices=8, prompt_tokens=4000, media_tokens=0, max_tokens_per_micro_batch=5000)
    checkpointed = dataclasses.replace(plan, gradient_checkpointing=True)
    between = (memory.estimate_memory(plan).peak + memory.estimate_memory(checkpointed).peak) / 2
    assert memory.find_remedies(plan, between) == ["model.family.init_args.gradient_checkpointing=true"]
    assert len(memory.find_remedies(plan, memory.estimate_memory(plan).peak / 6)) > 1


def test_hardware_is_named_or_customised():
    assert find_hardware("A100", memory_gib=40, devices=4) == dataclasses.replace(
        HARDWARE["A100"], memory_gib=40, devices=4
    )
    with pytest.raises(ValueError, match=r"--hardware must be one of A100, H100, H200, got 'TPU'"):
        find_hardware("TPU")
    with pytest.raises(ValueError, match=r"--memory_gib must be positive, got 0"):
        find_hardware("A100", memory_gib=0)


def test_more_ranks_per_sequence_shorten_a_step(seven_b):
    def seconds(sp):
        plan = with_needed_budget(dataclasses.replace(seven_b, sequence_parallel_size=sp))
        return flops.step_times(plan, HARDWARE["H100"], flops.Efficiency())["step"]

    assert seconds(8) < seconds(4) < seconds(1)
