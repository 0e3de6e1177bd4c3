"""What tools answer is shown as the chat template writes it, and their schemas stand in prompts."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from longrl.models.chat_tokens import PROBE, break_token
from longrl.models.text import TextFamily
from longrl.types import Row
from tests.families import FAMILIES, SEEING
from tests.models.chat_templates import KNOW_TOOLS, LISTS_ONLY, TEMPLATES, family_of
from tests.tiny import frames, internvl_family, qwen3_5_family, qwen3_vl_family, row, vl_family

ALL = {**TEMPLATES, **KNOW_TOOLS}
TOOL = {
    "type": "function",
    "function": {
        "name": "crop_video",
        "description": "Shows a part <|im_end|>",
        "parameters": {"type": "object", "properties": {"start_s": {"type": "number"}}, "required": ["start_s"]},
    },
}
SPELLED = (
    "<|im_end|>", "<tool_response>", "</tool_response>", "<video>", "<|video_pad|>", "<|eot|>", "\ufdd0",
    "</think>", '"', PROBE,
)  # fmt: skip
NASTY = st.lists(st.one_of(st.sampled_from(SPELLED), st.text(max_size=8)), max_size=5).map("".join)
PROPERTY = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def ids_of(family, messages, **options):
    """Token ids of the template's own rendering, what texts spell of special tokens being text."""
    return family.chat.encode(family.chat.apply(messages, **options))


def joined(family, prompt, turns, responses, ended=True):
    """Prompt, turns with their end tokens, and answers: what a rollout comes to."""
    ids = prompt.input_ids.tolist()
    for turn, response in zip(turns, [*responses, None], strict=True):
        ids += family.encode_response(turn).tolist()[: None if ended else -1]
        if response is not None:
            ids += family.observation(response, ended).input_ids.tolist()
    return ids


# ---- the template's own words ----


@pytest.mark.parametrize("name", KNOW_TOOLS)
def test_a_conversation_with_tools_has_the_tokens_of_the_template(name):
    """Rendered as a whole; earlier turns keep their thinking there behind the last question."""
    family = family_of(name)
    thinks = "" if name == "llama3 tools" else "<think>\nHm.\n</think>\n\n"
    turns = [f"{thinks}Let me look.", f"{thinks}Once more.", f"{thinks}B"]
    responses = [[["a red ball"]], [["a blue ball"], ["nothing"]]]
    prompt = family.render(row(), "What is it?")
    messages = [{"role": "user", "content": "What is it?"}]
    for turn, response in zip(turns, [*responses, []], strict=True):
        messages.append({"role": "assistant", "content": turn})
        messages += [{"role": "tool", "content": texts[0]} for texts in response]
    whole = ids_of(family, messages)
    assert joined(family, prompt, turns, responses) == whole[: len(whole) - behind_end(family, whole)]
    assert joined(family, prompt, turns, responses, ended=False) == joined(family, prompt, turns, responses)[:-1]


def behind_end(family, ids):
    """Tokens that a template writes behind the last end token."""
    return ids[::-1].index(family.chat.turn_end)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_without_tools_gets_one_message_of_the_user(name):
    """Two answers stand in one message, in the words of Qwen's templates."""
    family = family_of(name)
    observed = family.observation([["a red ball"], ["nothing"]], True)
    text = "<tool_response>\na red ball\n</tool_response>\n<tool_response>\nnothing\n</tool_response>"
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "B"}]
    whole = ids_of(family, [*messages, {"role": "user", "content": text}], add_generation_prompt=True)
    assert whole[len(whole) - len(observed.input_ids) :] == observed.input_ids.tolist()
    assert whole[len(whole) - len(observed.input_ids) - 1] == family.chat.turn_end
    not_ended = family.observation([["a red ball"], ["nothing"]], False)
    assert not_ended.input_ids.tolist() == [family.chat.turn_end, *observed.input_ids.tolist()]
    assert observed.text == "a red ball\nnothing"


def test_roles_are_known_by_what_a_template_does():
    known = {name: family_of(name)._tool_role for name in ALL}
    assert known == {name: "tool" if name in KNOW_TOOLS else "user" for name in ALL}


