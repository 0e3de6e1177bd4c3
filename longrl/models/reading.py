"""The way from rows to prompts, and from what tools answer to tokens: chat template, placeholders, positions.

Runs in loader workers and touches no weights. Letters: F frames, A position axes, T prompt tokens, S response tokens.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from longrl.models.chat_tokens import (
    MEDIA_TAG as MEDIA_TAG,
    PARTS_PROBE,
    PROBE,
    ChatTokens,
    Message,
    break_token,
    end_token_ids,
)
from longrl.models.patching import PatchesMedia
from longrl.models.tool_prompts import as_users, join_answers, with_tools
from longrl.turns import ToolCall
from longrl.types import (
    AudioClip,
    Continuation,
    Frames,
    Media,
    MediaKind,
    Observed,
    Prompt,
    Row,
    UnusableSample,
)


class RendersPrompts(PatchesMedia):
    """What does a row look like as token ids and positions?"""

    num_axes: ClassVar[int] = 1
    """Position axes, A."""
    answer_options: ClassVar[tuple[str, ...]] = ("chat_template_kwargs",)
    """Options of this class, not of those it inherits from, that decide answers; `identity` begins with them."""
    training_options: ClassVar[tuple[str, ...]] = ()
    """Options of this class, not of those it inherits from, that decide no answer: how weights are found or trained."""
    later_options: ClassVar[tuple[str, ...]] = ("keep_special_tokens", "answer_tokens", "tools")
    """Options that decide answers and count where they are set: answers stored before there were any are found."""
    chat_template_kwargs: dict[str, Any]
    """Passed to the chat template."""
    keep_special_tokens: bool = False
    """True if the text of completions keeps special tokens, but for the end token."""
    answer_tokens: Sequence[str] = ()
    """Special tokens that targets and earlier answers may hold; others are text there."""
    system_prompt: str | None = None
    """A message before the user's; None leaves it to the chat template."""
    tools: Sequence[Mapping[str, Any]] = ()
    """JSON schemas of the tools that prompts offer, as chat templates take them: those of `rollout.environment`, whose
    callback sets them here before rows are rendered. Without any, rows that have `metadata["tools"]` offer those."""

    def load_processing(self) -> None:
        """As `PretrainedFolder.load_processing`, and what completions are read by."""
        super().load_processing()
        _ = self.end_token_ids, self.chat.opening

    @functools.cached_property
    def chat(self) -> ChatTokens:
        """The chat template, and which tokens are control tokens."""
        return ChatTokens(self.tokenizer, self.chat_template_kwargs, self.answer_tokens)

    @functools.cached_property
    def end_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a completion, whichever comes: of generation_config.json, config, tokenizer and template."""
        from transformers.utils import cached_file

        options = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
        file = cached_file(self.text_folder(), "generation_config.json", **options)
        generation = json.loads(Path(file).read_text(encoding="utf-8")) if file else {}
        configs = (self.config, self.config.get_text_config())
        of_configs = [getattr(config, "eos_token_id", None) for config in configs]
        return end_token_ids(
            self.tokenizer.eos_token_id, self.chat.turn_end, generation.get("eos_token_id"), *of_configs
        )

    def media_token_ids(self) -> dict[str, int]:
        """Placeholder token of each media kind; empty for text models."""
        return {}

    def reads_media(self, kind: MediaKind) -> bool:
        """Whether a prompt may show such media. Rows with others are skipped, which is known before a run begins."""
        return kind in self.media_token_ids()

    def placeholder_ids(self, media: Media) -> list[int]:
        """The token ids that stand for a media item, or a piece of one, in the place of its placeholder token."""
        return [self.media_token_ids()[media.kind]] * self.num_features(media)

    def media_text(self, chat: str, media: Sequence[Media]) -> str:
        """A filled chat template, with the words that a model reads around media where the template marked them.

        They are tokenized with all of the chat. Each of an item's `media_pieces` keeps one placeholder token. By
        default as the template wrote it.

        Raises:
            UnusableSample: the template marks other media than the row has.
        """
        return chat

    def media_pieces(self, media: Media) -> list[Media]:
        """What of a media item has a placeholder token of its own in the chat, in order; by default all of it one."""
        return [media]

    def position_ids(self, input_ids: Tensor, media: Sequence[Media]) -> Tensor:
        """[A, T] positions of a prompt of [T] token ids; by default tokens are counted."""
        return torch.arange(len(input_ids))[None]

    def render(
        self, row: Row, text: str, frames: Sequence[Frames | AudioClip] = (), response: str | None = None
    ) -> Prompt:
        """Turns a row into token ids and media.

        Args:
            row: the record.
            text: its question; `<image>`, `<video>` and `<audio>` place media, which else come before the text.
            frames: decoded media, in the order of the tags.
            response: the SFT target.

        Of a row that is a conversation (`row.messages`) these are shown as they are, in the place of `text`. Special
        tokens in either are text.

        Raises:
            UnusableSample: tags and media differ, or the text spells control tokens that cannot be read as text.
        """
        # 1. Media as the encoder reads them. A sound track stands among the placeholders of the video before it.
        media = tuple(self.patch_all(frames))
        shown = [item for item in media if not item.is_video_track]

        # 2. The chat, with one placeholder token per media item, or for each of its pieces; then as many of them as it
        #    has features.
        ids = self._placed(self.chat_ids(text, shown, row), shown, f"row {row.id!r}")

        # 3. Positions, and the answer.
        input_ids = torch.tensor(ids)  # [T]
        target = None
        if response is not None:
            target = Continuation(self.encode_answer(row, response))
        return Prompt(
            id=row.id,
            input_ids=input_ids,
            position_ids=self.position_ids(input_ids, media),  # [A, T]
            media=media,
            row=row,
            response=target,
        )

    def _placed(self, ids: list[int], media: Sequence[Media], what: str) -> list[int]:
        """Token ids with a placeholder for each row of features, from those with one for each of the `media_pieces`.

        Raises:
            UnusableSample: `what` has another number of placeholders.
        """
        tokens = self.media_token_ids()
        pieces = [piece for item in media for piece in self.media_pieces(item)]
        indices = [index for index, token in enumerate(ids) if token in tokens.values()]
        if [ids[index] for index in indices] != [tokens[piece.kind] for piece in pieces]:
            raise UnusableSample(
                None,
                f"{what} renders to {len(indices)} media placeholders for {len(pieces)} media; the chat "
                "template must write one for each",
            )
        # From behind, so that the indices before stay right.
        for index, piece in reversed(list(zip(indices, pieces, strict=True))):
            ids[index : index + 1] = self.placeholder_ids(piece)
        return ids

    def chat_ids(self, text: str, media: Sequence[Media], row: Row) -> list[int]:
        """Token ids of the chat with one placeholder token for each of the `media_pieces`."""
        # 1. The messages. What text spells of special tokens is text.
        if row.messages:
            messages = self.row_messages(row)
        else:
            kinds = [item.kind for item in media]
            tags = MEDIA_TAG.findall(text)
            if tags and tags != kinds:
                raise UnusableSample(
                    None,
                    f"row {row.id!r} has media {kinds} but its text places {tags}; name every medium once, in order, "
                    "or none",
                )
            if not tags:
                text = "".join(f"<{kind}>" for kind in kinds) + text

            # Split at a group, kinds of media lie at odd indices between texts.
            content = []
            for index, part in enumerate(MEDIA_TAG.split(text)):
                if index % 2:
                    content.append({"type": part})
                elif part:
                    content.append({"type": "text", "text": self.chat.special.sub(break_token, part)})
            messages = [{"role": "user", "content": self._content(content)}]
            if self.system_prompt is not None:
                system = self.chat.special.sub(break_token, self.system_prompt)
                messages.insert(0, {"role": "system", "content": system})

        # 2. What the template writes, as ids.
        messages, options = with_tools(self.chat, messages, self.tools or row.metadata.get("tools", ()))
        return self.tokenize_chat(self.chat.apply(messages, add_generation_prompt=True, **options), media)

    def tokenize_chat(self, chat: str, media: Sequence[Media]) -> list[int]:
        """Token ids of a filled template, or a part of it, with one placeholder token for each of the `media_pieces`.

        Special tokens that a row spells are text (`break_token`).
        """
        return self.chat.encode(self.media_text(chat, media))

    def row_messages(self, row: Row) -> list[Message]:
        """The messages of a conversation as the template reads them, special tokens in them being text.

        What the assistant said before may have declared tokens that are not special, such as `</think>`: they are its
        own way to write, by which templates leave earlier thinking out. Tools that answered before are told as in
        `observation`.
        """
        messages: list[Message] = []
        if self.system_prompt is not None and row.messages[0]["role"] not in ("system", "developer"):
            system = self.chat.special.sub(break_token, self.system_prompt)
            messages.append({"role": "system", "content": [{"type": "text", "text": system}]})
        for message in row.messages:
            role = message["role"]
            tokens = self.chat.special_in_answers if role == "assistant" else self.chat.declared_and_tags
            content = []
            for part in message["content"]:
                is_text = part["type"] == "text"
                content.append({"type": "text", "text": tokens.sub(break_token, part["text"])} if is_text else part)
            if message.get("tool_calls"):
                text = self.chat.with_calls("".join(part["text"] for part in content), message["tool_calls"])
                content = [{"type": "text", "text": tokens.sub(break_token, text)}]
            messages.append({"role": role, "content": content})
        if self._tool_role == "user":
            messages = join_answers(messages)
        return [{**message, "content": self._content(message["content"])} for message in messages]

    def chat_content(self, content: list[dict[str, str]]) -> Any:
        """A message as the template reads it, from its texts and media: `{"type": "video"}` and the like."""
        return content

    def encode_answer(self, row: Row, answer: str) -> Tensor:
        """[S] token ids of an answer behind the prompt of a row, with the end token."""
        return self.encode_last_turn(row, answer) if row.messages else self.encode_response(answer)

    def encode_response(self, response: str) -> Tensor:
        """[S] token ids of an SFT target, with the end token; a `<think>` that the prompt has opened is left out."""
        text = self.chat.special_in_answers.sub(break_token, response)
        ids = self.chat.encode(self.chat.continue_opening(text))
        return torch.tensor([*ids, self.chat.turn_end])

    def encode_last_turn(self, row: Row, response: str) -> Tensor:
        """[S] token ids of a conversation's last answer as the chat template writes it behind the prompt.

        A template that leaves a part of it out, as DeepSeek-R1's does with thinking, has no say: the answer is then
        taught to the letter, as by `encode_response`.
        """
        messages = self.row_messages(row)
        answer = self.chat.special_in_answers.sub(break_token, response)
        prompt = self.chat.apply(messages, add_generation_prompt=True)
        whole = self.chat.apply([*messages, {"role": "assistant", "content": answer}])
        written = self.chat.written_answer(prompt, whole, answer)
        if written is None:
            return self.encode_response(response)
        return torch.tensor(self.chat.encode(written))

    def decode(self, token_ids: Tensor) -> str:
        """Text of a completion, behind the `<think>` that the prompt has opened for it, if it did.

        Without end token, and without other special tokens unless `keep_special_tokens` is true.
        """
        ids = token_ids.tolist()
        if ids and ids[-1] in self.end_token_ids:
            ids.pop()
        text = self.tokenizer.decode(ids, skip_special_tokens=not self.keep_special_tokens)
        return self.chat.opening + text

    def observation(
        self, responses: Sequence[Sequence[str | Frames]], ended: bool, calls: tuple[ToolCall, ...] = ()
    ) -> Observed:
        """What tools answered, as the chat template writes it behind a turn, up to where the next turn begins.

        Args:
            responses: texts and media of each; special tokens in texts are text.
            ended: the turn has its end token; else it comes first.
            calls: that are answered.

        Raises:
            UnusableSample: the template writes no placeholder for a medium, or the encoder cannot be shown it.
            ValueError: the template takes neither a tool's message nor a user's behind an answer.
        """
        # 1. The messages.
        media = tuple(self.patch_all([part for content in responses for part in content if not isinstance(part, str)]))
        placed = [item for item in media if not item.is_video_track]
        contents = [self._tagged_parts(content) for content in responses]
        role = self._tool_role
        parts_of = contents if role == "tool" else [as_users(contents)]
        messages: list[Message] = [{"role": role, "content": self._content(parts)} for parts in parts_of]

        # 2. What the template writes behind an answer's end, as ids. The end token stands before it while it is
        #    tokenized, for a token may take the white space behind it.
        chat, writes_end = self.chat.behind_answer(messages, ended)
        ids = self.tokenize_chat(chat, placed)
        if ended and writes_end:
            ids = ids[1:]
        input_ids = torch.tensor(self._placed(ids, placed, "an observation"))

        # 3. Positions go on where the turn ended, whatever was before.
        texts = ["".join(part if isinstance(part, str) else f"<{part.kind}>" for part in one) for one in responses]
        return Observed(input_ids, self.position_ids(input_ids, media), media, "\n".join(texts), calls)

    @functools.cached_property
    def _tool_role(self) -> str:
        """Who tells what tools answered: `tool`, or the user where the template knows no tools, or none with media."""
        return "tool" if self.chat.has_role("tool", PARTS_PROBE if self.media_token_ids() else PROBE) else "user"

    def _tagged_parts(self, content: Sequence[str | Frames]) -> list[dict[str, str]]:
        """Texts and media of an answer as a chat template reads them; what texts spell of declared tokens is text."""
        texts = self.chat.declared_and_tags
        return [
            {"type": "text", "text": texts.sub(break_token, part)} if isinstance(part, str) else {"type": part.kind}
            for part in content
        ]

    def _content(self, parts: list[dict[str, str]]) -> Any:
        """The content of a message: a text, if all of it is text."""
        if any(part["type"] != "text" for part in parts):
            return self.chat_content(parts)
        return "".join(part["text"] for part in parts)

    def continuation(self, turns: Sequence[str], observed: Sequence[Observed]) -> Continuation:
        """The SFT target that is a trace: turns, which are taught, and between them what tools answered.

        Its tokens are those that a rollout has: of each turn as of an SFT target, of the answers `observation`'s.

        Args:
            turns: of the assistant.
            observed: what came between them, one less.
        """
        ids, sampled, positions = [], [], []
        start = torch.zeros((), dtype=torch.int64)
        for number, turn in enumerate(turns):
            said = self.encode_response(turn)
            parts = [(said, torch.arange(len(said)).expand(self.num_axes, -1), True)]
            if number < len(observed):
                parts.append((observed[number].input_ids, observed[number].position_ids, False))
            for part_ids, part_positions, is_said in parts:
                ids.append(part_ids)
                sampled.append(torch.full((len(part_ids),), is_said))
                positions.append(start + part_positions)
                start = positions[-1].max() + 1
        media = tuple(item for one in observed for item in one.media)
        return Continuation(
            torch.cat(ids), sampled=torch.cat(sampled), position_ids=torch.cat(positions, dim=1), media=media
        )

    def identity(self) -> dict[str, Any]:
        """All that decides, beside the weights, how the model answers a row: options by name, in plain values.

        Those are `answer_options`, those of `later_options` that are set, and all other options of constructors but
        `training_options`. Stored answers are found by it, so it must be the same in every process.

        Raises:
            ValueError: an option is no attribute of its name, so nobody knows its value.
        """
        # 1. What classes say, the most special first; then what they take and do not say anything of.
        parts = type(self).__mro__
        others = {name for part in parts for name in vars(part).get("training_options", ())} | {*self.later_options}
        names = [name for part in parts for name in vars(part).get("answer_options", ())]
        names += [name for part in parts for name in constructor_options(part) if name not in others]
        names += [name for name in self.later_options if getattr(self, name)]

        # 2. Their values.
        try:
            values = {name: getattr(self, name) for name in names}
        except AttributeError as error:
            raise ValueError(
                f"stored answers are told apart by {type(self).__name__}'s option {error.name!r}, which is no "
                f"attribute; set self.{error.name}, or name it in training_options if it decides no answer"
            ) from error
        template = json.dumps(self.tokenizer.chat_template)
        return values | {"chat_template": hashlib.sha256(template.encode()).hexdigest()}


def constructor_options(part: type) -> list[str]:
    """Names of what a class's own constructor takes, without `*args` and `**kwargs`."""
    taken = inspect.signature(part).parameters if "__init__" in vars(part) else {}
    return [name for name, option in taken.items() if option.kind not in (option.VAR_POSITIONAL, option.VAR_KEYWORD)]
