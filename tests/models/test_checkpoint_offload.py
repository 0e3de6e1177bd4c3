"""Layer inputs on the host: what is copied when, on streams that stand in for a GPU's and copy as late as they may."""

import weakref
from contextlib import ExitStack, contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from longrl.models import checkpoint_offload
from longrl.models.text import TextFamily
from longrl.packing.pack import pack
from longrl.testing.tiny import tiny_text
from tests.tiny import gradients, random_completions, row

LAYERS = 5


class LateCopies(TorchDispatchMode):
    """Puts copies off: until then what they write to is NaN, and what they read must not have been freed."""

    def __init__(self, stream):
        super().__init__()
        self.stream = stream

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.copy_.default:
            to, source = args[:2]
            to.fill_(float("nan"))
            self.stream.copies.append((to, weakref.ref(source)))
            return to
        return function(*args, **(kwargs or {}))


class Stream:
    """A GPU's stream that does as late as it may what it is told to do."""

    def __init__(self, log, name):
        self.log = log
        self.name = name
        self.copies = []
        self.done = 0

    def record_event(self):
        return self, len(self.copies)

    def wait_event(self, event):
        other, number = event
        self.log.append(f"{self.name} waits for {other.name} {number}".strip())
        for to, source in other.copies[other.done : number]:
            assert source() is not None, "the memory that is copied is another's by now"
            to.copy_(source())
        other.done = max(other.done, number)


class Streams:
    """`torch.cuda`, as far as it is asked for streams."""

    def __init__(self):
        self.log = []
        self.computing = Stream(self.log, "computing")
        self.copying = Stream(self.log, "copying")
        self.current = self.computing

    def current_stream(self, device):
        return self.current

    def Stream(self):
        return self.copying

    @contextmanager
    def stream(self, stream):
        before = self.current
        self.current = stream
        with LateCopies(stream):
            yield
        self.log.append(f"copy {len(stream.copies)}")
        self.current = before


@pytest.fixture
def streams(monkeypatch):
    found = Streams()
    others = torch.get_device_module
    of_device = lambda device: found if torch.device(device).type == "cpu" else others(device)  # noqa: E731
    monkeypatch.setattr(torch, "get_device_module", of_device)
    checkpoint_offload.copy_stream.cache_clear()
    yield found
    checkpoint_offload.copy_stream.cache_clear()


def updated(folder, log=None, **options):
    """Gradients after two micro-batches; `log` is told of every layer that computes."""
    family = TextFamily(str(folder), random_init=True, gradient_checkpointing=True, **options)
    model = family.build().train()
    prompt = family.render(row(), "Which one? " * 4)
    with ExitStack() as hooks:
        if log is not None:
            for number, layer in enumerate(family.layers(model), start=1):
                note = lambda *args, number=number: log.append(f"layer {number}")  # noqa: E731
                hooks.callback(layer.self_attn.register_forward_pre_hook(note).remove)
        for seed in (1, 2):
            (packed,) = pack([prompt], random_completions(family, [[5, 7]], seed), 10_000)
            loss = family.forward(model, packed, {}).logp.sum()
            if log is not None:
                log.append("backward")
            loss.backward()
    return gradients(model)


@pytest.fixture
def folder(tmp_path):
    return tiny_text(tmp_path, num_hidden_layers=LAYERS)


def test_gradients_are_the_same_to_the_bit_however_late_copies_are(folder, streams):
    plain = updated(folder)
    assert not streams.copying.copies
    found = updated(folder, offload_checkpoints=True)
    assert len(streams.copying.copies) >= 2 * 2 * LAYERS  # out and back
    assert found.keys() == plain.keys()
    for name, gradient in plain.items():
        assert torch.equal(found[name], gradient), name


def test_on_a_cpu_the_same_code_runs_with_torchs_own_streams(folder):
    plain = updated(folder)
    found = updated(folder, offload_checkpoints=True)
    assert all(torch.equal(found[name], gradient) for name, gradient in plain.items())


