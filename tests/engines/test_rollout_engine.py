from types import SimpleNamespace

import pytest

from longrl.engines.hf import HFEngine
from longrl.engines.rollout_engine import RolloutEngine, sampling_ids
from longrl.engines.vllm import VLLMEngine
from longrl.strategies.axis import SINGLE_RANK


class Silent(RolloutEngine):
    def sync(self, family, model, step):
        pass

    def generate(self, *args, **options):
        return []


def test_options_that_decide_answers_are_part_of_an_engines_identity_and_others_are_not():
    assert HFEngine(max_sequences=3, prefill_chunk_tokens=8).identity() == {"prefill_chunk_tokens": 8}
    assert VLLMEngine(max_num_seqs=3, sleep=False).identity() == VLLMEngine().identity()
    assert VLLMEngine(enforce_eager=True).identity() != VLLMEngine().identity()


def test_an_engine_that_does_not_tell_its_identity_cannot_be_evaluated_but_trains():
    assert Silent().max_length() is None
    with pytest.raises(ValueError, match=r"which options of Silent decide its answers; define its `identity`"):
        Silent().identity()


def test_vllm_is_one_of_the_libraries_that_compute_where_it_does():
    assert HFEngine().library_versions().keys() == {"torch", "transformers"}
    assert VLLMEngine().library_versions().keys() == {"torch", "transformers", "vllm"}


def test_copies_of_a_prompt_have_the_same_ids_over_any_number_of_ranks():
    stream = ["a", "b", "b", "a", "c", "a"]
    wanted = ["a", "b", "b (copy 1)", "a (copy 1)", "c", "a (copy 2)"]
    assert sampling_ids(stream, SINGLE_RANK) == wanted
    for size in (2, 3, 4):
        shares = [stream[rank::size] for rank in range(size)]
        for rank, share in enumerate(shares):
            axis = SimpleNamespace(rank=rank, gather=lambda own, shares=shares: shares)
            assert sampling_ids(share, axis) == wanted[rank::size]
