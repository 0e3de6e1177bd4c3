"""Calls as Qwen's templates write them, and what becomes of those that are written otherwise."""

import json
import time

import pytest

from longrl.environments.calculator import Calculator
from longrl.environments.tool_calls import MAX_CALLS, RequestedCall, parse_tool_calls


def call(content):
    return f"<tool_call>\n{content}\n</tool_call>"


def test_calls_of_a_turn_are_read_in_order():
    text = "I look.\n" + call('{"name": "a", "arguments": {"x": 1}}') + "\n" + call('{"name": "b", "arguments": {}}')
    assert parse_tool_calls(text) == [RequestedCall("a", {"x": 1}), RequestedCall("b")]


def test_arguments_may_be_a_text_that_holds_json():
    content = json.dumps({"name": "a", "arguments": json.dumps({"x": [1, 2]})})
    assert parse_tool_calls(call(content)) == [RequestedCall("a", {"x": [1, 2]})]


def test_the_form_of_qwen3_coder_and_qwen3_5_is_read():
    content = (
        "<function=crop>\n<parameter=start_s>\n12\n</parameter>\n<parameter=why>\ntwo\nlines\n</parameter>\n</function>"
    )
    assert parse_tool_calls(call(content)) == [
        RequestedCall("crop", {"start_s": "12", "why": "two\nlines"}, is_text=True)
    ]


def test_thinking_holds_no_calls():
    inside = call('{"name": "a"}')
    assert parse_tool_calls(f"<think>{inside}</think>The answer is 4.") == []
    assert [one.name for one in parse_tool_calls(f"<think>hm</think>{inside}")] == ["a"]
    assert [one.name for one in parse_tool_calls(f"<think>never closed {inside}")] == ["a"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (call("{'name': 'a'}"), "must be JSON"),
        (call("[1, 2]"), 'JSON object with "name"'),
        (call('{"name": 3}'), 'JSON object with "name"'),
        (call('{"name": "a", "arguments": [1]}'), '"arguments" must be a JSON object'),
        (call('{"name": "a", "arguments": "[1"}'), '"arguments" must be a JSON object'),
        (call('{"name": "a", "parameters": {"x": 1}}'), 'also `["parameters"]`'),
        (call('{"name": "a", "arguments": {"x": NaN}}'), "finite"),
        (call('{"name": "a", "arguments": {"x": 1e999}}'), "finite"),
        (call('{"name": "a", "arguments": {"x": "\\ud800"}}'), "half a character"),
        (call('{"name": "a", "arguments": {"x": ' + "9" * 5000 + "}}"), "must be JSON"),
        (call("[" * 3000), "must be JSON"),
        (call('{"name": "a", "arguments": {"x": "' + "y" * 30_000 + '"}}'), "may have 20000 characters"),
        ('<tool_call>\n{"name": "a"}', "must end with </tool_call>"),
        (call("<function=a>\n<parameter=x>\n1\n</function>"), "must end with </parameter>"),
        (call("<function=a>\n<parameter=x>\n1\n</parameter>"), "must end with </function>"),
    ],
)
def test_what_cannot_be_read_says_the_rule_and_the_remedy(text, said):
    (read,) = parse_tool_calls(text)
    assert said in read.error
    assert ";" in read.error
    read.error.encode()


def test_reading_takes_linear_time_and_ends():
    def seconds(count):
        start = time.perf_counter()
        parse_tool_calls("<tool_call>" * count + "</tool_call>{" * count)
        return time.perf_counter() - start

    seconds(1000)
    assert seconds(100_000) < 100 * max(seconds(10_000), 1e-3)
    assert len(parse_tool_calls(call("{}") * 1000)) == MAX_CALLS


# ---- tools ----


def answers(text, **options):
    environment = Calculator(**options)
    responses = environment.step(text).responses
    return [(response.content[0], response.call.error) for response in responses]


def ask(expression):
    ((text, error),) = answers(call(json.dumps({"name": "calculate", "arguments": {"expression": expression}})))
    assert (error is None) or text == f"Error: {error}"
    return text


@pytest.mark.parametrize(
    ("expression", "value"),
    [("(3 + 4) * 2", "14"), ("7 / 2", "3.5"), ("2 ** 10", "1024"), ("-7 % 3", "2"), ("0.1 + 0.2", "0.3")],
)
def test_a_calculator_works_out_arithmetic(expression, value):
    assert ask(expression) == value


@pytest.mark.parametrize(
    "expression",
    ["__import__('os').system('true')", "9**9**9**9", "1/0", "(-8)**0.5", "(" * 200, "x", "'a' * 9", "1e999", ""],
)
def test_a_calculator_runs_nothing_and_always_answers(expression):
    assert ask(expression).startswith("Error: ")


def test_schemas_are_what_chat_templates_take():
    (schema,) = Calculator().tools
    assert schema["type"] == "function"
    assert schema["function"]["name"] == "calculate"
    assert schema["function"]["parameters"]["properties"]["expression"]["type"] == "string"
    assert schema["function"]["parameters"]["required"] == ["expression"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "calculate(expression) needs `expression`"),
        ({"expression": 3}, "must be a text, got `3`"),
        ({"expression": "1", "y": 2}, "takes no `y`"),
        ({"expression": "1" * 5000}, "may have 4000 characters"),
    ],
)
def test_arguments_that_do_not_fit_are_answered(arguments, said):
    ((text, error),) = answers(call(json.dumps({"name": "calculate", "arguments": arguments})))
    assert said in text
    assert error


def test_an_unknown_tool_is_answered_with_those_that_there_are():
    ((text, _),) = answers(call('{"name": "calc"}'))
    assert text == "Error: there is no tool `calc`; use one of calculate"


def test_calls_beyond_the_limit_are_answered_once():
    said = answers(call('{"name": "calculate", "arguments": {"expression": "1"}}') * 5, max_calls=2)
    assert [text for text, _ in said] == ["1", "1", said[2][0]]
    assert "a turn may have 2 tool calls, got 5" in said[2][0]


def test_a_turn_without_a_call_ends():
    assert Calculator().step("The answer is 4.") is None
