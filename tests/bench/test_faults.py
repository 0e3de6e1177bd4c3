"""The fault table in its quick form: every fault ends as the documents say."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "bench"))

from fault_cases.fault import Fault, Outcome, try_out
from faults import all_faults

FAULTS = all_faults()


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault.quick], ids=lambda fault: fault.fault)
def test_a_fault_ends_as_documented(fault, tmp_path):
    row = try_out(fault, tmp_path)
    assert row["as_documented"], row


def test_rows_have_the_promised_fields(tmp_path):
    row = try_out(Fault("a", "b", lambda folder: Outcome("seen it", 3, "all"), 3, "^seen"), tmp_path)
    fields = ["kind", "fault", "seen", "exit_code", "lost_steps", "ended_s", "kept", "as_documented"]
    assert list(row) == fields
    assert row["as_documented"] is True


@pytest.mark.parametrize("outcome", [Outcome("seen it", 0, ""), Outcome("else", 3, ""), Outcome("seen it", 3, "", 2)])
def test_another_exit_code_message_or_more_lost_steps_are_not_as_documented(tmp_path, outcome):
    row = try_out(Fault("a", "b", lambda folder: outcome, 3, "^seen", lost_steps=1), tmp_path)
    assert row["as_documented"] is False


def test_no_two_rows_are_of_one_name():
    names = [fault.fault for fault in FAULTS]
    assert len(set(names)) == len(names)