def test_a_copy_goes_beside_the_layer_behind_it(folder, streams):
    updated(folder, streams.log, offload_checkpoints=True)
    end = streams.log.index("layer 1", streams.log.index("backward")) + 1
    log = streams.log[:end]
    start = log.index("backward")
    forward, backward = log[:start], log[start:]
    kept = len([line for line in forward if line.startswith("copy ")])
    # 1. A layer's input leaves as it begins, and is waited for when the next one leaves.
    wanted = []
    for layer in range(1, LAYERS + 1):
        if layer > 1:
            wanted.append(f"computing waits for copying {layer - 1}")
        wanted += ["copying waits for computing 0", f"copy {layer}", f"layer {layer}"]
    assert forward[: len(wanted)] == wanted
    # 2. Backward a layer's input is waited for, the next one's sets off, and then the layer computes.
    copies = {f"copy {2 * kept - layer + 1}" for layer in range(1, LAYERS + 1)}
    of_layers = [line for line in backward if line in copies or line.startswith(("layer", "computing"))]
    wanted = []
    for layer in range(LAYERS, 0, -1):
        wanted.append(f"computing waits for copying {2 * kept - layer + 1}")
        if layer > 1:
            wanted.append(f"copy {2 * kept - layer + 2}")
        wanted.append(f"layer {layer}")
    assert of_layers[-len(wanted) :] == wanted
    # 3. Every copy sees what has been computed before it.
    for place, line in enumerate(log):
        if line.startswith("copy "):
            assert log[place - 1] == "copying waits for computing 0"


def test_two_inputs_at_most_are_on_the_device(folder, streams, monkeypatch):
    held = []
    most = []
    keep, fetch = checkpoint_offload.OffloadedCheckpoints._keep, checkpoint_offload.OffloadedCheckpoints._fetch

    def count(self):
        most.append((self._leaving is not None) + sum(kept.fetched is not None for kept in held))

    def note_kept(self, tensor):
        found = keep(self, tensor)
        if found is not tensor:
            held.append(found)
            count(self)
        return found

    def note_fetched(self, kept):
        fetch(self, kept)
        count(self)

    monkeypatch.setattr(checkpoint_offload.OffloadedCheckpoints, "_keep", note_kept)
    monkeypatch.setattr(checkpoint_offload.OffloadedCheckpoints, "_fetch", note_fetched)
    updated(folder, offload_checkpoints=True)
    assert len(held) >= 2 * LAYERS
    assert max(most) == 1  # and the one in use
    assert not any(kept.fetched for kept in held)


def test_what_is_no_hidden_state_stays(streams):
    weight = torch.ones(8, requires_grad=True)
    hidden = torch.ones(1, 4, 8)
    with checkpoint_offload.OffloadedCheckpoints():
        scale = hidden.sum(-1, keepdim=True).requires_grad_()
        product = (hidden * weight) * scale  # keeps hidden, weight, the first product and the scale
    assert [tuple(to.shape) for to, _ in streams.copying.copies] == [(1, 4, 8)] * 2
    product.sum().backward()
    assert weight.grad.tolist() == [32.0] * 8


def test_a_graph_that_is_kept_can_be_gone_through_twice():
    values = torch.randn(2, 3, 4, requires_grad=True)
    with checkpoint_offload.OffloadedCheckpoints():
        total = (values.sin() * values.cos()).exp().sum()
    (once,) = torch.autograd.grad(total, values, retain_graph=True)
    (twice,) = torch.autograd.grad(total, values)
    assert torch.equal(once, twice)


def test_each_comes_back_once_in_whatever_order_it_is_read(streams):
    """A product reads its first factor first, which was kept first."""
    left, right = torch.randn(2, 2, 3, 4).unbind()
    with checkpoint_offload.OffloadedCheckpoints():
        product = left.requires_grad_() * right.requires_grad_()
    product.sum().backward()
    assert torch.equal(left.grad, right)
    assert len(streams.copying.copies) == 2 + 2