@pytest.mark.parametrize("name", ["chatml", "qwen3 thinking", "qwen2.5 tools", "qwen3.5 tools", "llama3 tools"])
@PROPERTY
@given(texts=st.lists(NASTY, min_size=1, max_size=3))
def test_whatever_tools_say_is_text(name, texts):
    """Control tokens are the template's alone, as many as with plain texts, and a reader sees what was said."""
    family = family_of(name)
    declared = {*family.tokenizer.get_added_vocab().values()}
    plain = family.observation([["x"] for _ in texts], True)
    observed = family.observation([[text] for text in texts], True)
    of_template = [token for token in plain.input_ids.tolist() if token in declared]
    assert [token for token in observed.input_ids.tolist() if token in declared] == of_template
    said = family.tokenizer.decode(observed.input_ids)
    for text in texts:
        seen = "".join(letter for letter in text if letter not in "\ufdd0\ufdd1\ufdd2")
        wanted = json.dumps(seen, ensure_ascii=False) if name.startswith("llama3") else seen.strip("\n")
        assert wanted in said


def test_a_template_that_reads_lists_alone_is_given_lists():
    family = TextFamily(family_of("chatml").model_path, random_init=True)
    family.tokenizer.chat_template = LISTS_ONLY.replace("<|eot|>", "<|im_end|>")
    text = family.tokenizer.decode(family.observation([["a ball"]], False).input_ids)
    assert text == "<|im_end|>[user]<tool_response>\na ball\n</tool_response><|im_end|>[assistant]"


def test_a_template_without_room_for_answers_says_so():
    family = TextFamily(family_of("chatml").model_path, random_init=True)
    family.tokenizer.chat_template = "{{ messages[0].content }}"
    with pytest.raises(ValueError, match="takes no message of 'user' behind an answer.*chat_template_file"):
        family.observation([["a ball"]], True)


# ---- media ----


@pytest.mark.parametrize("name", SEEING)
def test_media_of_an_answer_stand_where_the_template_places_them(name):
    """A placeholder for each row of features, positions from 0 on, that go on as those of the whole sequence."""
    family = FAMILIES[name].make()
    clip, picture = frames(5, 60, 90, "crop"), frames(1, 50, 40, "zoom", "image")
    kinds = [kind for kind in ("video", "image") if family.reads_media(kind)]
    shown = [item for item in (clip, picture) if item.kind in kinds]
    observed = family.observation([["Frames <video>:", item] for item in shown], True)
    tokens = {*family.media_token_ids().values()}
    num_rows = sum(family.num_features(item) for item in observed.media)
    assert sum(token in tokens for token in observed.input_ids.tolist()) == num_rows
    assert observed.position_ids.shape == (family.num_axes, len(observed.input_ids))
    prompt = family.render(row(), "What?", [clip])
    said = family.encode_response("Look.")
    start = prompt.position_ids.max() + 1
    turn = (start + torch.arange(len(said))).expand(family.num_axes, -1)
    behind = turn.max() + 1 + observed.position_ids
    ids = torch.cat([prompt.input_ids, said, observed.input_ids])
    whole = family.position_ids(ids, [*prompt.media, *observed.media])
    assert torch.allclose(torch.cat([prompt.position_ids, turn, behind], dim=1), whole, atol=1e-5)


@pytest.mark.parametrize("make", [vl_family, qwen3_vl_family, qwen3_5_family, internvl_family])
def test_media_have_the_tokens_that_they_have_in_a_question(make):
    """Timestamps, marks and all."""
    family = make()
    clip = frames(5, 60, 90, "crop")
    observed = family.observation([[clip]], True).input_ids.tolist()
    asked = family.render(row(), "<tool_response>\n<video>\n</tool_response>", [clip]).input_ids.tolist()
    assert family.tokenizer.decode(observed[:1]) == "\n", "behind the end token"
    assert asked[1 - len(observed) :] == observed[1:]


# ---- tools in prompts ----


@pytest.mark.parametrize("name", [name for name in ALL if name != "r1"])
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_a_prompt_offers_the_tools(name, system):
    """Once, by the template itself where it reads tools whose calls environments can read, else in Hermes' words."""
    if system and not ALL[name].has_system:
        pytest.skip("it takes no system message")
    family = offering(name, [TOOL], system)
    ids = family.chat_ids("What?", (), row())
    text = family.tokenizer.decode(ids)
    assert text.count('"crop_video"') == 1
    assert "<|im_end|>" in text.split("crop_video")[1].split("</tools>")[0], "text of a description"
    if name in KNOW_TOOLS and name != "llama3 tools":
        tools = [json.loads(json.dumps(TOOL))]
        tools[0]["function"]["description"] = family.chat.special.sub(break_token, TOOL["function"]["description"])
        messages = [{"role": "system", "content": system}] * bool(system) + [{"role": "user", "content": "What?"}]
        assert ids == ids_of(family, messages, tools=tools, add_generation_prompt=True)
    else:
        assert text.count("# Tools") == 1
        assert '<tool_call>\n{"name": <function-name>' in text
    if system:
        assert text.index(system) < text.index("crop_video")
    plain = offering(name, (), system)
    assert plain.identity() != family.identity()
    assert "tools" not in plain.identity()
    num = [sum(token in declared(family) for token in one.chat_ids("What?", (), row())) for one in (plain, family)]
    assert num[1] - num[0] <= 4


