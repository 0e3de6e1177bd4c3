"""Where in a model is the first number that is not finite? Hooks on its modules watch one pass forward and back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from longrl.types import Packed

Phase = Literal["weights", "forward", "loss", "backward", "gradient"]
INPUT_NAMES = ("hidden_states", "input", "x", "inputs_embeds")
"""Arguments in which modules get what they transform; masks hold infinities that are meant."""


@dataclass(frozen=True)
class Finding:
    """The first number that is not finite."""

    phase: Phase
    module: str
    """Module or parameter, as in `model.named_modules()`."""
    what: str
    """Which of its tensors, with how many such numbers."""
    place: str = ""
    """Row, completion and token, where the tensor has a row for each token."""
    before: str = ""
    """Of the numbers that it was made of."""

    def __str__(self) -> str:
        lines = [f"{self.phase}: {self.what} of {self.module}", self.place, self.before]
        return "\n  ".join(line for line in lines if line)


@dataclass
class NonfiniteWatch:
    """Watches the modules of a model within `with watch.watching(model)`.

    Example:
        ```python
        watch = NonfiniteWatch()
        with watch.watching(model):
            watch.packed = packed
            model(...).sum().backward()
        watch.finding                 # None: all numbers were finite
        ```
    """

    packed: Packed | None = None
    """The micro-batch that runs, by which a row is told."""
    row_names: Mapping[int, str] = field(default_factory=dict)
    """Number of a completion over the whole step -> what it is called."""
    finding: Finding | None = None
    weights: list[Finding] = field(default_factory=list)
    """Weights that are not finite before anything runs."""
    _readers: dict[int, str] = field(default_factory=dict)
    """Identity of a tensor -> the innermost module that read it."""

    @contextlib.contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Adds hooks to all modules and parameters, and removes them."""
        handles: list[Any] = []
        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(self._before(name), with_kwargs=True))
            handles.append(module.register_forward_hook(self._behind(name), with_kwargs=True))
        for name, weight in model.named_parameters():
            if not weight.isfinite().all():
                self.weights.append(Finding("weights", name, counted("the value", weight)))
            if weight.requires_grad:
                handles.append(weight.register_hook(self._of_gradient(name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def note(self, finding: Finding) -> None:
        """Keeps a finding if it is the first."""
        if self.finding is None:
            self.finding = finding

    # -- hooks -----------------------------------------------------------------------------------------------------

    def _before(self, name: str) -> Any:
        def look(module: nn.Module, args: Any, kwargs: Any) -> None:
            for tensor in inputs_of(args, kwargs):
                self._readers[id(tensor)] = name  # outer modules come first, so that the innermost one stays
                if self.finding is None and not tensor.isfinite().all():
                    # No module made it: an operation between modules did, a residual or attention itself.
                    self._note_tensor("forward", name, "the input, made between modules,", tensor)

        return look

    def _behind(self, name: str) -> Any:
        def look(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            made_of = inputs_of(args, kwargs)
            for tensor in floats_in(output):
                if self.finding is None and not tensor.isfinite().all():
                    self._note_tensor("forward", name, "the output", tensor, made_of, module)
                if tensor.requires_grad:
                    tensor.register_hook(self._of_output(name, tensor))

        return look

    def _of_output(self, name: str, output: Tensor) -> Any:
        """Looks at the gradient of a module's output, which the module that reads the output made."""
        value = output.detach()
        number = id(output)

        def look(gradient: Tensor) -> None:
            if self.finding is None and not gradient.isfinite().all():
                reader = self._readers.get(number, "the operations behind all modules")
                what = f"the gradient that reaches the output of {name}, made in the backward pass"
                self._note_tensor("backward", reader, what, gradient, [value])

        return look

    def _of_gradient(self, name: str) -> Any:
        def look(gradient: Tensor) -> None:
            if self.finding is None and not gradient.isfinite().all():
                self.note(Finding("gradient", name, counted("the gradient", gradient)))

        return look

    def _note_tensor(
        self,
        phase: Phase,
        name: str,
        what: str,
        tensor: Tensor,
        made_of: list[Tensor] | None = None,
        module: nn.Module | None = None,
    ) -> None:
        before = [f"it was made of {statistics(each)}" for each in (made_of or [])[:2]]
        for weight_name, weight in module.named_parameters(recurse=False) if module is not None else ():
            before.append(f"{weight_name}: {statistics(weight)}")
        first = (~tensor.isfinite()).nonzero()[0].tolist()
        place = self._place(first, tensor.shape)
        self.note(Finding(phase, name or "the model", counted(what, tensor), place, "; ".join(before)))

    def _place(self, index: list[int], shape: torch.Size) -> str:
        """Row, completion and token of an index into a tensor, where one of its dimensions counts tokens."""
        packed = self.packed
        if packed is None:
            return ""
        for dim, size in enumerate(shape):
            if size == len(packed.input_ids) and size > 1:
                return self._place_in_sequence(packed, index[dim])
        for dim, size in enumerate(shape):
            if size == len(packed.token_index) and size > 1:
                return self._place_of_row(packed, index[dim])
        return ""

    def _place_in_sequence(self, packed: Packed, position: int) -> str:
        for span in packed.spans:
            if not span.start <= position < span.stop:
                continue
            inside = (packed.predict_from >= span.start) & (packed.predict_from < span.stop)
            numbers = packed.completion_index[inside].unique().tolist()
            prompt = self.row_names.get(numbers[0], "").partition(",")[0] if numbers else ""
            token = int(packed.input_ids[position])
            offset = position - span.start
            if offset < span.prompt_tokens:
                return f"{prompt}, token {offset} of the prompt's {span.prompt_tokens} (id {token})"
            offset -= span.prompt_tokens
            filled = [length for length in span.completion_tokens if length]
            for number, length in zip(numbers, filled, strict=True):
                if offset < length:
                    return f"{self.row_names.get(number, '')}, token {offset} of {length} (id {token})"
                offset -= length
        return ""

    def _place_of_row(self, packed: Packed, row: int) -> str:
        number = int(packed.completion_index[row])
        first = int((packed.completion_index == number).nonzero()[0])
        token = int(packed.target_ids[row])
        return f"{self.row_names.get(number, '')}, the score of token {row - first} (id {token})"


# -- tensors -------------------------------------------------------------------------------------------------------


def floats_in(value: Any) -> list[Tensor]:
    """All tensors of floating point numbers in an output of a module."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, tuple | list):
        return []
    return [tensor for item in value for tensor in floats_in(item)]


def inputs_of(args: Any, kwargs: Mapping[str, Any]) -> list[Tensor]:
    """What a module transforms: its first argument, or one of the usual names."""
    named = [kwargs[name] for name in INPUT_NAMES if name in kwargs]
    return floats_in([*args[:1], *named])


def counted(what: str, tensor: Tensor) -> str:
    """The text with the numbers of what is not finite."""
    nans = int(tensor.isnan().sum())
    infinite = int(tensor.isinf().sum())
    return f"{what} ({nans} nan and {infinite} infinite of {tensor.numel()} numbers)"


def statistics(tensor: Tensor) -> str:
    """Shape, type and range of a tensor."""
    kind = str(tensor.dtype).removeprefix("torch.")
    shape = list(tensor.shape)
    known = tensor.detach()[tensor.detach().isfinite()].float()
    if not len(known):
        return f"{shape} {kind}, none of it finite"
    share = "" if len(known) == tensor.numel() else f", {tensor.numel() - len(known)} not finite"
    return f"{shape} {kind} within {float(known.min()):.4g} and {float(known.max()):.4g}{share}"
