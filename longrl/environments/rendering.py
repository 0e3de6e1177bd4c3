"""From what an environment answers to tokens and patches: media are decoded once it is known that they are needed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from longrl.datamodules.media.sources import HeldFrames
from longrl.datamodules.media.video import hold_frames
from longrl.environments.environment import Observation, ToolResponse
from longrl.environments.tool_environment import error_response, first_line
from longrl.models.chat_tokens import literal_text
from longrl.models.reading import RendersPrompts
from longrl.turns import ToolCall
from longrl.types import Frames, Media, Observed, UnusableSample

MAX_HELD_MIB = 512
"""Frames of a media item that are handed over as patches; a larger one is decoded again while it is encoded."""
LONGEST_TOKEN = 256
"""Characters of a token, at most."""

Needed = Callable[[Sequence[str]], frozenset[str]]
"""Of some media keys those whose pixels are needed, for nobody has or makes their features."""


def all_needed(keys: Sequence[str]) -> frozenset[str]:
    """Where no features are known."""
    return frozenset(keys)


def as_observation(answer: Observation | str) -> Observation:
    """What a step answered, calls as plain values, for checkpoints and files; a text is what no call asked for.

    Raises:
        TypeError: it is neither, or the arguments of a call are nothing that JSON can hold.
    """
    if isinstance(answer, str):
        return Observation((ToolResponse((answer,), ToolCall("")),))
    if not isinstance(answer, Observation):
        raise TypeError(f"step must return an Observation, a text or None, got {type(answer).__name__}")
    return Observation(tuple(replace(one, call=_plain_call(one.call)) for one in answer.responses))


def _plain_call(call: ToolCall) -> ToolCall:
    """The same without NumPy's numbers."""
    span = None if call.span_s is None else (float(call.span_s[0]), float(call.span_s[1]))
    times = tuple(map(float, call.frame_times))
    arguments = json.loads(json.dumps(call.arguments))
    return replace(call, arguments=arguments, seconds=float(call.seconds), span_s=span, frame_times=times)


def render_observation(
    family: RendersPrompts,
    observation: Observation,
    ended: bool,
    tokens_left: int | None = None,
    needed: Needed = all_needed,
) -> Observed | None:
    """The tokens and media of what an environment answered.

    Media that a family does not read, or that cannot be decoded, become errors of the calls that asked for them.

    Args:
        family: renders.
        observation: of a step.
        ended: the turn has its end token.
        tokens_left: that the completion may still be shown; an answer with more becomes an error. None is no limit.
        needed: says whose pixels are decoded; other media are left without patches.

    Returns:
        None if not even an error fits.
    """
    # 1. The tokens, from times and sizes alone.
    responses = [_readable(family, response) for response in observation.responses]
    num_chars = sum(len(part) for response in responses for part in response.content if isinstance(part, str))
    observed = None
    if tokens_left is None or num_chars <= tokens_left * LONGEST_TOKEN:
        observed = _rendered(family, responses, ended)
    if observed is None or (tokens_left is not None and len(observed.input_ids) > tokens_left):
        assert tokens_left is not None, "without a limit it fits"
        size = f"{len(observed.input_ids)} tokens" if observed else f"{num_chars} characters"
        problem = f"the answer has {size}, more than the {tokens_left} tokens that are left; ask for less"
        return _rendered_errors(family, responses, problem, ended, tokens_left)

    # 2. The pixels of what nobody has encoded.
    frames = [part for response in responses for part in response.content if isinstance(part, Frames)]
    wanted = needed(list(dict.fromkeys(item.key for item in observed.media)))
    problems: dict[str, str] = {}
    read: dict[str, Frames] = {}
    start = time.perf_counter()
    for item, part in zip(observed.media, frames, strict=True):
        if item.key in wanted and item.key not in read and not len(part.pixels):
            try:
                read[item.key] = _with_pixels(family, part, item)
            except Exception as error:  # a damaged frame
                reason = error.reason if isinstance(error, UnusableSample) else first_line(error)
                problems[item.key] = f"it cannot be shown ({reason}); ask for something else"
    if problems:
        by_key = dict(zip(map(id, frames), (item.key for item in observed.media), strict=True))
        responses = [_without_broken(response, problems, by_key) for response in responses]
        return render_observation(family, Observation(tuple(responses)), ended, tokens_left, needed)
    seconds = time.perf_counter() - start

    # 3. Patches, where pixels are, and where to get them again.
    whole = [read.get(item.key, part) for item, part in zip(observed.media, frames, strict=True)]
    media = tuple(_patched(family, whole, frames)) if read else observed.media
    media = tuple(
        replace(item, source=part.source or HeldFrames(part)) for item, part in zip(media, frames, strict=True)
    )
    calls = observed.calls
    if read:  # decoding is a part of the answer
        calls = tuple(replace(call, seconds=call.seconds + seconds / len(calls)) for call in calls)
    return replace(observed, media=media, calls=calls)


