"""Rewards of turns, worked out by hand."""

import pytest
import torch

from longrl.rewards import Grounding, used_tools, well_formed_calls
from longrl.turns import ToolCall, Turn
from longrl.types import Completion, Row

NONE = torch.zeros(0)


def completion(*calls):
    turns = [Turn("assistant", "I look.", 4), Turn("tool", "...", 9, calls), Turn("assistant", "A", 1)]
    return Completion(NONE, NONE, "A", "stop", turns=tuple(turns))


def crop(start_s, stop_s, error=None, name="crop_video"):
    return ToolCall(name, {}, error, 0.1, None if error else (start_s, stop_s))


def row(answer="A", task="multiple_choice", **metadata):
    return Row("r", "What?", answer, task=task, metadata=metadata)


NO_TURNS = Completion(NONE, NONE, "A", "stop")
NO_CALLS = Completion(NONE, NONE, "A", "stop", turns=(Turn("assistant", "A", 1),))
FAILED = ToolCall("", error="it must be JSON")


def test_use_of_tools_is_a_call_that_was_answered():
    assert used_tools(completion(crop(1, 2)), row()) == 1.0
    assert used_tools(completion(FAILED, crop(1, 2)), row()) == 1.0
    assert used_tools(completion(FAILED), row()) == 0.0
    assert used_tools(NO_CALLS, row()) == 0.0
    assert used_tools(NO_TURNS, row()) is None


def test_the_form_of_calls_is_the_share_of_those_without_an_error():
    assert well_formed_calls(completion(crop(1, 2), FAILED, crop(3, 4), FAILED), row()) == 0.5
    assert well_formed_calls(completion(FAILED), row()) == 0.0
    assert well_formed_calls(NO_CALLS, row()) == 1.0
    assert well_formed_calls(NO_TURNS, row()) is None


@pytest.mark.parametrize(
    ("calls", "value"),
    [
        ([crop(10, 20)], 5 / 15),
        ([crop(0, 5), crop(15, 25)], 1.0),
        ([crop(15, 25), crop(0, 5)], 0.0),
        ([crop(15, 25), crop(0, 5, error="no")], 1.0),
        ([crop(0, 100)], 0.1),
        ([crop(20, 20, name="zoom")], 0.0),
        ([FAILED], 0.0),
        ([], 0.0),
    ],
)
def test_grounding_is_the_overlap_of_the_last_part_that_was_shown(calls, value):
    assert Grounding()(completion(*calls), row(evidence_s=[15, 25])) == pytest.approx(value)


def test_the_true_part_may_be_several_or_the_answer():
    shown = completion(crop(0, 10))
    assert Grounding()(shown, row(evidence_s=[[0, 2], [8, 12]])) == pytest.approx(4 / 12)
    assert Grounding("place")(shown, row(place=(0.0, 5.0))) == 0.5
    assert Grounding()(shown, row("0 to 5 s", "temporal_iou")) == 0.5
    assert Grounding()(shown, row()) is None
    assert Grounding()(NO_TURNS, row(evidence_s=[0, 5])) is None
    assert Grounding(tools=("zoom",))(shown, row(evidence_s=[0, 5])) == 0.0
    assert Grounding(widest_s=9)(shown, row(evidence_s=[0, 10])) == 0.0


@pytest.mark.parametrize("given", [[5, 2], [1], "12", ["a", "b"], [[1, 2], [3]], 7, [-1, 2], {}])
def test_metadata_that_hold_no_seconds_are_an_error(given):
    with pytest.raises(ValueError, match=r"row 'r': metadata\['evidence_s'\] must be two increasing seconds"):
        Grounding()(completion(crop(1, 2)), row(evidence_s=given))
