"""Every recipe fits the devices that its header asks for, and needs what the header says."""

import json
import re

import pytest

from longrl.commands.main import main
from tests.runs import ROOT

RECIPES = sorted(path for path in (ROOT / "configs").glob("*.yaml") if not path.stem.startswith(("sd3", "wan")))
"""Those of language models: `plan` knows no diffusion."""
CARDS = {"80": "H100", "141": "H200"}
NEEDS = r"(a|one|\d+) GPUs? of (\d+) GB[^(]*\((\d+) GiB of (?:it|each) by `python -m longrl plan`"
"""Devices, GB of each, and GiB that the run takes."""
OTHERWISE = r"or (one|\d+ GPUs) of (\d+) GB \((\d+) GiB of (?:it|each) with (--[^)]+)\)"
"""The same, and the options that it takes."""


def header(recipe):
    return re.sub(r"\n#\s+", " ", recipe.read_text().partition("\nrun_dir:")[0])


def planned(recipe, folder, *args):
    found = folder / "plan.json"
    found.unlink(missing_ok=True)
    main(["plan", "--config", str(recipe), "--json", str(found), *args])
    return json.loads(found.read_text())


def check(found, devices, gib):
    phases = found["bytes_per_device"]
    assert found["fits"], found["verdict"]
    assert found["plan"]["devices"] == (1 if devices in ("a", "one") else int(devices.split()[0]))
    assert abs(max(sum(parts.values()) for parts in phases.values()) / 2**30 - int(gib)) <= 0.5, found["verdict"]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_fits_its_own_devices_as_its_header_says(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)  # options of headers name files from here
    text = header(recipe)
    ((devices, gb, gib),) = re.findall(NEEDS, text)
    found = planned(recipe, tmp_path, f"--hardware={CARDS[gb]}")
    check(found, devices, gib)
    assert found["plan"]["vllm"]  # generates by default on a GPU
    assert not [note for note in found["notes"] if "planned with it" in note or "would skip" in note]
    for devices, gb, gib, options in re.findall(OTHERWISE, text):
        check(planned(recipe, tmp_path, f"--hardware={CARDS[gb]}", *options.split()), devices, gib)
