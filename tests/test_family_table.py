"""The table of families (docs/families.md) is what the tests prove."""

import subprocess
import sys

import pytest

from tests.families import CLAIMS, FAMILIES, cell, every, proves
from tests.family_table import DOCUMENT, ROOT, filled, table

EVERYTHING = {(name, claim): ["a test"] for name in FAMILIES for claim in CLAIMS}


@pytest.mark.vllm  # a column is proved by tests that are collected only beside it
@pytest.mark.slow
def test_the_table_is_what_the_tests_prove():
    """In a process of its own: collecting within a test would share its plugins."""
    check = (
        "from tests.family_table import DOCUMENT, collected, filled\n"
        "found = DOCUMENT.read_text()\n"
        "assert found == filled(found, collected()), 'run python -m tests.family_table'"
    )
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def test_without_its_test_a_cell_is_empty():
    whole = table(EVERYTHING).splitlines()
    less = table({key: value for key, value in EVERYTHING.items() if key != ("nvila", "SP")}).splitlines()
    (changed,) = [place for place, line in enumerate(whole) if line != less[place]]
    assert whole[changed].startswith("| NVILA |")
    assert (whole[changed].count("yes"), less[changed].count("yes")) == (len(CLAIMS), len(CLAIMS) - 1)


def test_text_has_no_features_to_cache():
    assert "| Llama 3 text | yes | yes | yes | yes | yes | yes | - | yes | yes |" in table(EVERYTHING)


def test_the_rest_of_the_page_stays():
    page = DOCUMENT.read_text()
    again = filled(page, EVERYTHING)
    assert filled(again, EVERYTHING) == again
    assert again.split("<!--")[0] == page.split("<!--")[0]
    assert again.split("-->")[-1] == page.split("-->")[-1]


def test_marks_name_families_and_claims_that_there_are():
    with pytest.raises(AssertionError, match="sequence"):
        proves("sequence", "nvila")
    with pytest.raises(AssertionError, match="vila-1"):
        proves("SP", "vila-1")
    (mark,) = cell("SP", "nvila", 2).marks
    assert mark.args == ("SP", "nvila")
    (parameter, *_) = every(["SFT", "RL"]).args[1]
    assert [mark.args[0] for mark in parameter.marks] == ["SFT", "RL"]
