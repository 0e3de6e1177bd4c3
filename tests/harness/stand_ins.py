"""What longrl uses of lmms-eval 0.7.2 (75571cfe) and VLMEvalKit 0.2rc1 (e8e78f05), with their names and arguments.

The packages themselves are too large for tests: what stands here was compared with them, and the adapters were run
under both (docs/harnesses.md).
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from types import ModuleType
from typing import Any


def lmms_eval_modules() -> dict[str, ModuleType]:
    """Name -> module."""

    class lmms(abc.ABC):  # its name there
        is_simple = True

        def __init__(self):
            self._rank, self._world_size = 0, 1
            self.cache_hook = CacheHook()
            self.task_dict = {}

        @abc.abstractmethod
        def loglikelihood(self, requests): ...
        @abc.abstractmethod
        def generate_until(self, requests): ...
        @abc.abstractmethod
        def generate_until_multi_round(self, requests): ...

        @classmethod
        def create_from_arg_string(cls, arg_string, additional_config=None):
            pairs = [pair.split("=", 1) for pair in arg_string.split(",")]
            given = {name: int(value) if value.isnumeric() else value for name, value in pairs}
            more = {name: value for name, value in (additional_config or {}).items() if value is not None}
            return cls(**given, **more)

        def clean(self):
            self.cleaned = True

    class CacheHook:
        def add_partial(self, attr, req, res): ...

    @dataclass
    class TokenCounts:
        input_tokens: int | None = None
        output_tokens: int | None = None
        reasoning_tokens: int | None = None

    @dataclass
    class GenerationResult:
        text: str
        token_counts: TokenCounts | None = None

    @dataclass
    class Instance:
        arguments: tuple

        @property
        def args(self):
            return self.arguments

    @dataclass(frozen=True)
    class ModelManifest:
        model_id: str
        simple_class_path: str | None = None
        chat_class_path: str | None = None
        aliases: tuple[str, ...] = ()

    parts = {
        "lmms_eval.api.model": {"lmms": lmms},
        "lmms_eval.api.instance": {
            "GenerationResult": GenerationResult, "Instance": Instance, "TokenCounts": TokenCounts,
        },
        "lmms_eval.models.registry_v2": {"ModelManifest": ModelManifest},
    }  # fmt: skip
    return _modules(parts)


def vlmevalkit_modules() -> dict[str, ModuleType]:
    """Name -> module."""

    class BaseModel:
        INTERLEAVE = False
        allowed_types = ("text", "image", "video")

        def __init__(self):
            self.dump_image_func = None

        def use_custom_prompt(self, dataset):
            return False

        def generate(self, message, dataset=None):
            for item in message:
                assert item["type"] in self.allowed_types
            return self.generate_inner(message, dataset)

    return _modules({"vlmeval.vlm.base": {"BaseModel": BaseModel}, "vlmeval.config": {"supported_VLM": {}}})


def _modules(parts: dict[str, dict[str, Any]]) -> dict[str, ModuleType]:
    made: dict[str, ModuleType] = {}
    for name, members in parts.items():
        steps = name.split(".")
        for end in range(1, len(steps) + 1):
            path = ".".join(steps[:end])
            made.setdefault(path, ModuleType(path))
        vars(made[name]).update(members)
    for path, module in made.items():
        parent, _, own = path.rpartition(".")
        if parent:
            setattr(made[parent], own, module)
    return made
