"""`make env` says how far it is."""

import importlib.util
import sys

import pytest

from tests.runs import ROOT


@pytest.fixture(scope="module")
def install():
    """requirements/install.py, which is a script."""
    spec = importlib.util.spec_from_file_location("install_progress", ROOT / "requirements" / "install.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([], "  9 s: pip starts"),
        (["Collecting av==14.0", "  Downloading https://x/av-14.0.whl (30 MB)"], "package 1, downloading av-14.0"),
        (["Collecting a", "Collecting torch==2.11.0 (from -r x)"], "package 2, collecting torch==2.11.0"),
        (["Collecting a", "Installing collected packages: a, b, c"], "  9 s: installing 3 packages"),
    ],
)  # fmt: skip
def test_a_line_says_which_package_it_is_at(install, lines, said):
    assert install.progress(lines, 9.2).find(said) >= 0


def test_a_failure_of_pip_is_its_status(install, capfd, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/echo")  # in its place: writes its arguments
    assert install.main(["-r", "x.lock"]) == 0
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert install.main(["-r", "x.lock"]) == 1
    out, err = capfd.readouterr()
    assert out.startswith("  done in")
    assert err == ""
