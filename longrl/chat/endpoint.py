"""Requests to a model behind an OpenAI-compatible endpoint, and its replies."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar

from longrl.chat.frames import MessagePart
from longrl.io.jsonl import parse_json
from longrl.io.number_ranges import NOT_NEGATIVE, SECONDS, SECONDS_OR_ZERO, check_ranges
from longrl.io.secrets import check_no_password, mask_secrets

Content = str | list[MessagePart]
ImageLoader = Callable[[], Mapping[str, str]]
MEDIA_PARTS = {"image_url": "(this frame is broken)", "video_url": "(this video is broken)"}
"""Kind of a part that names what it shows -> the text in the place of what cannot be shown."""
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
SECRET = re.compile(r"api_?key|authorization|password|secret|access_?token", re.IGNORECASE)
"""Names of fields that hold keys, which would be in the config of the run and in its journal."""


@dataclass(frozen=True)
class Endpoint:
    """A model behind any server that speaks OpenAI's chat completions: vLLM, `python -m longrl serve`, a hosted one.

    Example:
        `Endpoint(model="Qwen/Qwen2.5-VL-7B-Instruct", url="http://127.0.0.1:8000/v1")`
    """

    model: str
    """Name under which the server has the model."""
    url: str = "http://127.0.0.1:8000/v1"
    """Address of the server, up to and with `/v1`."""
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable with the key; the key itself is in no config and no file."""
    concurrency: int = 16
    """Most calls that wait for a reply at the same time."""
    timeout_s: float = 300.0
    """Limit of one call, in seconds, until all of its reply has come."""
    max_reply_mib: int = 16
    """Limit of a reply, unpacked; of a larger one no more is read."""
    retries: int = 6
    """Further attempts after 429, 5xx, a timeout, a lost connection or a reply that is cut or no JSON."""
    backoff_s: float = 1.0
    """Wait before the second attempt; it doubles, and each wait is drawn from its upper half (jitter)."""
    max_backoff_s: float = 60.0
    """Longest wait between two attempts."""
    input_price: float = 0.0
    """Money per million prompt tokens, for the budget and the reports."""
    output_price: float = 0.0
    """Money per million completion tokens."""
    send_seed: bool = True
    """True sends `seed`, the number of a sample. Off for servers that refuse it, and for vLLM 0.32 on a CPU, which
    dies of a seeded request whose prompt is prefilled in parts; samples then differ as the server draws them."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of the request's body, e.g. `{"chat_template_kwargs": {"enable_thinking": false}}`."""

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url of an endpoint must begin with http:// or https://, got {self.url!r}")
        check_no_password(self.url, "url of an endpoint")
        if VARIABLE.fullmatch(self.key_variable) is None:  # what is there may be a key: it is not said
            raise ValueError("key_variable of an endpoint must name an environment variable: it is not the key itself")
        for name in self.extra:
            if SECRET.search(name):
                raise ValueError(
                    f"extra of an endpoint must hold no key, has {name!r}; set it in the environment variable that "
                    "key_variable names"
                )
        if not self.model:
            raise ValueError(f"an endpoint needs the name of its model, got {self.model!r}; `curl {self.url}/models`")
        limits = {"concurrency": 1, "max_reply_mib": 1, "retries": 0}
        for name, least in limits.items():
            if not getattr(self, name) >= least:
                raise ValueError(f"{name} of an endpoint must be at least {least}, got {getattr(self, name)}")
        check_ranges(self, input_price=NOT_NEGATIVE, output_price=NOT_NEGATIVE)
        check_ranges(self, timeout_s=SECONDS, backoff_s=SECONDS_OR_ZERO, max_backoff_s=SECONDS_OR_ZERO)

    @property
    def is_local(self) -> bool:
        """On this machine, where no proxy is asked."""
        return self.url.split("//", 1)[1].startswith(LOOPBACK)

    def request(
        self, content: Content, decoding: Decoding, sample: int = 0, load: ImageLoader | None = None
    ) -> Request:
        """A request of one user message; see `Request` for the arguments."""
        return Request(self.model, ({"role": "user", "content": content},), decoding, sample, self.extra, load)

    @property
    def headers(self) -> dict[str, str]:
        """The header with the key, if there is one."""
        key = os.environ.get(self.key_variable)
        return {"Authorization": f"Bearer {key}"} if key else {}

    def price(self, prompt_tokens: int, completion_tokens: int) -> float:
        """Money for so many tokens."""
        return (prompt_tokens * self.input_price + completion_tokens * self.output_price) / 1e6


@dataclass(frozen=True)
class Decoding:
    """Options by which a reply is drawn."""

    temperature: float = 0.6
    """Divides the logits; 0 takes the likeliest token."""
    max_tokens: int = 4096
    """Limit of a reply; one that reaches it counts as cut."""
    top_p: float = 1.0
    """Draw from the likeliest tokens whose probabilities sum to this; 1.0 is all."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf or self.max_tokens < 1 or not 0 < self.top_p <= 1:
            raise ValueError(
                "temperature must be at least 0, max_tokens at least 1 and top_p in (0, 1], got "
                f"{self.temperature}, {self.max_tokens} and {self.top_p}"
            )


@dataclass(frozen=True)
class Budget:
    """Limits of a folder's calls, over all runs on it; None is no limit.

    Calls are counted before they are made, so that limit is exact. What a call costs is known afterwards: calls that
    are under way when the limit of tokens or money is reached (`concurrency` at most) still come in.
    """

    max_calls: int | None = None
    """Answered or failed, each attempt is one."""
    max_tokens: int | None = None
    """Limit of prompts and completions, as the servers count them."""
    max_cost: float | None = None
    """In the currency of the endpoints' prices."""

    def __post_init__(self) -> None:
        check_ranges(self, "budget.", max_calls=NOT_NEGATIVE, max_tokens=NOT_NEGATIVE, max_cost=NOT_NEGATIVE)


