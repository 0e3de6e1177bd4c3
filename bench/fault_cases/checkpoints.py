"""Checkpoints and weights that are torn, damaged, foreign or hostile, given to the commands that read them."""

from __future__ import annotations

import functools
import os
import pickle
import random
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed import checkpoint as dcp

from fault_cases.fault import Fault, Outcome
from fault_cases.small_runs import command, fit, text_run

LAST = "checkpoints/last.ckpt"
SENTINEL = "sentinel"
Damage = Callable[[bytes], bytes]
_KEPT: list[tempfile.TemporaryDirectory[str]] = []


class Hostile:
    """Its pickle makes a folder when it is read."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> Any:
        return os.makedirs, (str(self.sentinel), 0o777, True)


@functools.cache
def trained() -> Path:
    """A run of two steps and its export, made once for all rows and only read."""
    _KEPT.append(tempfile.TemporaryDirectory(prefix="longrl-fault-weights-"))
    folder = Path(_KEPT[-1].name)
    fit(folder, text_run(folder, steps=2))
    command(["export", f"--run={folder / 'run'}", f"--out={folder / 'export'}"], folder)
    return folder


def given(folder: Path, option: str, path: Path) -> Outcome:
    """`fit` with weights from `path`; what a hostile file would have done is looked for."""
    ended = fit(folder, text_run(folder, steps=1), f"{option}={path}")
    did = "code ran" if (folder / SENTINEL).exists() else "no code ran"
    begun = (folder / "run" / LAST).exists()
    return Outcome(
        ended.line_with("longrl: error:"), ended.exit_code, f"{did}, {'trained' if begun else 'not started'}"
    )


def damaged(damage: Damage, option: str) -> Callable[[Path], Outcome]:
    """A checkpoint with other bytes."""

    def does(folder: Path) -> Outcome:
        folder.mkdir(exist_ok=True)
        path = folder / "given.ckpt"
        path.write_bytes(damage((trained() / "run" / LAST).read_bytes()))
        return given(folder, option, path)

    return does


def flipped(content: bytes) -> bytes:
    """One bit of a weight is another one."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def holding(content: Any, option: str) -> Callable[[Path], Outcome]:
    """A file of `torch.save` with something else in it."""

    def does(folder: Path) -> Outcome:
        folder.mkdir(exist_ok=True)
        torch.save(content, folder / "given.ckpt")
        return given(folder, option, folder / "given.ckpt")

    return does


def hostile(option: str, *, shards: bool = False) -> Callable[[Path], Outcome]:
    """A checkpoint that names a function of the system; `export` reads it for None."""

    def does(folder: Path) -> Outcome:
        folder.mkdir(exist_ok=True)
        path = folder / "given.ckpt"
        saved = torch.load(trained() / "run" / LAST, weights_only=True)
        if shards:
            dcp.save({"state_dict": saved.pop("state_dict")}, checkpoint_id=path, no_dist=True)
            torch.save(saved, path / "meta.pt")
            (path / ".metadata").write_bytes(pickle.dumps(Hostile(folder / SENTINEL)))
        else:
            torch.save(saved | {"strange": Hostile(folder / SENTINEL)}, path)
        if option != "export":
            return given(folder, option, path)
        args = ["export", f"--run={trained() / 'run'}", f"--checkpoint={path}", f"--out={folder / 'out'}"]
        ended = command(args, folder)
        did = "code ran" if (folder / SENTINEL).exists() else "no code ran"
        return Outcome(ended.line_with("longrl: error:"), ended.exit_code, did)

    return does


def export_with(name: str, damage: Damage) -> Callable[[Path], Outcome]:
    """An exported folder, one file of which has other bytes."""

    def does(folder: Path) -> Outcome:
        shutil.copytree(trained() / "export", folder / "export")
        file = folder / "export" / name
        file.write_bytes(damage(file.read_bytes()))
        return given(folder, "--model.init_from", folder / "export")

    return does


def refused(fault: str, does: Callable[[Path], Outcome], seen: str) -> Fault:
    """A row that ends with one line and status 2."""
    return Fault("checkpoints", fault, does, exit_code=2, seen=f"^longrl: error: .*{seen}")


CKPT = "--ckpt_path"
INIT = "--model.init_from"
REFUSED = "is refused: reading it would import os.makedirs"
QUICK = [
    refused("ckpt_path of 0 bytes", damaged(lambda content: b"", CKPT), "is empty"),
    refused("one flipped bit, ckpt_path", damaged(flipped, CKPT), "is damaged"),
    refused("a checkpoint that holds {}", holding({}, CKPT), "is no checkpoint of a run"),
    refused("code in a checkpoint, ckpt_path", hostile(CKPT), REFUSED),
    refused("code in .metadata, export", hostile("export", shards=True), REFUSED),
    refused("half of an export's weights", export_with("model.safetensors", lambda content: content[:500]), "is torn"),
    refused(
        "a config.json of an unknown model",
        export_with("config.json", lambda content: b'{"model_type": "unheard_of"}'),
        "config.json describes no model",
    ),
]
MORE = [
    refused("half of a checkpoint", damaged(lambda content: content[: len(content) // 2], CKPT), "is torn"),
    refused("a checkpoint without its last byte", damaged(lambda content: content[:-1], INIT), "is torn"),
    refused("a checkpoint of random bytes", damaged(random.Random(0).randbytes(4096).__add__, INIT), "given.ckpt is"),
    refused("a text for a checkpoint", damaged(lambda content: b"weights", INIT), "is no checkpoint"),
    refused("one flipped bit, init_from", damaged(flipped, INIT), "is damaged"),
    refused("another model's weights", holding({"state_dict": {"model.a": torch.ones(1)}}, INIT), "another model"),
    refused("code in a checkpoint, init_from", hostile(INIT), REFUSED),
    refused("code in a checkpoint, export", hostile("export"), REFUSED),
    refused("code in .metadata, init_from", hostile(INIT, shards=True), REFUSED),
    refused("one flipped bit in an export", export_with("model.safetensors", flipped), "is damaged"),
    refused("an empty config.json", export_with("config.json", lambda content: b""), "config.json is no JSON"),
]
FAULTS = [*QUICK, *(replace(fault, quick=False) for fault in MORE)]
