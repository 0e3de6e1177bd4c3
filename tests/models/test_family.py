"""The table of hooks in longrl/models/family.py is what the code has."""

import re

import longrl.models.family as family_module
from longrl.models.base import CausalFamily
from longrl.models.family import CAPABILITIES, hooks_of
from tests.families import FAMILIES, SEEING, TEXT


def table():
    """{capability: {kind of hook: names}} of the docstring."""
    rows = {}
    for line in family_module.__doc__.splitlines():
        if found := re.fullmatch(r"    (\w+) +([a-z].*\?)", line):
            rows[found[1]] = {"question": found[2]}
            row = rows[found[1]]
        elif found := re.fullmatch(r"        (write|media|default) +(.*)", line):
            kind = found[1]
            row[kind] = found[2]
        elif re.fullmatch(r" {24}\w.*", line):
            row[kind] += " " + line.strip()
    return {
        name: {kind: value if kind == "question" else value.split(", ") for kind, value in row.items()}
        for name, row in rows.items()
    }


def test_every_hook_is_in_the_row_of_its_class():
    assert list(table()) == [capability.__name__ for capability in CAPABILITIES]
    for capability in CAPABILITIES:
        row = table()[capability.__name__]
        listed = [name for kind in ("write", "media", "default") for name in row.get(kind, [])]
        assert sorted(listed) == sorted({*listed}) == sorted(hooks_of(capability)), capability


def test_what_must_be_written_is_abstract_and_nothing_else():
    written = {name for row in table().values() for name in row.get("write", [])}
    assert written == CausalFamily.__abstractmethods__


def test_families_that_see_write_the_media_hooks_and_those_that_read_text_do_not():
    for capability in CAPABILITIES:
        for name in table()[capability.__name__].get("media", []):
            for family in FAMILIES:
                overridden = getattr(type(FAMILIES[family].make()), name) is not getattr(capability, name)
                assert overridden is (family in SEEING), (family, name)
    assert TEXT


def test_a_capabilitys_docstring_is_its_question():
    for capability in CAPABILITIES:
        question = table()[capability.__name__]["question"]
        assert capability.__doc__.splitlines()[0].lower().startswith(question[:-1].lower()), capability


def test_a_family_has_no_public_name_beside_its_capabilities():
    listed = {name for capability in CAPABILITIES for name in hooks_of(capability)}
    assert {name for name in dir(CausalFamily) if not name.startswith("_")} - listed == {
        "export_adapters",
        "model_parts",
    }
