import re
import time

import pytest
from hypothesis import given, strategies as st

from longrl.io.tags import tagged_parts, without_tagged

PIECES = st.lists(st.sampled_from(["<a>", "</a>", "<A>", "x", "\n", "<", "<aa>", "</a"]), max_size=12).map("".join)


@given(text=PIECES)
def test_parts_are_those_of_the_regular_expression(text):
    pattern = re.compile(r"<a>(.*?)</a>", re.DOTALL | re.IGNORECASE)
    assert [tuple(part) for part in tagged_parts(text, "a")] == [
        (match.start(), match.end(), match[1]) for match in pattern.finditer(text)
    ]
    assert without_tagged(text, "a") == pattern.sub("", text)


@pytest.mark.parametrize("text", ["<answer>" * 12_500, "<answer></answer>" * 6_000])
def test_time_is_linear(text):
    start = time.process_time()
    without_tagged(text, "answer")
    assert time.process_time() - start < 1.0  # 10 ms; the regular expression takes 5 s for the first
