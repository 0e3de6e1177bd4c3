"""Each import runs in a process of its own: whether torchvision was imported before is the point."""

import os
import subprocess
import sys

import pytest

from tests.runs import ROOT

EXTENSION = """
import os
import torch

def _has_ops():
    return False

if os.environ["LIBRARY_LOADS"] == "yes":  # as the real library: it defines both names, and a second time is fatal
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

    def _has_ops():
        return True
"""
PACKAGE = """
import torch
from . import extension

for name in ("nms", "qnms"):
    torch.library.register_fake(f"torchvision::{name}", lambda dets, scores, iou_threshold: dets)
"""


def python(*args, cwd=ROOT, **environment):
    """A fresh Python; `environment` is added to this process's."""
    command = [sys.executable, *args]
    return subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=600)


@pytest.fixture
def fake(tmp_path):
    """A torchvision that comes to the same point as the real one, and a way to run code with it."""
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(PACKAGE)
    (package / "extension.py").write_text(EXTENSION)

    def run(code, *, loads, torch=None):
        if torch is not None:
            info = tmp_path / f"torch-{torch}.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {torch}\n")
        path = os.pathsep.join([str(tmp_path), str(ROOT)])
        return python("-c", code, PYTHONPATH=path, LIBRARY_LOADS="yes" if loads else "no")

    return package, run


IMPORT = "import longrl, torch, torchvision; print(torchvision.__file__, torchvision.extension._has_ops())"


# ---- when the names are declared ----


@pytest.mark.parametrize("library", ["_C.so", "_C_stable.so"])
def test_a_torchvision_that_imports_is_left_alone_whatever_its_library_is_called(fake, library):
    package, run = fake
    (package / library).touch()
    result = run(IMPORT, loads=True, torch="2.13.0+cpu")
    assert result.stdout == f"{package / '__init__.py'} True\n", result.stderr


def test_one_whose_library_does_not_load_imports_all_the_same(fake):
    package, run = fake
    result = run(IMPORT, loads=False, torch="2.13.0+cpu")
    assert result.stdout == f"{package / '__init__.py'} False\n", result.stderr


def test_another_error_of_its_import_is_raised(fake):
    package, run = fake
    (package / "__init__.py").write_text("raise RuntimeError('compiled with another CUDA')")
    result = run(IMPORT, loads=True, torch="2.13.0+cpu")
    assert result.returncode == 1
    assert "compiled with another CUDA" in result.stderr


@pytest.mark.parametrize("torch", ["2.13.0+cu130", "2.14.1"])
def test_beside_a_torch_for_gpus_nothing_is_hooked(fake, torch):
    _, run = fake
    code = (
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'Operator' not in type(f).__name__]; import longrl"
    )
    code += "; print([type(finder).__name__ for finder in sys.meta_path if 'Operator' in type(finder).__name__])"
    assert run(code, loads=True, torch=torch).stdout == "[]\n"


def test_importing_longrl_loads_neither_torch_nor_torchvision():
    code = "import sys, longrl; print([name for name in ('torch', 'torchvision', 'lightning') if name in sys.modules])"
    assert python("-c", code).stdout == "[]\n"


# ---- the environment the tests run in ----


@pytest.mark.parametrize("first", ["lightning", "transformers"])
def test_here_torchvision_imports_whatever_comes_first_without_longrl(first, tmp_path):
    code = f"""
import sys
assert not [name for name in sys.modules if name.startswith("longrl")], "no start-up file imports a checkout"
import {first}
import torchvision
assert not [name for name in sys.modules if name.startswith("longrl")]
"""
    result = python("-c", code, cwd=tmp_path)
    assert result.returncode == 0, result.stderr


def test_here_a_spawned_process_imports_torchvision(tmp_path):
    (tmp_path / "spawn.py").write_text("""
import multiprocessing

if __name__ == "__main__":
    process = multiprocessing.get_context("spawn").Process(target=exec, args=("import lightning, torchvision",))
    process.start()
    process.join()
    raise SystemExit(process.exitcode)
""")
    result = python("spawn.py", cwd=tmp_path)
    assert result.returncode == 0, result.stderr


def test_here_a_video_processor_patchifies():
    result = python(
        "-c",
        """
import torch
from transformers import Qwen2VLVideoProcessor

processor = Qwen2VLVideoProcessor(size={"shortest_edge": 56 * 56, "longest_edge": 4 * 56 * 84})
video = torch.randint(0, 256, (4, 3, 56, 84), dtype=torch.uint8)
out = processor(videos=[video], do_sample_frames=False, return_tensors="pt")
assert out["video_grid_thw"].tolist() == [[2, 4, 6]], out["video_grid_thw"]
assert out["pixel_values_videos"].shape == (2 * 4 * 6, 3 * 2 * 14 * 14), out["pixel_values_videos"].shape
""",
    )
    assert result.returncode == 0, result.stderr


def test_here_nms_computes_or_says_that_it_cannot():
    result = python(
        "-c",
        """
import torch, torchvision

boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 2.0, 1.9], [5.0, 5.0, 6.0, 6.0]])
print(torchvision.ops.nms(boxes, torch.tensor([0.9, 0.8, 0.7]), 0.5).tolist())
""",
    )
    assert result.stdout == "[0, 2]\n" or "Couldn't load custom C++ ops" in result.stderr, result.stderr
