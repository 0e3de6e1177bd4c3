"""Each test runs in a process of its own: whether torchvision was imported before is the point."""

import subprocess
import sys


def run(code: str) -> subprocess.CompletedProcess[str]:
    """Runs `code` in a fresh process, without the hook that `make env` gives every process of .venv."""
    unhook = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if type(f).__name__ != '_Finder']\n"
    return subprocess.run([sys.executable, "-c", unhook + code], capture_output=True, text=True, timeout=120)


def test_ops_are_declared_exactly_where_torchvision_cannot_be_imported():
    imported = run("import torchvision")
    declared = run("from longrl.torchvision_ops import declare_missing_ops; print(declare_missing_ops())")
    assert declared.stdout.strip() == str(imported.returncode != 0), imported.stderr + declared.stderr


def test_a_video_processor_patchifies_after_the_declaration():
    result = run("""
import torch
from longrl.torchvision_ops import declare_missing_ops

declare_missing_ops()
assert not declare_missing_ops(), "the second call must find nothing to do"

from transformers import Qwen2VLVideoProcessor

processor = Qwen2VLVideoProcessor(size={"shortest_edge": 56 * 56, "longest_edge": 4 * 56 * 84})
video = torch.randint(0, 256, (4, 3, 56, 84), dtype=torch.uint8)
out = processor(videos=[video], do_sample_frames=False, return_tensors="pt")
assert out["video_grid_thw"].tolist() == [[2, 4, 6]], out["video_grid_thw"]
assert out["pixel_values_videos"].shape == (2 * 4 * 6, 3 * 2 * 14 * 14), out["pixel_values_videos"].shape
""")
    assert result.returncode == 0, result.stderr


def test_the_hook_lets_lightning_be_imported_first():
    result = run("""
from longrl.torchvision_ops import declare_on_import

declare_on_import()
declare_on_import()
assert [type(finder).__name__ for finder in sys.meta_path].count("_Finder") == 1
assert "torch" not in sys.modules, "the hook must cost nothing until torchvision is imported"

import importlib.util
import lightning
import torchvision

assert importlib.util.find_spec("torchvision").origin == torchvision.__file__
""")
    assert result.returncode == 0, result.stderr


def test_nothing_is_declared_after_torchvision_was_imported():
    result = run("""
import types
import torch
from longrl.torchvision_ops import declare_missing_ops

sys.modules["torchvision"] = types.ModuleType("torchvision")
assert not declare_missing_ops()
assert not hasattr(torch.ops.torchvision, "nms")
""")
    assert result.returncode == 0, result.stderr


def test_missing_torchvision_is_no_error():
    result = run("""
import longrl.torchvision_ops as torchvision_ops

torchvision_ops.find_spec = lambda name: None
assert not torchvision_ops.declare_missing_ops()
""")
    assert result.returncode == 0, result.stderr


def test_calling_a_declared_operator_is_a_clear_error():
    result = run("""
import torch
from longrl.torchvision_ops import declare_missing_ops

if declare_missing_ops():
    import torchvision

    torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
else:
    raise RuntimeError("Couldn't load custom C++ ops: not so here")
""")
    assert result.returncode != 0
    assert "Couldn't load custom C++ ops" in result.stderr
