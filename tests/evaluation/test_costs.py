"""What a question costs: operations by the text stack's formulas, counts of lines of any release, and means."""

import dataclasses

import pytest
import torch

from longrl.evaluation.costs import MEASURED, OPERATIONS, ModelCost, costs_of, mean_costs, measured
from longrl.models.step_flops import GroupTokens, TextCost
from longrl.types import Completion, Media, Prompt, ReadingTime, Row
from tests.tiny import qwen3_5_text_family, vl_family


def prompt(*media, tokens=40, reading=None):
    ids = torch.zeros(tokens, dtype=torch.int64)
    return Prompt("0", ids, ids[None], media, Row("0", "?", "A"), reading=reading)


def completion(tokens, shown=0, media=()):
    sampled = torch.ones(tokens, dtype=torch.bool)
    sampled[:shown] = False
    ids = torch.zeros(tokens, dtype=torch.int64)
    logprobs = torch.zeros(tokens - shown)
    return Completion(ids, logprobs=logprobs, text="", finish_reason="stop", sampled=sampled, media=media)


def video(key, patches=4):
    return Media("video", torch.zeros(0), (patches, 8, 8), 1.0, (), key)


@pytest.fixture(scope="module")
def cost():
    family = vl_family()
    return ModelCost.of(family, family.build())


def test_prefill_and_generating_make_up_one_pass_over_all_tokens(cost):
    found = cost.of_answers(prompt(), [completion(7), completion(5, shown=2)])
    assert found["encode_flops"] == 0
    assert found["prefill_flops"] == cost.text.forward_flops([GroupTokens(40, ())])
    whole = cost.text.forward_flops([GroupTokens(40, [7, 5], 2)])
    assert found["prefill_flops"] + found["generate_flops"] == pytest.approx(whole)


def test_linear_layers_read_what_is_generated_row_by_row():
    family = qwen3_5_text_family()
    model = family.build()
    cost = ModelCost.of(family, model)
    delta = family.planning_sizes()[0].delta_nets
    one_by_one = dataclasses.replace(TextCost.of(family, model), rule_flops=delta.num_layers * delta.rule_flops(1))
    found = cost.of_answers(prompt(), [completion(6)])
    alone = one_by_one.forward_flops([GroupTokens(40, ())])
    assert found["generate_flops"] == one_by_one.forward_flops([GroupTokens(40, [6])]) - alone


def test_a_medium_is_encoded_once_also_where_frames_are_shuffled_or_tools_show_it_again(cost):
    once = cost.of_answers(prompt(video("a")), [completion(3)])["encode_flops"]
    shuffled = dataclasses.replace(video("a, shuffled"), cell_order=(1, 0, 3, 2), key_in_order="a")
    again = cost.of_answers(prompt(video("a"), shuffled), [completion(3, media=(video("a"),))])["encode_flops"]
    both = cost.of_answers(prompt(video("a")), [completion(3, media=(video("b"),))])["encode_flops"]
    assert again == once > 0
    assert both == 2 * once


def test_what_is_measured_says_none_where_nobody_measured(cost):
    assert measured(prompt()) == dict.fromkeys(MEASURED)
    read = prompt(video("a"), reading=ReadingTime(0.0, 2.5))
    found = measured(read, cost, [])
    assert found == {"decode_s": 2.5, "decode_spent_s": 0.0, "encode_spent_flops": 0}


LINE = {
    "num_frames": 8, "frame_indices": [[0] * 8], "num_prompt_tokens": 90, "num_media_tokens": 32,
    "num_completion_tokens": [5, 7],
}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "blind", "wanted"),
    [
        ({}, False, (8, 90, 32, 12)),
        ({"num_frames": 0, "frame_indices": [], "num_media_tokens": 0}, False, (0, 90, 0, 12)),
        ({"num_frames": 0, "frame_indices": [], "num_media_tokens": None}, True, (0, 90, None, 12)),
        ({"num_frames": 0, "frame_indices": [], "num_media_tokens": None}, False, (None, 90, None, 12)),
        (
            {"num_prompt_tokens": 0, "num_completion_tokens": [0, 0], "num_media_tokens": None}, False,
            (8, None, None, None),
        ),
    ],
    ids=["of an earlier release", "text alone", "a server, blind", "a server that samples", "a server without usage"],
)  # fmt: skip
def test_a_line_says_what_it_knows(changed, blind, wanted):
    found = costs_of(LINE | changed, blind)
    assert tuple(found[name] for name in ("frames", "prompt_tokens", "media_tokens", "completion_tokens")) == wanted
    assert [found[name] for name in OPERATIONS] == [None] * 3


def test_means_say_of_how_many_questions():
    found = mean_costs([{"a": 1.0, "b": None}, {"a": None, "b": None}, {"a": 4.0, "b": None}])
    assert found == {"a": {"mean": 2.5, "total": 5.0, "n": 2}, "b": None}
