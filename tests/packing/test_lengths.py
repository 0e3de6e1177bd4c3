import pytest
import torch

from longrl.packing.lengths import check_lengths, length_problem
from longrl.types import Prompt, SamplingParams
from tests.tiny import row


def test_what_fits_is_no_problem():
    assert length_problem("it", 7, 3, limit=10, option="limit") is None
    assert length_problem("it", 1 << 40, limit=None, option="limit") is None
    assert length_problem("it", 30, 10, limit=10, option="limit", ranks=4) is None


def test_a_problem_tells_lengths_limit_option_and_remedy():
    assert length_problem("prompt 'a'", 7, 5, limit=10, option="max_model_len of VLLMEngine") == (
        "prompt 'a' has 7 tokens, 12 with its longest completion, above 10, the max_model_len of VLLMEngine; raise "
        "that to 12, or lower data.max_prompt_tokens or sampling.max_completion_tokens"
    )
    assert length_problem("its prompt", 9, limit=8, option="data.max_prompt_tokens", remedy="take fewer frames") == (
        "its prompt has 9 tokens, above 8, the data.max_prompt_tokens; raise that to 9, or take fewer frames"
    )


def test_ranks_that_share_a_sequence_need_less_each():
    problem = length_problem("it", 30, 11, limit=10, option="limit", ranks=4)
    assert "above 10 on each of 4 ranks" in problem
    assert "raise that to 11," in problem


def test_an_engine_refuses_the_first_prompt_that_is_too_long():
    prompts = [
        Prompt(str(tokens), torch.zeros(tokens, dtype=torch.int64), torch.zeros(3, tokens), (), row("p"))
        for tokens in (4, 6)
    ]
    sampling = SamplingParams(num_generations=1, max_completion_tokens=5)
    check_lengths(prompts, sampling, limit=11, option="limit")
    with pytest.raises(ValueError, match="prompt '6' has 6 tokens"):
        check_lengths(prompts, sampling, limit=10, option="limit")