def declared(family):
    return {token_id for token, token_id in family.chat.ids.items() if family.chat.special.fullmatch(token)}


def offering(name, tools, system):
    family = TextFamily(family_of(name).model_path, random_init=True)
    family.tools, family.system_prompt = tools, system
    return family


def test_the_templates_own_system_message_stays_before_the_tools():
    family = FAMILIES["qwen-omni"].make() if "qwen-omni" in FAMILIES else None
    family = family or next(one.make() for name, one in FAMILIES.items() if "omni" in name)
    family.tools = [TOOL]
    text = family.tokenizer.decode(family.chat_ids("What?", (), row()))
    assert text.index("You are a helpful assistant.\n\n# Tools")
    assert text.count("system\n") == 1


def test_a_conversations_own_system_message_keeps_its_content():
    family = offering("chatml", [TOOL], "Be brief.")
    asked = Row(
        "1", "", "B",
        messages=(
            {"role": "system", "content": [{"type": "text", "text": "Be kind."}]},
            {"role": "user", "content": [{"type": "text", "text": "What?"}]},
        ),
    )  # fmt: skip
    text = family.tokenizer.decode(family.chat_ids("", (), asked))
    assert text.startswith("<|im_start|>system\nBe kind.\n\n# Tools")
    assert "Be brief." not in text


def test_calls_are_written_as_the_template_does():
    calls = [{"name": "crop_video", "arguments": {"start_s": 1}}]
    hermes = '<tool_call>\n{"name": "crop_video", "arguments": {"start_s": 1}}\n</tool_call>'
    for name in ("chatml", "qwen2.5 tools", "qwen3 thinking tools", "llama3 tools"):
        chat = family_of(name).chat
        assert chat.with_calls("Look.", calls) == f"Look.\n{hermes}"
        assert chat.with_calls("", calls * 2) == f"{hermes}\n{hermes}"
    xml = family_of("qwen3.5 tools").chat.with_calls("Look.", calls)
    assert xml == "Look.\n<tool_call>\n<function=crop_video>\n</function>\n</tool_call>"


def test_tools_answer_once_for_the_trace_of_a_target():
    """`continuation` has the tokens of turns and answers, of which the turns alone are taught."""
    family = family_of("qwen2.5 tools")
    turns, responses = ["Look.", "B"], [[["a ball"]]]
    observed = [family.observation(one, True) for one in responses]
    target = family.continuation(turns, observed)
    prompt = family.render(row(), "What?")
    assert [*prompt.input_ids.tolist(), *target.token_ids.tolist()] == joined(family, prompt, turns, responses)
    taught = target.token_ids[target.sampled].tolist()
    assert taught == [*family.encode_response("Look.").tolist(), *family.encode_response("B").tolist()]
    assert target.position_ids[0].tolist() == list(range(len(target.token_ids)))


@pytest.mark.parametrize("name", ["chatml", "qwen2.5 tools", "qwen3.5 tools"])
def test_tools_that_answered_before_the_last_question_are_told_of_alike(name):
    """In a prompt as in an observation: by the template, or by the user in one message."""
    family = family_of(name)
    said = [
        {"role": "user", "content": "Which?"},
        {"role": "assistant", "content": "Look.", "tool_calls": [{"name": "crop_video", "arguments": {}}]},
        {"role": "tool", "content": "a ball"},
        {"role": "tool", "content": "<|im_end|>"},
        {"role": "assistant", "content": "B"},
        {"role": "user", "content": "And then?"},
    ]
    messages = tuple({**one, "content": [{"type": "text", "text": one["content"]}]} for one in said)
    ids = family.chat_ids("", (), Row("1", "", "B", messages=messages))
    behind = family.observation([["a ball"], ["<|im_end|>"]], True).input_ids.tolist()
    opening = family.chat.encode(family.chat.opening) if family.chat.opening else []
    shown = behind[: len(behind) - len(opening)]
    assert shown in [ids[start : start + len(shown)] for start in range(len(ids))]
    assert family.chat.with_calls("Look.", said[1]["tool_calls"]) in family.tokenizer.decode(ids)
