"""A policy behind an OpenAI-compatible endpoint: a family whose prompts are messages, and many calls at once."""

from __future__ import annotations

import asyncio
import functools
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import httpx
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from typing_extensions import override

from longrl.chat.client import AGAIN, CONNECT_S, BudgetSpent, CallFailed, ChatClient, ReplyCache
from longrl.chat.endpoint import Budget, Decoding, Endpoint
from longrl.chat.event_loop import run_async, run_workers
from longrl.chat.frames import (
    JPEG_QUALITY,
    MessagePart,
    data_url,
    frame_name,
    frame_parts,
    image_part,
    video_data_url,
    video_name,
    video_part,
)
from longrl.datamodules.loading.render import KnowsFeatures
from longrl.datamodules.media.frame_lists import FRAME_LIST_SUFFIX
from longrl.datamodules.media.opening import decoder_errors
from longrl.datamodules.media.sources import FileFrames
from longrl.datamodules.media.video import content_digest
from longrl.evaluation.answering import Answer, Item, Policy, SaveAnswers, hash_json
from longrl.evaluation.costs import measured
from longrl.io.atomic import atomic_write
from longrl.io.number_ranges import COUNT, check_ranges
from longrl.models.chat_tokens import MEDIA_TAG, NO_TOKENIZER, hermes_calls, literal_text
from longrl.models.reading import RendersPrompts
from longrl.models.tool_prompts import join_answers
from longrl.types import AudioClip, Frames, Media, MediaKind, Prompt, Row, SamplingParams, UnusableSample

logger = logging.getLogger(__name__)

VideoAs = Literal["frames", "video"]
SENT_WHOLE = "video_as=video sends whole files; set the policy's video_as to frames"


@dataclass(frozen=True)
class ChatPrompt(Prompt):
    """A prompt as messages; it has no token ids, for the tokenizer is the server's."""

    text: str = ""
    """The question, perhaps with tags that place the media."""
    messages: tuple[Mapping[str, Any], ...] = ()
    """Of a conversation, with all media in their places."""


class ChatReader(RendersPrompts):
    """A family for models that are elsewhere: frames stay pixels, a prompt stays text.

    Args:
        max_side: longest side of a frame that is sent, in pixels.
        video_as: `video` leaves a video as it is, in its file.

    What a question spells of control tokens is sent as it is: whether it is control or text is the server's affair.
    """

    chat = NO_TOKENIZER

    def __init__(self, max_side: int, video_as: VideoAs = "frames") -> None:
        self.max_side = max_side
        self.video_as = video_as

    @override
    def reads_media(self, kind: MediaKind) -> bool:
        return kind != "audio"

    @override
    def resize(self, frames: Frames) -> Frames:
        """Frames no larger than `max_side`."""
        if frames.resized or max(frames.pixels.shape[2:]) <= self.max_side:
            return replace(frames, resized=True)
        images = [_image(pixels) for pixels in frames.pixels]
        for image in images:
            image.thumbnail((self.max_side, self.max_side), Image.Resampling.LANCZOS)
        pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images])
        return replace(frames, pixels=pixels, resized=True)

    @override
    def outline_media(self, frames: Any) -> Media:
        """The frames as a media item, a temporal patch each; pixels may be elsewhere."""
        resized = self.resize(frames) if len(frames.pixels) else frames
        grid = (len(frames.timestamps), *resized.pixels.shape[2:])
        return Media(frames.kind, resized.pixels, grid, 0.0, frames.timestamps, frames.key)

    @override
    def render(
        self, row: Row, text: str, frames: Sequence[Frames | AudioClip] = (), response: str | None = None
    ) -> ChatPrompt:
        """The prompt of a row.

        Raises:
            UnusableSample: of a video that is sent whole only a part is asked about, or it is a list of frames.
        """
        for item in frames if self.video_as == "video" else ():
            source = item.source
            if isinstance(source, FileFrames) and (source.sampling.span_s or source.sampling.at_s):
                raise UnusableSample(source.path, f"a part of it is asked about (span_s, parts_s), and {SENT_WHOLE}")
            if isinstance(source, FileFrames) and source.path.endswith(FRAME_LIST_SUFFIX):
                raise UnusableSample(source.path, f"it is a list of frames, and {SENT_WHOLE}")
        none = torch.empty(0, dtype=torch.int64)
        return ChatPrompt(
            row.id, none, none[None], tuple(map(self.outline_media, frames)), row, text=text, messages=row.messages
        )


