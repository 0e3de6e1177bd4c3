"""What an evaluation says of its protocol: the second score, and numbers of frames, budget and prompts."""

import hashlib
import json

import pytest

from longrl.evaluation.protocol import list_protocol_facts
from longrl.io.jsonl import read_jsonl
from tests.evaluation.scripted import command, evaluated, records

LONG_RL = (
    "--protocol.name=Long-RL", "--protocol.rule=longrl.evaluation.published_rules.long_rl_exact_letter",
    "--protocol.rule_name=exact letter of Long-RL",
)  # fmt: skip


def sha256(text):
    return hashlib.sha256(text.encode()).hexdigest()


def test_a_protocols_own_rule_is_a_second_score_everywhere(tmp_path, capsys):
    """Of `Mixed`'s four answers one has the right letter alone in its tag, another says it in a sentence."""
    command(tmp_path, *LONG_RL, policy="Mixed")
    printed = capsys.readouterr().out
    assert "protocol: exact letter of Long-RL" in printed
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["protocol"] == {
        "name": "Long-RL", "source": None, "rule": "longrl.evaluation.published_rules.long_rl_exact_letter",
        "rule_name": "exact letter of Long-RL",
    }  # fmt: skip
    video = results["conditions"]["video"]
    scores = [video[name]["overall"]["accuracy"] for name in ("scores", "lenient_scores", "protocol_scores")]
    assert scores == [0.25, 0.5, 0.25]
    assert set(video["protocol_scores"]) == {"overall", *(record["problem_type"] for record in records())}
    lines = read_jsonl(tmp_path / "samples.jsonl")
    assert [line["correct_by_rule"] for line in lines] == [[True], [False], [False], [False]] * 2
    page = (tmp_path / "report.html").read_text()
    assert "exact letter of Long-RL" in page
    assert "By the protocol&#39;s own rule" in page


def test_a_users_own_rule_is_named_by_its_function(tmp_path):
    rule = tmp_path / "mine.py"
    rule.write_text("def length_rule(completion, row):\n    return float(len(completion.text) > 25)\n")
    results = evaluated(tmp_path / "out", f"--protocol.rule={rule}:length_rule", policy="Mixed")
    assert results["protocol"]["rule_name"] == "length_rule"
    assert results["conditions"]["video"]["protocol_scores"]["overall"]["accuracy"] == 0.5


def test_without_a_rule_there_is_no_second_score(tmp_path):
    results = evaluated(tmp_path)
    assert results["protocol"] == {"name": "longrl", "source": None, "rule": None, "rule_name": None}
    assert results["conditions"]["video"]["protocol_scores"] == {}
    assert "own rule" not in (tmp_path / "report.html").read_text()


def test_a_rule_that_is_not_there_ends_before_anything_is_asked(tmp_path):
    log = tmp_path / "asked"
    with pytest.raises(ValueError, match=r"protocol\.rule .*exact_letters"):
        evaluated(tmp_path / "out", "--protocol.rule=longrl.evaluation.published_rules.exact_letters", log=str(log))
    assert not log.exists()


def test_frames_budget_and_prompts_are_stated_as_they_were(tmp_path, capsys):
    command(tmp_path, "--data.max_prompt_tokens=9000", "--blind_baseline=true", "--data.video.max_frames=8")
    results = json.loads((tmp_path / "results.json").read_text())
    lines = read_jsonl(tmp_path / "samples.jsonl")
    shown = results["conditions"]["video"]["shown"]
    assert {line["num_frames"] for line in lines if line["condition"] == "video"} == {8}
    assert shown["frames"] == {"min": 8, "median": 8, "max": 8}
    assert shown["prompt_tokens"] == {"min": 10, "median": 10, "max": 10}
    assert shown["media_tokens"] is None
    template = results["conditions"]["video"]["reading"]["question_template"]
    assert shown["template_sha256"] == sha256(template)
    assert (shown["prompt_of"], shown["prompt_sha256"]) == (lines[0]["id"], sha256(lines[0]["input"]))
    assert results["conditions"]["no video"]["shown"]["frames"] is None
    assert results["budget"] == {"max_prompt_tokens": 9000, "max_completion_tokens": 1024}
    facts = list_protocol_facts(results)
    assert facts["protocol"] == "longrl"
    assert facts["frames of a question"].startswith("video: 8 (fps 1.0, ")
    assert "moments middles" in facts["frames of a question"]
    assert facts["budget"] == "max_prompt_tokens 9000, max_completion_tokens 1024"
    printed, page = capsys.readouterr().out, (tmp_path / "report.html").read_text()
    for name, text in facts.items():
        assert f"{name}: {text}" in printed
        assert text in page
