"""What vLLM takes of the trainer's devices, worked out by hand."""

import dataclasses

import pytest

from longrl.planning import memory, vllm_formulas
from longrl.planning.inputs import VLLMShare
from tests.planning.test_formulas import RUN, TINY

SHARE = VLLMShare(device_bytes=4e9, gpu_memory_utilization=0.5, max_num_seqs=8)
BESIDE = dataclasses.replace(RUN, vllm=SHARE, gathered_bytes=2, eval_prompts=2)


def changed(**share):
    return dataclasses.replace(BESIDE, vllm=dataclasses.replace(SHARE, **share))


def test_weights_are_the_text_stacks_in_the_precision_of_products():
    assert vllm_formulas.engine_weights(BESIDE) == 2 * 250
    assert vllm_formulas.engine_weights(changed(ranks=2)) == 2 * 250 / 2
    deeper = dataclasses.replace(BESIDE, sizes=dataclasses.replace(TINY, feature_size=16))  # Qwen3-VL's features
    assert vllm_formulas.engine_weights(deeper) == 2 * (250 + 30)


def test_activations_are_those_of_the_largest_batch_or_of_sampling():
    assert vllm_formulas.engine_activations(BESIDE) == 8192 * (3 * 8 + 3 * 16) * 2
    assert vllm_formulas.engine_activations(changed(ranks=2)) == 8192 * (3 * 8 + 3 * 16 / 2) * 2
    assert vllm_formulas.engine_activations(changed(max_num_seqs=1 << 20)) == 12 * 32 * (1 << 20)


def test_a_prompt_with_media_goes_into_one_batch():
    """vLLM keeps features of as many tokens as its largest batch has."""
    assert vllm_formulas.batched_tokens(BESIDE) == 8192
    hour = dataclasses.replace(BESIDE, prompt_tokens=260_000)
    assert vllm_formulas.batched_tokens(hour) == 260_000 + BESIDE.completion_tokens
    assert vllm_formulas.batched_tokens(dataclasses.replace(hour, media_tokens=0)) == 16_384
    in_chunks = dataclasses.replace(SHARE, media_enter_whole=False)
    assert vllm_formulas.batched_tokens(dataclasses.replace(hour, vllm=in_chunks)) == 16_384
    assert vllm_formulas.batched_tokens(changed(max_model_len=50_010)) == 50_010


def test_the_share_is_of_the_whole_device_and_the_cache_its_rest():
    weights, activations, graphs = 2 * 250, 8192 * 72 * 2, 1 << 30
    assert vllm_formulas.awake_memory(BESIDE) == 2e9
    assert vllm_formulas.engine_cache(BESIDE) == 2e9 - weights - activations - graphs
    assert vllm_formulas.engine_cache(changed(enforce_eager=True)) == 2e9 - weights - activations
    assert vllm_formulas.awake_memory(changed(kv_cache_bytes=5e8)) == weights + activations + graphs + 5e8


def test_asleep_it_keeps_its_graphs_and_what_they_write():
    assert vllm_formulas.asleep_memory(BESIDE) == (1 << 30) + 8 * 8 * 32
    assert vllm_formulas.asleep_memory(changed(sleeps=False)) == 2e9


def test_keys_and_values_are_split_over_the_ranks_that_have_heads():
    assert vllm_formulas.cache_per_token(BESIDE) == 2 * 2 * 4 * 2
    assert vllm_formulas.cache_per_token(changed(ranks=2)) == 2 * 2 * 4 * 2 / 2
    assert vllm_formulas.cache_per_token(changed(ranks=4)) == 2 * 2 * 4 * 2 / 2  # two key heads


def test_vllm_does_not_start_without_room_for_the_longest_sequence():
    assert vllm_formulas.cache_shortfall(BESIDE) == vllm_formulas.cache_shortfall(RUN) == 0
    small = changed(gpu_memory_utilization=0.26)
    assert vllm_formulas.cache_shortfall(small) == 32 * 110 - vllm_formulas.engine_cache(small) > 0
    found = memory.fit_verdict(small, 4e9)
    assert not found.fits
    assert "for keys and values of 110 tokens" in found.text
    assert "rollout.engine.init_args.gpu_memory_utilization=0.27" in found.text


def test_it_wakes_up_twice():
    """First its weights, while a bucket is there whole, and of it a tensor in float32 and bfloat16; then its cache."""
    phases = memory.estimate_memory(BESIDE).phases
    asleep = vllm_formulas.asleep_memory(BESIDE)
    assert phases["sync"]["vLLM"] == asleep + 2 * 250
    assert phases["sync"]["gathered weights"] == 8 * 32 * (4 + 2)
    assert phases["generate"]["vLLM"] == phases["validate"]["vLLM"] == 2e9
    assert phases["update"]["vLLM"] == phases["encode"]["vLLM"] == asleep
    assert "rollout" not in phases


@pytest.mark.parametrize(
    ("bucket", "held"),
    [(512, 8 * 32 * 4), (4096, 4096 + 8 * 32 * 4), (1 << 20, 2050 * 4 + 8 * 32 * 4)],
)
def test_a_sync_holds_a_bucket_and_a_tensor_of_it(bucket, held):
    """A tensor larger than a bucket is one itself; a bucket holds no more than the model."""
    sizes = dataclasses.replace(RUN.sizes, layer_params=(1000, 1000))
    plan = dataclasses.replace(BESIDE, bucket_bytes=bucket, sizes=sizes)
    assert vllm_formulas.handed_over(plan) == held + 8 * 32 * 2


def test_resampling_encodes_while_it_is_awake():
    plan = dataclasses.replace(BESIDE, resamples=True)
    assert memory.estimate_memory(plan).phases["encode"]["vLLM"] == 2e9


def test_an_engine_of_several_ranks_has_their_prompts():
    plan = dataclasses.replace(changed(ranks=2), devices=4, sequence_parallel_size=4)
    assert (plan.num_engines, plan.local_prompts, plan.rank_completions) == (2, 1, 4)
    alone = dataclasses.replace(plan, vllm=SHARE)
    assert (alone.num_engines, alone.local_prompts, alone.rank_completions) == (4, 1, 2)


def test_a_server_needs_a_tensor_at_a_time():
    phases = memory.estimate_memory(dataclasses.replace(RUN, generates_elsewhere=True)).phases
    assert phases["sync"]["gathered weights"] == 4 * 8 * 32
    assert not {"rollout", "generate"} & set(phases)


def test_a_run_without_vllm_has_no_share():
    with pytest.raises(ValueError, match="no vLLM on its devices"):
        vllm_formulas.awake_memory(RUN)
