"""Step trace: a model answers questions with tools; what it said and saw becomes a target of SFT, if it was right.

A trace is kept if its answer is right, if it has calls and all were answered, and if the same calls, made anew, are
answered alike: then a loader shows the same frames.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image

from longrl.chat.client import ChatClient
from longrl.chat.endpoint import Endpoint, ImageLoader, Reply, Request
from longrl.chat.frames import MessagePart, data_url, frame_name, frame_parts, image_part
from longrl.datamodules.rows.question_rows import longvideo_reason_row, row_or_error
from longrl.datamodules.rows.sources import media_root_of, read_records
from longrl.environments.environment import Environment, Observation
from longrl.environments.rendering import as_observation
from longrl.environments.traces import record_trace, tool_messages
from longrl.io.functions import import_function
from longrl.models.tool_prompts import offer_text
from longrl.pipeline.asking import Task, UnusableReply, answered_text, ask_all
from longrl.pipeline.config import TraceOptions
from longrl.pipeline.prompt_folder import Prompts
from longrl.pipeline.step_run import Record, StepRun
from longrl.pipeline.video_frames import BrokenVideo, FrameSet, file_digest, frame_times, middle_frames
from longrl.rewards.reward_sum import RULE_TASKS, accuracy
from longrl.types import Completion, Frames, Row, UnusableSample

STEP_S = 120.0
"""For tools to answer a turn: one that hangs costs its record."""
TRACE_FORM = (
    "<think> with your thoughts </think>, then either calls in <tool_call> tags, JSON with name and arguments, or the "
    "final answer in <answer> tags"
)


def write_traces(run: StepRun) -> None:
    """Writes the records of the questions whose trace is kept, with `trace` and `tools`."""
    options, report = run.config.trace, run.report
    source = options.records or str(run.workspace.path("dataset") / "sft.jsonl")
    media_root = options.media_root or media_root_of(source)
    items: list[Record] = []
    for index, record in enumerate(read_records(source)):
        if len(items) == options.max_records:
            break
        row = row_or_error(longvideo_reason_row, record, index, media_root)
        problem = _why_not(row)
        if problem is None:
            assert isinstance(row, Row)
            items.append({"id": row.id, "record": record, "row": row})
        else:
            report.add_problem(str(record.get("problem_id", index)), "left out", problem)
    make = functools.partial(import_function(options.tools, "trace.tools", classes=True), **options.tool_options)
    endpoint = run.config.endpoint("policy")
    talk = TraceTalk(endpoint, options, Prompts(run.config.prompts), make, media_root)
    task = Task(talk.begin, _unread, TRACE_FORM, options.attempts, go_on=talk.go_on)
    traces = ask_all(run, items, task, endpoint)
    tools = list(make().tools)
    kept = [
        {**item["record"], "trace": trace, "tools": tools}
        for item, trace in zip(items, traces, strict=True)
        if trace is not None
    ]
    report.counts["kept"] = len(kept)
    run.workspace.write("trace", kept)


def _why_not(row: Row | Sequence[Any] | ValueError) -> str | None:
    """Why a record can have no trace; None if it can."""
    if not isinstance(row, Row):
        return str(row) if isinstance(row, ValueError) else "it has several questions"
    if len(row.videos) != 1 or row.images or row.audios or "://" in row.videos[0]:
        return "it needs one video, in a file here, and nothing else"
    if row.task not in RULE_TASKS:
        return f"no rule judges answers of the task {row.task}"
    return None


@dataclass(frozen=True)
class TraceTalk:
    """The conversations about questions.

    Args:
        endpoint: of the model.
        options: of the step.
        prompts: has the first message.
        make: makes an `Environment`.
        media_root: files below it are named from there on.
    """

    endpoint: Endpoint
    options: TraceOptions
    prompts: Prompts
    make: Callable[[], Environment]
    media_root: str | None

    def begin(self, item: Record, attempt: int) -> Request:
        """The request for the first turn: some frames of the video, the question, and the tools."""
        row: Row = item["row"]
        path, options = row.videos[0], self.options
        times = frame_times(path)
        indices = middle_frames(times, 0, len(times.starts), options.num_frames)
        frames = FrameSet(path, file_digest(path), tuple(indices), options.max_side, times.index.pixel_rule)
        text = self.prompts.text(
            "trace",
            count=str(len(indices)),
            seconds=f"{times.end_s:.1f}",
            question=row.problem,
            turns=str(options.max_turns),
            tools=offer_text(self.make().tools),
        )
        content = [*frames.parts(), {"type": "text", "text": text}]
        return self.endpoint.request(content, options.decoding, attempt, frames.load)

    async def go_on(self, client: ChatClient, request: Request, reply: Reply, item: Record) -> list[Record]:
        """The trace that begins with a reply.

        Raises:
            UnusableReply: it is not to be kept.
        """
        row: Row = item["row"]
        environment = self.make()
        environment.reset(row)
        turns: list[str] = []
        messages: list[Record] = []
        while True:
            # 1. A turn, and what it is answered with.
            turns.append(turn_text(reply))
            said = {"role": "assistant", "content": turns[-1]}
            messages.append(said)
            try:
                answer = await asyncio.wait_for(asyncio.to_thread(environment.step, turns[-1]), STEP_S)
            except Exception as error:  # whatever an environment raises: no record may end the step
                raise UnusableReply("environment failed", f"{type(error).__name__}: {error}") from error
            if answer is None:
                break
            if len(turns) == self.options.max_turns:
                raise UnusableReply("no answer", f"it still calls tools in message {len(turns)}: {turns[-1][:200]}")
            observation = as_observation(answer)
            problems = [response.call.error for response in observation.responses if response.call.error]
            if problems:
                raise UnusableReply("call with an error", problems[0])
            messages += tool_messages(observation, self.media_root)

            # 2. The next one, by a model that has seen it.
            content, load = shown_answer(observation, self.options.max_side)
            shown = {"role": "user", "content": content}
            request = replace(request, messages=(*request.messages, said, shown), load=_both(request.load, load))
            reply = await client.ask(request)

        # 3. Right, with calls, and alike when they are made anew.
        if len(turns) == 1:
            raise UnusableReply("no call", f"it answers without a look: {turns[-1][-200:]}")
        score = answer_score(turns[-1], row)
        if score < self.options.right_from:
            raise UnusableReply("wrong answer", f"scored {score:g}: {turns[-1][-200:]}")
        try:
            recorded = asyncio.to_thread(record_trace, self.make(), row, turns, self.media_root)
            again = await asyncio.wait_for(recorded, len(turns) * STEP_S)
        except Exception as error:  # it ends before the turns do, say
            raise UnusableReply("not reproducible", f"{type(error).__name__}: {error}") from error
        if again != messages:
            raise UnusableReply("not reproducible", "its calls, made anew, are answered otherwise")
        return messages


def _unread(reply: Reply, item: Record) -> list[Record]:
    raise AssertionError("a trace is more than a reply")


def turn_text(reply: Reply) -> str:
    """A turn as the model to be trained is to say it, thinking first.

    Raises:
        UnusableReply: nothing behind the thinking, a refusal, or a reply that was cut.
    """
    answered_text(reply)
    if reply.finish_reason == "length":
        raise UnusableReply("cut", reply.text[-200:])
    text = reply.text.strip()
    if reply.reasoning and "</think>" not in text:
        text = f"<think>\n{reply.reasoning.strip()}\n</think>\n\n{text}"
    return text


def answer_score(turn: str, row: Row) -> float:
    """How right a last turn is, in [0, 1], by the rule of the row's task."""
    none = torch.empty(0)
    return accuracy(Completion(none.long(), logprobs=none, text=turn, finish_reason="stop"), row)


