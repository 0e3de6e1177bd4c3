"""Reward models: a language model with a head of one number, read at the last token of question and answer.

Folders are as `save_pretrained` leaves them, with safetensors weights: those of transformers' sequence classification
(Skywork-Reward and its like), or any language model with a value head beside it. Nothing is downloaded, no pickle is
read, and code in a folder is never run.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from longrl.io.number_ranges import COUNT, check_ranges
from longrl.io.pulse import PULSE
from longrl.io.weight_folder import WEIGHTS, local_weight_folder, weight_names
from longrl.rewards.answers import after_thinking
from longrl.rewards.batch import BatchReward
from longrl.types import Completion, Row

if TYPE_CHECKING:
    import torch
    from torch import Tensor

HEADS = ("score", "v_head.summary", "v_head", "value_head")
"""Where folders have their head: transformers' sequence classification; TRL and LLaMA-Factory; others."""
CLASSIFICATION_HEAD = HEADS[0]


class RewardHead(NamedTuple):
    """The affine map of a hidden state to a number."""

    name: str
    """Of its tensors in the folder, without `.weight` and `.bias`."""
    weight: Tensor
    """[H] float32."""
    bias: Tensor
    """[] float32."""


@dataclass(frozen=True)
class RewardModel(BatchReward[Completion]):
    """How good a reward model finds the answer to the row's question: a number of any size, a logit.

    Question and answer are written by the reward model's own chat template. Pictures and videos of the row are not
    shown to it. The weights lie in host memory while nothing is judged.

    Example:
        ```yaml
        - function:
            class_path: longrl.rewards.reward_model.RewardModel
            init_args: {folder: models/Skywork-Reward-V2-Qwen3-4B, dtype: bfloat16}
        ```
    """

    folder: str
    """config.json, tokenizer with chat template, and safetensors weights with the head."""
    judged: Literal["all", "after_thinking"] = "all"
    """What of a completion is shown as the answer: all of its text, or what follows `</think>`."""
    max_tokens: int = 8192
    """Limit of question and answer together; a longer completion is not judged, and left out of the loss."""
    max_tokens_per_batch: int = 32768
    """Limit of a forward pass, padding included; one longer conversation is a batch of its own."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the weights; `auto` is that of the files. The head is computed in float32."""
    device: str | None = None
    """None is the rank's GPU if there is one, else the CPU."""
    offload: bool = True
    """The weights leave the device after every rollout, and come back for the next. False keeps them there."""

    def __post_init__(self) -> None:
        check_ranges(self, "RewardModel: ", max_tokens=COUNT, max_tokens_per_batch=COUNT)

    # -- loading -------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Loads model and tokenizer.

        Raises:
            ValueError: the folder is not there, has pickled weights alone, no head, or no chat template.
        """
        _ = self._head, self._tokenizer, self._model

    @cached_property
    def _path(self) -> Path:
        return local_weight_folder(self.folder, "folder of RewardModel", "a reward model")

    @cached_property
    def _head(self) -> RewardHead:
        names = set(weight_names(self._path))
        name = next((head for head in HEADS if f"{head}.weight" in names), None)
        if name is None:
            raise ValueError(
                f"the weights in {self.folder!r} must have a head of one number, {' or '.join(HEADS)}, and have none: "
                "it is no reward model; a file v_head.safetensors beside them may hold it"
            )
        weight = self._tensor(f"{name}.weight").float()  # [1, H]
        if weight.dim() != 2 or len(weight) != 1:
            raise ValueError(
                f"{name} in {self.folder!r} must give one number, got weights of shape {list(weight.shape)}: it is a "
                "classifier of several classes; take a model of num_labels 1"
            )
        has_bias = f"{name}.bias" in names
        bias = self._tensor(f"{name}.bias").float() if has_bias else weight.new_zeros(1)
        return RewardHead(name, weight[0], bias[0])

    def _tensor(self, name: str) -> Tensor:
        from safetensors import safe_open

        for file in sorted(self._path.rglob(WEIGHTS)):
            with safe_open(file, framework="pt") as tensors:
                if name in tensors.keys():  # noqa: SIM118 (it is no dict)
                    return tensors.get_tensor(name)
        raise AssertionError(f"{name} was there before")

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self._path, local_files_only=True, trust_remote_code=False)
        if tokenizer.chat_template is None:
            raise ValueError(
                f"the tokenizer in {self.folder!r} has no chat template, by which question and answer are written; "
                "put the one that the reward model was trained with into chat_template.jinja there"
            )
        return tokenizer

    @cached_property
    def _control_tokens(self) -> re.Pattern[str]:
        """The special tokens, which its chat template alone writes."""
        declared = [token.content for token in self._tokenizer.added_tokens_decoder.values() if token.special]
        spelled = {token for token in (*declared, *self._tokenizer.all_special_tokens) if token.strip()}
        return re.compile("|".join(map(re.escape, sorted(spelled, key=len, reverse=True))) or "(?!)")

    @cached_property
    def _model(self) -> Any:
        from transformers import AutoModel

        model, loading = AutoModel.from_pretrained(
            self._path, dtype=self.dtype, local_files_only=True, use_safetensors=True, trust_remote_code=False,
            output_loading_info=True,
        )  # fmt: skip
        missing = sorted(loading["missing_keys"])
        if missing:
            raise ValueError(
                f"{self.folder!r} lacks {len(missing)} weights of its model, {missing[0]} among them; fetch it again"
            )
        return model.eval().requires_grad_(False)

    @cached_property
    def _device(self) -> torch.device:
        import torch

        return torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))

    # -- scoring -------------------------------------------------------------------------------------------------

    def score_all(self, completions: Sequence[Completion], rows: Sequence[Row]) -> list[float | Exception]:
        """The score of each completion; a ValueError for one that is too long."""
        # 1. Token ids; what is too long is not judged.
        conversations = [self.token_ids(one, row) for one, row in zip(completions, rows, strict=True)]
        judged = [index for index, ids in enumerate(conversations) if len(ids) <= self.max_tokens]
        lengths = [len(conversations[index]) for index in judged]

        # 2. Neighbours in length together, so that little is padded. The weights' copies end with this call.
        scores: dict[int, float] = {}
        weights = self._weights_on_device() if judged else {}
        for batch in token_batches(lengths, self.max_tokens_per_batch):
            PULSE.beats += 1
            indices = [judged[number] for number in batch]
            of_batch = self._score_batch(weights, [conversations[index] for index in indices])
            scores |= zip(indices, of_batch.tolist(), strict=True)
        return [scores.get(index, self._too_long(ids)) for index, ids in enumerate(conversations)]

    def _too_long(self, ids: Sequence[int]) -> ValueError:
        return ValueError(
            f"question and answer have {len(ids)} tokens, and RewardModel.max_tokens is {self.max_tokens}; raise it if "
            "the reward model reads as many"
        )

    def token_ids(self, completion: Completion, row: Row) -> list[int]:
        """Question and answer as the reward model reads them."""
        answer = completion.text if self.judged == "all" else after_thinking(completion.text)
        turns = [("user", row.problem)]
        if row.messages:
            turns = [(message["role"], message_text(message["content"])) for message in row.messages]
        turns.append(("assistant", answer))
        # A policy that spells the end of its turn, and praise behind it, would have it read as somebody else's.
        messages = [{"role": role, "content": self._control_tokens.sub(_apart, text)} for role, text in turns]
        return list(self._tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False))

    def _weights_on_device(self) -> dict[str, Tensor]:
        """The model's tensors where it computes, by name; those in host memory stay what they are."""
        return self._copied_weights() if self.offload else self._kept_weights

    def _copied_weights(self) -> dict[str, Tensor]:
        named = [*self._model.named_parameters(), *self._model.named_buffers()]
        return {name: tensor.detach().to(self._device) for name, tensor in named}

    @cached_property
    def _kept_weights(self) -> dict[str, Tensor]:
        return self._copied_weights()

    def _score_batch(self, weights: dict[str, Tensor], conversations: Sequence[Sequence[int]]) -> Tensor:
        """[B] float32 scores of B conversations, padded on the right, where no token before looks."""
        import torch
        from torch.nn.utils.rnn import pad_sequence

        ids = pad_sequence([torch.tensor(one) for one in conversations], batch_first=True)  # [B, T]
        lengths = torch.tensor([len(one) for one in conversations])
        mask = torch.arange(ids.shape[1]) < lengths[:, None]  # [B, T]
        last = torch.tensor([self._scored_position(one) for one in conversations])  # [B]
        inputs = {"input_ids": ids.to(self._device), "attention_mask": mask.long().to(self._device)}
        with torch.no_grad():
            output = torch.func.functional_call(self._model, weights, kwargs={**inputs, "use_cache": False})
            hidden = output.last_hidden_state  # [B, T, H]
            states = hidden[torch.arange(len(ids), device=self._device), last.to(self._device)].float()  # [B, H]
            scores = states @ self._head.weight.to(self._device) + self._head.bias.to(self._device)
        return scores.cpu()

    def _scored_position(self, ids: Sequence[int]) -> int:
        """Index of the token whose hidden state the head reads, the last.

        Sequence classification reads the last that is not the padding token, also where that ends a text.
        """
        pad = self._model.config.get_text_config().pad_token_id
        if self._head.name == CLASSIFICATION_HEAD and pad is not None:
            return max((index for index, token in enumerate(ids) if token != pad), default=0)
        return len(ids) - 1


def _apart(match: re.Match[str]) -> str:
    """A token that a text spells, with a blank behind its first letter: text again."""
    return f"{match[0][0]} {match[0][1:]}"


def token_batches(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Indices in batches whose longest length times their number is within a limit, the longest first.

    Args:
        lengths: of all sequences.
        limit: of tokens, padding included; a longer sequence is alone.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= limit:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def message_text(content: Any) -> str:
    """The text of a message; its media are not shown."""
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content if part.get("type") == "text")