class SentFiles:
    """Knows that no video need be decoded: the server gets its file."""

    def has(self, key: str) -> bool:
        """True for every video."""
        return True


class EndpointPolicy(Policy):
    """A model that a server runs: vLLM, or a hosted one. Frames are sent as JPEG, each behind its time, or files whole.

    Every reply is kept in `responses/` of the evaluation's folder, and no call that was answered is made again.

    Args:
        endpoint: which model, where.
        revision: what the server runs under that name, such as a commit: a server does not tell its weights, so two
            models that are served under one name are told apart by this, and by the `root` that vLLM tells, alone.
        max_side: longest side of a frame in pixels.
        budget: over all calls of this model and revision in the evaluation's folder.
        video_as: `frames` sends those that `data.video` samples, as pictures; `video` the file, as `video_url`, which
            vLLM takes: the server samples it by what `endpoint.extra` tells it, and `data.video` decides nothing.
        video_url: of a file, the content itself (`data`), or its path (`file`), for a server that may read it
            (vLLM's `--allowed-local-media-path`).
    """

    def __init__(
        self,
        endpoint: Endpoint,
        revision: str | None = None,
        max_side: int = 448,
        budget: Budget | None = None,
        video_as: VideoAs = "frames",
        video_url: Literal["data", "file"] = "data",
    ) -> None:
        if video_as not in ("frames", "video") or video_url not in ("data", "file"):
            raise ValueError(
                f"video_as must be frames or video and video_url data or file, got {video_as!r} and {video_url!r}"
            )
        check_ranges(locals(), "policy.init_args.", max_side=COUNT)
        self.endpoint = endpoint
        self.revision = revision
        self.max_side = max_side
        self.video_as = video_as
        self.video_url = video_url
        self.samples_frames = video_as == "frames"
        self.family = ChatReader(max_side, video_as)
        self.budget = budget
        self._replies: ReplyCache | None = None
        self._served: dict[str, Any] = {}

    @override
    def prepare(self, folder: Path) -> None:
        if self.revision is None:
            logger.warning(
                "the policy's revision is null: answers of another model that is served as %r later are taken for this "
                "one's; set it to the commit or name of what runs", self.endpoint.model
            )  # fmt: skip
        # What the server said the last time counts as well: answers that are on disk are scored without it.
        path = folder / "served.json"
        known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        name = f"{self.endpoint.model} at {self.endpoint.url}"
        served = served_model(self.endpoint)
        if served is not None:
            known[name] = served
            atomic_write(path, json.dumps(known, indent=2) + "\n")
        self._served = known.get(name, {})
        # A folder of its own for every model: a request does not say which revision it is for.
        self._replies = ReplyCache(str(folder / "responses" / hash_json(self.identity())[:16]), self.budget)

    @override
    def identity(self) -> dict[str, Any]:
        sent = {"frames": f"JPEG {JPEG_QUALITY}, at most {self.max_side} pixels"}
        if self.video_as == "video":
            sent = {"frames": "sampled by the server", "video_as": "video"}
        return {
            "model": self.endpoint.model,
            "revision": self.revision,
            "served": self._served,
            "engine": "endpoint",
            "extra": dict(self.endpoint.extra),
            **sent,
        }

    @override
    def stored(self) -> KnowsFeatures | None:
        return SentFiles() if self.video_as == "video" else None

    @override
    def check(self, sampling: SamplingParams) -> None:
        if sampling.top_k and self.endpoint.extra.get("top_k") != sampling.top_k:
            raise ValueError(
                f"sampling.top_k={sampling.top_k} is no option of OpenAI's chat completions; set it to 0, or give it "
                f'by the policy\'s endpoint.extra as well, to a server that knows it: {{"top_k": {sampling.top_k}}}'
            )

    @override
    def answer(self, batches: Iterable[Sequence[Item]], sampling: SamplingParams, seed: int, save: SaveAnswers) -> None:
        items = (item for batch in batches for item in batch)
        run_async(lambda: self._answer_all(items, sampling, seed, save))

    async def _answer_all(self, items: Iterator[Item], sampling: SamplingParams, seed: int, save: SaveAnswers) -> None:
        """Asks as many at once as the endpoint takes; the next prompt is read when there is room."""
        assert self._replies is not None, "prepare comes first"
        turn, spent = asyncio.Lock(), list[BudgetSpent]()

        async def work(client: ChatClient) -> None:
            while True:
                async with turn:  # decoding goes on beside the calls, one prompt at a time
                    item = await asyncio.to_thread(next, items, None)
                if item is None or spent:
                    return
                try:
                    save({item[0]: await self._ask(client, *item, sampling, seed)})
                except BudgetSpent as error:  # calls that are under way still come in
                    spent.append(error)

        async with ChatClient(self.endpoint, self._replies) as client:
            await run_workers([work(client) for _ in range(self.endpoint.concurrency)])
        if spent:
            raise spent[0]

    async def _ask(
        self, client: ChatClient, index: int, prompt: Prompt, sampling: SamplingParams, seed: int
    ) -> Answer | UnusableSample:
        assert isinstance(prompt, ChatPrompt)
        decoding = Decoding(sampling.temperature, sampling.max_completion_tokens, sampling.top_p)
        load = functools.partial(_media_urls, prompt, self.max_side, self.video_as, self.video_url)
        try:
            messages = await asyncio.to_thread(_messages, prompt, self.max_side, self.video_as)  # reads a video's file
            requests = [
                self.endpoint.request(messages[-1]["content"], decoding, sample, load if prompt.media else None)
                for sample in range(seed, seed + sampling.num_generations)
            ]
            if len(messages) > 1:
                requests = [replace(request, messages=messages) for request in requests]
            replies = [await client.ask(request) for request in requests]
        except CallFailed as error:
            return UnusableSample(None, f"no reply: {error}", index, prompt.id)
        except UnusableSample as error:  # a video's file is gone
            return error.of_row(index, prompt.id)
        is_seen = self.samples_frames
        return Answer(
            texts=[_with_opening(reply.text) for reply in replies],
            finish_reasons=[reply.finish_reason for reply in replies],
            num_completion_tokens=[reply.completion_tokens for reply in replies],
            num_prompt_tokens=replies[0].prompt_tokens,
            num_media_tokens=None,
            input=literal_text(prompt.text),
            prompt_hash=hash_json(requests[0].messages),
            frame_indices=[list(indices) for indices in prompt.frame_indices] if is_seen else [],
            frame_times=[list(times) for times in prompt.frame_times] if is_seen else [],
            num_torn=len(prompt.torn_videos),
            video_s=list(prompt.video_s),
            measured=measured(prompt),
        )


