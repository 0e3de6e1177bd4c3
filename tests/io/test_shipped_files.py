from pathlib import Path

import pytest

from longrl.io import shipped_files
from longrl.io.shipped_files import find_shipped, place_of, shipped

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_shipped_file_is_found_from_any_folder(elsewhere):
    assert shipped("configs/trainer/cpu.yaml") == ROOT / "configs/trainer/cpu.yaml"
    assert shipped("longvideo-reason/prompts") == ROOT / "longvideo-reason/prompts"
    assert shipped("launch/torchrun.sh") == ROOT / "launch/torchrun.sh"


def test_what_exists_in_the_working_folder_wins_and_stays_as_it_was_given(elsewhere):
    own = elsewhere / "configs/trainer/cpu.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("{}")
    assert shipped("configs/trainer/cpu.yaml") == Path("configs/trainer/cpu.yaml")


def test_an_installed_package_has_its_files_inside(elsewhere, monkeypatch):
    package = elsewhere / "site-packages/longrl"
    (package / "shipped/configs/demo").mkdir(parents=True)
    monkeypatch.setattr(shipped_files, "PACKAGE", package)
    assert shipped("configs/demo") == package / "shipped/configs/demo"


def test_other_folders_of_the_checkout_are_not_shipped(elsewhere):
    assert find_shipped("tests/io") is None
    assert find_shipped("configs/../tests") is None


@pytest.mark.parametrize("text", [f"configs/{'x' * 5000}", "configs/a\0b", "~nobody-here/configs"])
def test_what_can_be_no_path_is_no_file(elsewhere, text):
    assert find_shipped(text) is None
    assert place_of(text) == text


def test_an_unknown_file_is_refused_with_near_names(elsewhere):
    with pytest.raises(ValueError, match=r"neither .* did you mean configs/trainer/node.yaml"):
        shipped("configs/trainer/nod.yaml")