def _readable(family: RendersPrompts, response: ToolResponse) -> ToolResponse:
    """A response, or an error where the family cannot read its media."""
    for part in response.content:
        if isinstance(part, str):
            continue
        try:
            if not family.reads_media(part.kind):
                raise UnusableSample(None, f"{type(family).__name__} reads no {part.kind}")
            family.outline_media(part)
        except Exception as error:  # a picture that is too thin, say
            reason = error.reason if isinstance(error, UnusableSample) else first_line(error)
            call = response.call
            return error_response(call.name, call.arguments, f"it cannot be shown ({reason})", call.seconds)
    return response


def _rendered(family: RendersPrompts, responses: Sequence[ToolResponse], ended: bool) -> Observed:
    contents = [tuple(_plain(part) for part in response.content) for response in responses]
    return family.observation(contents, ended, tuple(response.call for response in responses))


def _plain(part: str | Frames) -> str | Frames:
    """Text that files and tokenizers can hold."""
    return literal_text(part.encode("utf-8", "replace").decode()) if isinstance(part, str) else part


def _rendered_errors(
    family: RendersPrompts, responses: Sequence[ToolResponse], problem: str, ended: bool, tokens_left: int
) -> Observed | None:
    """An error for each response or, where these do not fit, one for all; None if it does not fit either."""
    calls = [response.call for response in responses]
    errors = [error_response(call.name, call.arguments, problem, call.seconds) for call in calls]
    for told in (errors, errors[:1], [error_response("", {}, "no room is left")]):
        observed = _rendered(family, told, ended)
        if len(observed.input_ids) <= tokens_left:
            return replace(observed, calls=tuple(error.call for error in errors))
    return None


def _without_broken(response: ToolResponse, problems: dict[str, str], keys: dict[int, str]) -> ToolResponse:
    """A response, or an error if its media cannot be decoded."""
    for part in response.content:
        if isinstance(part, Frames) and keys[id(part)] in problems:
            call = response.call
            return error_response(call.name, call.arguments, problems[keys[id(part)]], call.seconds)
    return response


def _with_pixels(family: RendersPrompts, frames: Frames, item: Media) -> Frames:
    """Frames with pixels at the encoder's size, if they go through the encoder at once and are not too large."""
    assert frames.source is not None, "without pixels there is a source"
    parts = map(family.resize, frames.source())
    if item.grid_thw[0] > family.temporal_patches_per_encode(item):
        for _ in parts:  # it is encoded part by part from its source; what is damaged shows now
            pass
        return frames
    held = hold_frames(parts, len(frames.timestamps), MAX_HELD_MIB)
    return frames if held is None else held


def _patched(family: RendersPrompts, whole: Sequence[Frames], frames: Sequence[Frames]) -> list[Media]:
    """Media items with patches in the encoder's precision where their frames have pixels."""
    dtype = getattr(torch, family.dtype)
    return [item.with_patches_in(dtype) for item in family.patch_all(whole)]