@dataclass(frozen=True)
class Request:
    """One chat completion, with images by name.

    Example:
        `Request("qwen", ({"role": "user", "content": "Hello"},), Decoding(temperature=0.0))`
    """

    model: str
    messages: tuple[Mapping[str, Any], ...]
    """OpenAI's; an image part's url is `frame:`, a video part's `video:`, and a name that its content decides."""
    decoding: Decoding
    sample: int = 0
    """Number of the draw: another sample is another call, with another seed."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    load: ImageLoader | None = field(default=None, compare=False)
    """Gives the urls of image and video parts those that are sent; called only when the call is made. What is missing
    becomes the text that it is broken."""
    path: ClassVar[str] = "/chat/completions"
    """Behind the endpoint's url."""

    @property
    def num_images(self) -> int:
        """Images and videos that the messages name."""
        listed = [message["content"] for message in self.messages if isinstance(message["content"], list)]
        return sum(part["type"] in MEDIA_PARTS for parts in listed for part in parts)

    @property
    def key(self) -> str:
        """Hash of all that decides the reply: model, messages with the names of their images, decoding, sample."""
        d = self.decoding
        parts = [self.model, self.messages, d.temperature, d.max_tokens, d.top_p, self.sample, dict(self.extra)]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=True).encode()).hexdigest()

    def again(self, form: str) -> Request:
        """The request once more, with the form that a reply to it did not have."""
        text = f"An earlier reply to this could not be used. Reply in this form: {form}"
        *before, last = self.messages
        content = last["content"]
        content = f"{content}\n\n{text}" if isinstance(content, str) else [*content, {"type": "text", "text": text}]
        return replace(self, messages=(*before, {**last, "content": content}))

    def body(self, images: Mapping[str, str], send_seed: bool) -> dict[str, Any]:
        """The JSON that is sent, images included."""

        def show(content: Content) -> Content:
            return content if isinstance(content, str) else [_shown_part(part, images) for part in content]

        return {
            "model": self.model,
            "messages": [{**message, "content": show(message["content"])} for message in self.messages],
            "temperature": self.decoding.temperature,
            "top_p": self.decoding.top_p,
            "max_tokens": self.decoding.max_tokens,
            **({"seed": self.sample} if send_seed else {}),
            **self.extra,
        }

    def recorded(self) -> dict[str, Any]:
        """What the log of replies keeps of it."""
        return {"messages": list(self.messages), "decoding": asdict(self.decoding), "sample": self.sample}

    def read(self, content: bytes) -> tuple[Any, Reply]:
        """See `read_reply`."""
        return read_reply(content)

    def read_again(self, entry: Mapping[str, Any]) -> Reply:
        """The reply in an entry of the log."""
        return Reply.of(entry["response"], entry.get("broken_images", 0))


def _shown_part(part: MessagePart, images: Mapping[str, str]) -> MessagePart:
    """A message part with its image or video instead of a name."""
    kind = part["type"]
    if kind not in MEDIA_PARTS:
        return part
    name = part[kind]["url"]
    return (
        {"type": kind, kind: {"url": images[name]}} if name in images else {"type": "text", "text": MEDIA_PARTS[kind]}
    )


@dataclass(frozen=True)
class Reply:
    """Answer of a model."""

    text: str
    """"" for a reply without text."""
    finish_reason: str
    """`stop`, `length` for one cut at max_tokens, `content_filter`, or the server's own."""
    refusal: str | None
    """The text that the server itself marked as a refusal."""
    prompt_tokens: int
    completion_tokens: int
    broken_images: int = 0
    """Images that the request named and that could not be shown."""
    reasoning: str = ""
    """Thinking that the server tells apart from the text."""

    @classmethod
    def of(cls, answer: Any, broken_images: int = 0) -> Reply:
        """Reads the JSON of a chat completion.

        Raises:
            ValueError: it is none.
        """
        try:
            choice = answer["choices"][0]
            message, usage = choice["message"], answer.get("usage") or {}
            reason = choice.get("finish_reason") or "stop"
            tokens = {name: int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")}
            text = _text_of(message.get("content")) + _calls_text(message.get("tool_calls") or ())
            refusal = None if message.get("refusal") is None else str(message["refusal"])
            reasoning = message.get("reasoning_content") or message.get("reasoning")
            reasoning = reasoning if isinstance(reasoning, str) else ""
            return cls(text, str(reason), refusal, broken_images=broken_images, reasoning=reasoning, **tokens)
        except (KeyError, IndexError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"it is no chat completion ({type(error).__name__}: {error})") from error


def _text_of(content: Any) -> str:
    """The text of a message, whose content may be a list of parts."""
    if isinstance(content, list):
        content = "".join(part["text"] for part in content if part.get("type", "text") == "text")
    if not isinstance(content, str | None):
        raise TypeError(f"its content must be text, got {type(content).__name__}")
    return content or ""


def _calls_text(calls: Sequence[Any]) -> str:
    """Tool calls that the server tells apart from the text, as the model will have written them."""
    functions = [call["function"] for call in calls]
    written = [
        f'{{"name": {json.dumps(one["name"])}, "arguments": {one.get("arguments") or "{}"}}}' for one in functions
    ]
    return "".join(f"\n<tool_call>\n{call}\n</tool_call>" for call in written)


def read_reply(content: bytes) -> tuple[Any, Reply]:
    """The JSON of a server's answer, and the reply in it.

    Raises:
        ValueError: it is no chat completion.
    """
    answer = mask_secrets(parse_json(content))  # a server may tell what it was sent
    return answer, Reply.of(answer)
