"""YAML of strangers: harmless ones are read, others refused before they cost memory or the process."""

import pytest
import yaml

from longrl.io.plain_yaml import MAX_DEPTH, load_yaml

LAUGHS = "a: &a [1, 2, 3, 4, 5, 6, 7, 8, 9]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


def test_anchors_and_depth_within_reason_are_read():
    deep = "[" * (MAX_DEPTH - 1) + "]" * (MAX_DEPTH - 1)
    assert load_yaml(f"a: &x {{b: 1}}\nc: *x\nd: {deep}")["c"] == {"b": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "levels deep"),
        ("- " * 100_000, "levels deep"),
        ("{a: " * (MAX_DEPTH + 1), "levels deep"),
        (LAUGHS, "once its aliases are put in"),
        ("a: &a [*a]", "within what it stands for"),
        ("a: " + "9" * 5000, "cannot be read"),
        ('a: !!int ""', "cannot be read"),
        ("a: 2026-99-99", "cannot be read"),
        ("a: \x00 and so on", "unacceptable character|not allowed"),
    ],
)
def test_what_would_cost_the_process_is_no_yaml(text, message):
    with pytest.raises(yaml.YAMLError, match=message):
        load_yaml(text)