def served_model(endpoint: Endpoint) -> dict[str, Any] | None:
    """The entry of the model in `/v1/models`: `id` and, of vLLM, `root`, the weights' folder or hub id.

    A folder goes by its name and a hash of its path, so that two exports of one name differ. `created` is left out:
    vLLM's is the time of the question.

    Returns:
        Empty where the server has no such route or does not list the model; None if it cannot be reached or is busy.
    """
    with httpx.Client(headers=endpoint.headers, timeout=CONNECT_S, trust_env=not endpoint.is_local) as client:
        try:
            reply = client.get(f"{endpoint.url.rstrip('/')}/models")
        except httpx.TransportError:
            return None
    if reply.status_code in AGAIN or reply.status_code >= 500:
        return None
    try:
        (model,) = [model for model in reply.json()["data"] if model["id"] == endpoint.model]
    except (ValueError, KeyError, TypeError):  # no such route, or another kind of server
        return {}
    root = model.get("root")
    if root and Path(root).is_absolute():
        root = f"{Path(root).name} ({hash_json(root)[:8]})"
    return {"id": model["id"]} | ({"root": root} if root else {})


def _messages(prompt: ChatPrompt, max_side: int, video_as: VideoAs) -> tuple[dict[str, Any], ...]:
    """OpenAI's messages: all of a conversation, else the question with its media."""
    media = iter(prompt.media)
    if prompt.messages:
        return tuple(
            {"role": message["role"], "content": _content(message["content"], media, max_side, video_as)}
            for message in _plain_messages(prompt.messages)
        )
    if not prompt.media:
        return ({"role": "user", "content": literal_text(prompt.text)},)
    # Media stand where the text's tags place them, else before it.
    is_tagged = MEDIA_TAG.search(prompt.text) is not None
    text = prompt.text if is_tagged else "".join(f"<{item.kind}>" for item in prompt.media) + prompt.text
    parts = []
    for index, part in enumerate(MEDIA_TAG.split(text)):  # kinds of media lie at odd indices between texts
        parts.append({"type": part} if index % 2 else {"type": "text", "text": literal_text(part)})
    return ({"role": "user", "content": _content(parts, media, max_side, video_as)},)