def shown_answer(observation: Observation, max_side: int) -> tuple[list[MessagePart], ImageLoader]:
    """What tools answered as a message of the user, and what loads its pictures.

    Args:
        observation: of an environment.
        max_side: longest side of a picture in pixels.
    """
    parts: list[MessagePart] = []
    shown: list[Frames] = []
    for response in observation.responses:
        parts.append({"type": "text", "text": "<tool_response>"})
        for part in response.content:
            if isinstance(part, str):
                parts.append({"type": "text", "text": part})
                continue
            shown.append(part)
            names = _names(part, max_side)
            is_image = part.kind == "image"
            parts += [image_part(names[0])] if is_image else frame_parts(names, part.timestamps)
        parts.append({"type": "text", "text": "</tool_response>"})
    return parts, functools.cache(functools.partial(_pictures, tuple(shown), max_side))


def _names(frames: Frames, max_side: int) -> list[str]:
    return [frame_name(frames.key, index, max_side) for index in range(len(frames.timestamps))]


def _pictures(shown: Sequence[Frames], max_side: int) -> Mapping[str, str]:
    """Name -> `data:` url of all frames.

    Raises:
        BrokenVideo: one cannot be decoded.
    """
    urls: dict[str, str] = {}
    for frames in shown:
        pixels = []
        try:
            for chunk in frames.source() if frames.source is not None else [frames]:
                pixels += list(chunk.pixels)
        except UnusableSample as error:
            raise BrokenVideo(str(error)) from error
        for name, picture in zip(_names(frames, max_side), pixels, strict=True):
            image = Image.fromarray(picture.permute(1, 2, 0).numpy())
            image.thumbnail((max_side, max_side))
            urls[name] = data_url(image)
    return urls


def _both(first: ImageLoader | None, second: ImageLoader) -> ImageLoader:
    return lambda: {**(first() if first is not None else {}), **second()}
