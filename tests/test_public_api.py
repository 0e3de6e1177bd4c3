"""`longrl.__all__`: every name is there, under its own module, and loading waits until one is asked for."""

import subprocess
import sys

import pytest

import longrl


@pytest.mark.parametrize("name", longrl.__all__)
def test_a_public_name_is_what_its_module_defines(name):
    assert getattr(longrl, name).__name__ == name


def test_other_names_are_errors():
    with pytest.raises(AttributeError, match="no attribute 'Policy'"):
        longrl.Policy  # noqa: B018


def test_import_loads_nothing_heavy():
    code = "import sys, longrl; print([name for name in ('torch', 'lightning', 'transformers') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