def _plain_messages(messages: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """A conversation in roles that any server takes: calls are text, and the user says what tools answered."""
    said = []
    for message in messages:
        content = message["content"]
        if message.get("tool_calls"):
            content = [*content, {"type": "text", "text": hermes_calls(message["tool_calls"])}]
        said.append({**message, "content": content})
    return join_answers(said)


def _content(
    parts: Sequence[Mapping[str, str]], media: Iterator[Media], max_side: int, video_as: VideoAs
) -> list[MessagePart]:
    """Message parts with the next media in their places; a video is its frames, each behind its time."""
    content: list[MessagePart] = []
    for part in parts:
        if part["type"] == "text":
            content.append({"type": "text", "text": part["text"]})
            continue
        item = next(media)
        names = [frame_name(item.key, index, max_side) for index in range(len(item.timestamps))]
        if item.kind == "video" and video_as == "video":
            content.append(video_part(video_name(content_digest(_file_of(item)))))
        elif item.kind == "video":  # each frame behind its time
            content += frame_parts(names, item.timestamps)
        else:
            content += [image_part(name) for name in names]
    return [part for part in content if part.get("text") != ""]


def _with_opening(text: str) -> str:
    """A reply with the `<think>` that the server's chat template has written before it.

    Only a reply that ends its thinking tells; one that was cut before reads like one without.
    """
    thinking, closing, _ = text.partition("</think>")
    return f"<think>{text}" if closing and "<think>" not in thinking else text


def _file_of(item: Media) -> str:
    """Path of the file that a video was not decoded from."""
    assert isinstance(item.source, FileFrames), "the renderer leaves sent files where they are"
    return item.source.path


def _media_urls(
    prompt: ChatPrompt, max_side: int, video_as: VideoAs, video_url: Literal["data", "file"]
) -> dict[str, str]:
    """Name -> url of every frame or video.

    Raises:
        UnusableSample: a video's file cannot be read any more.
    """
    urls = {}
    reader = ChatReader(max_side)
    for item in prompt.media:
        if item.kind == "video" and video_as == "video":
            path = _file_of(item)
            with decoder_errors(path):
                url = video_data_url(path) if video_url == "data" else Path(path).resolve().as_uri()
            urls[video_name(content_digest(path))] = url
            continue
        pieces: Iterable[Tensor] = [item.patches]  # [F, 3, H, W] each
        if item.source is not None:  # of a long video the file is decoded again, part by part
            pieces = (reader.resize(part).pixels for part in item.source() if isinstance(part, Frames))
        for index, frame in enumerate(frame for piece in pieces for frame in piece):
            urls[frame_name(item.key, index, max_side)] = data_url(_image(frame))
    return urls


def _image(pixels: Tensor) -> Image.Image:
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())
