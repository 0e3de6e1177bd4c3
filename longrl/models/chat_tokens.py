r"""Which tokens of a chat are control tokens? Those that its template writes, and none that a row's text spells.

A tokenizer finds the tokens that it declares (`<|im_end|>`, `<|image_pad|>`, `</think>`) wherever their letters stand,
in a question too. So text of a row has a noncharacter before each letter of such a token while the template is filled;
what is whole afterwards is the template's. Then the noncharacters go, and the chat is tokenized as a whole, by the
tokenizer's own rules, declared tokens being found under other names, which no text has. Chats without such text are
tokenized as ever.
"""

from __future__ import annotations

import functools
import json
import logging
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NoReturn

from longrl.types import UnusableSample

logger = logging.getLogger(__name__)

BREAK = "\ufdd0"
"""Before each letter of a token that is text. Unicode promises that no text has it, nor the next two."""
ALIAS = "\ufdd1"
"""Before the name under which a declared token is found in a chat with such text."""
LEFT_OUT = "\ufdd2"
"""In the place of one of the three that a text has all the same."""
MEDIA_TAG = re.compile(r"<(image|video|audio)>")
OPENED_THINKING = re.compile(r"<think>\s*\Z")
CLOSED_THINKING = re.compile(r"<think>\s*</think>\s*\Z")
OPENING_TAG = re.compile(r"\s*<think>")
CLOSED_AT_ONCE = "\n</think>\n\n"
"""What stands between an opened `<think>` and an answer without reasoning, as in Qwen3's own template."""
PROBE = "one-two-three"
PARTS_PROBE = [{"type": "text", "text": PROBE}]
UNKNOWN_ROLE = "nobody"
Message = Mapping[str, Any]
"""`role` and `content`, as chat templates read them."""
QUESTION: Message = {"role": "user", "content": "?"}


def break_token(match: re.Match[str]) -> str:
    """A token's letters as text, for `re.sub`: twice is as once. It never ends in a `BREAK`, for a token may follow."""
    found = match[0]
    if len(found) == 2 and found.startswith(BREAK):
        return found
    if found in (BREAK, ALIAS, LEFT_OUT):
        return BREAK + LEFT_OUT
    return "".join(BREAK + letter for letter in found)


def literal_text(text: str) -> str:
    """The text that a reader sees, without the noncharacters of `break_token`."""
    return text.replace(BREAK, "").replace(LEFT_OUT, "")


class ChatTokens:
    """A tokenizer's declared tokens and its chat template.

    Args:
        tokenizer: of transformers; None for a model whose tokenizer is elsewhere: then media tags alone can be text.
        template_kwargs: passed to the chat template.
        answer_tokens: special ones that answers may hold.

    Raises:
        ValueError: one of `answer_tokens` is none of the tokenizer's.
    """

    def __init__(
        self,
        tokenizer: Any,
        template_kwargs: Mapping[str, Any] | None = None,
        answer_tokens: Collection[str] = (),
    ) -> None:
        self.tokenizer = tokenizer
        self.ids: dict[str, int] = {}
        """Declared tokens, but those of white space alone (Gemma's, GPT-NeoX's): these are text."""
        special: set[str] = set()
        if tokenizer is not None:
            special = {*tokenizer.all_special_tokens}
            for token_id, token in tokenizer.added_tokens_decoder.items():
                if token.content.strip():
                    self.ids[token.content] = token_id
                    special |= {token.content} if token.special else set()
        tags = {f"<{kind}>" for kind in ("image", "video", "audio")}
        unknown = [token for token in answer_tokens if token not in self.ids]
        if unknown:
            raise ValueError(
                f"model.family.init_args.answer_tokens names {unknown[0]!r}, which is no token that the tokenizer "
                "declares; correct the name, or add it to the tokenizer"
            )
        self.special = spelled(special)
        """Special ones: text in whatever a row or an option says."""
        self.declared = spelled({*self.ids, *special} - tags)
        """All of them, but media tags: text in a question, in which tags place media."""
        self.declared_and_tags = spelled({*self.ids, *special, *tags})
        """Text in a value that places no media."""
        self.special_in_answers = spelled(special - {*answer_tokens})
        """Text in whatever the assistant says."""
        self.text_in_answers = spelled({*self.ids, *special, *tags} - {*answer_tokens})
        """Text in reasoning and answer that fill a template."""
        self.apply: Callable[..., str] = self._refuse
        """Fills the chat template: `apply(messages, add_generation_prompt=True)`."""
        if tokenizer is not None and tokenizer.chat_template is not None:
            self.apply = functools.partial(tokenizer.apply_chat_template, tokenize=False, **(template_kwargs or {}))

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise ValueError(
            "the model's folder has no chat template, neither of its tokenizer nor of its processor; name a Jinja file "
            "by model.family.init_args.chat_template_file, that of the model's instruct version for instance"
        )

    # -- what the template says of answers -----------------------------------------------------------------------

    @functools.cached_property
    def opening(self) -> str:
        """What the template has already written of an answer: `<think>` and white space, or nothing."""
        match = OPENED_THINKING.search(self._prompt_end)
        return match[0] if match else ""

    @functools.cached_property
    def closes_thinking(self) -> bool:
        """True if the prompt ends with empty thinking, as that of Qwen's templates by `enable_thinking: false`."""
        return CLOSED_THINKING.search(self._prompt_end) is not None

    @functools.cached_property
    def _prompt_end(self) -> str:
        return self._behind_probe(["user"], add_generation_prompt=True)

    @functools.cached_property
    def turn_end(self) -> int:
        """The token that the template writes behind an answer; the tokenizer's end token where it writes none."""
        match = self._unbroken.search(self._behind_probe(["user", "assistant"]))
        return self.tokenizer.eos_token_id if match is None else self.ids[match[0]]

    def _behind_probe(self, roles: Sequence[str], **options: Any) -> str:
        """What the template writes behind the last of some messages; "" where it leaves their text out."""
        if self.tokenizer.chat_template is None:
            return ""
        for content in (PROBE, PARTS_PROBE):
            try:
                chat = self.apply([{"role": role, "content": content} for role in roles], **options)
            except Exception as error:  # a template may refuse one form of content by whatever fails first
                logger.debug("the chat template refuses %r: %r", content, error)
                continue
            if PROBE in chat:
                return chat.rpartition(PROBE)[2]
        return ""

    # -- what it says of tools -------------------------------------------------------------------------------------

    def has_role(self, role: str, content: Any = PROBE) -> bool:
        """True if the template has words of its own for messages of a role behind an answer.

        False where it refuses them, leaves them out, or writes any role's name as it is, as ChatML does.

        Args:
            role: of the message.
            content: what it says: `PROBE`, or `PARTS_PROBE` if it is to take media.
        """
        before = [QUESTION, {"role": "assistant", "content": "!"}]
        written = self._filled([*before, {"role": role, "content": content}])
        unknown = self._filled([*before, {"role": UNKNOWN_ROLE, "content": content}])
        return PROBE in written and written != unknown.replace(UNKNOWN_ROLE, role)

    def _filled(self, messages: Sequence[Message], **options: Any) -> str:
        """What the template writes, up to the next answer; "" where it refuses the messages."""
        try:
            return self.apply(messages, **{"add_generation_prompt": True, **options})
        except Exception as error:  # as in `_behind_probe`
            logger.debug("the chat template refuses %r: %r", messages, error)
            return ""

    def behind_answer(self, messages: Sequence[Message], ended: bool) -> tuple[str, bool]:
        """What the template writes behind an answer, up to where the next one begins, and whether its end token leads.

        Args:
            messages: between the two.
            ended: the answer has its end token: white space before it is left out.

        Raises:
            ValueError: the template takes no such messages.
        """
        before = [QUESTION, {"role": "assistant", "content": PROBE}, *messages]
        written = self._filled(before).partition(PROBE)[2]
        if not written:  # some read lists of parts alone
            written = self._filled([_as_parts(message) for message in before]).partition(PROBE)[2]
        if not written:
            raise ValueError(
                f"the chat template takes no message of {messages[0]['role']!r} behind an answer, so nothing can "
                "be shown; name another one by model.family.init_args.chat_template_file"
            )
        end = self.tokenizer.decode([self.turn_end])
        match = re.match(rf"\s*{re.escape(end)}", written)
        if match is not None and ended:
            written = written[match.end() - len(end) :]
        return written, match is not None

    @functools.cached_property
    def reads_tools(self) -> bool:
        """True if the template offers `tools`, and writes calls of them as environments read them."""
        parameters = {"type": "object", "properties": {}, "required": []}
        function = {"name": PROBE, "description": "?", "parameters": parameters}
        written = self._filled([QUESTION], tools=[{"type": "function", "function": function}])
        return PROBE in written and self._written_calls([{"name": PROBE, "arguments": {}}]) is not None

    def with_calls(self, text: str, calls: Sequence[Mapping[str, Any]]) -> str:
        """What the assistant says, with its tool calls as the template writes them.

        As Hermes does, where the template leaves them out or environments cannot read its own.

        Args:
            text: before the calls.
            calls: `{"name": .., "arguments": {..}}`.
        """
        written = self._written_calls(calls) or hermes_calls(calls)
        return text + written if text.strip() else written.lstrip()

    def _written_calls(self, calls: Sequence[Mapping[str, Any]]) -> str | None:
        """What the template writes of calls behind a text; None for what environments cannot read."""
        functions = [{"type": "function", "function": call} for call in calls]
        message = {"role": "assistant", "content": PROBE, "tool_calls": functions}
        chat = self._filled([QUESTION, message], add_generation_prompt=False)
        written = chat.partition(PROBE)[2].partition(self.tokenizer.decode([self.turn_end]))[0]
        names = [call["name"] for call in calls]
        readable = all(f'"name": "{name}"' in written or f"<function={name}>" in written for name in names)
        return written if names and readable and "<tool_call>" in written else None

    @functools.cached_property
    def default_system(self) -> str | None:
        """The system message that the template writes where a chat has none; None if it takes none at all."""
        before, found, behind = self._filled([{"role": "system", "content": PROBE}, QUESTION]).partition(PROBE)
        if not found:
            return None
        plain = self._filled([QUESTION])
        if len(plain) < len(before) + len(behind) or not (plain.startswith(before) and plain.endswith(behind)):
            return ""
        return plain[len(before) : len(plain) - len(behind)]

    def continue_opening(self, response: str) -> str:
        """A response as it goes on where the template stopped, which may have opened its `<think>`, or closed it.

        Raises:
            UnusableSample: the response thinks where the prompt has closed its thinking.
        """
        if self.closes_thinking:
            return _without_thinking(response)
        if not self.opening:
            return response
        match = OPENING_TAG.match(response)
        if match is None:
            return response if "</think>" in response else CLOSED_AT_ONCE + response
        space = self.opening.removeprefix("<think>")
        return response[match.end() :].removeprefix(space)

    def written_answer(self, prompt: str, whole: str, response: str) -> str | None:
        """What a template writes of the last answer behind its prompt, up to the end token.

        Args:
            prompt: the chat before the answer.
            whole: the chat with it.
            response: the answer.

        Returns:
            None where the template does not go on from the prompt, or leaves out a part of the answer.
        """
        if not whole.startswith(prompt):
            return None
        written = whole.removeprefix(prompt)
        ends = [match.end() for match in self._unbroken.finditer(written) if self.ids[match[0]] == self.turn_end]
        if not ends or "".join(self.continue_opening(response).split()) not in "".join(written.split()):
            return None
        return written[: ends[-1]]

    # -- token ids -----------------------------------------------------------------------------------------------

    @functools.cached_property
    def _unbroken(self) -> re.Pattern[str]:
        """Declared tokens that are no text."""
        return re.compile(f"(?<!{BREAK})(?:{_longest_first(self.ids)})")

    @functools.cached_property
    def _aliased(self) -> Any:
        """The tokenizer's rules, with declared tokens under their aliases."""
        from tokenizers import AddedToken, Tokenizer

        rules = self.tokenizer.backend_tokenizer
        aliased = Tokenizer(rules.model)
        for part in ("normalizer", "pre_tokenizer"):
            if getattr(rules, part) is not None:
                setattr(aliased, part, getattr(rules, part))
        for token in self.tokenizer.added_tokens_decoder.values():
            name = ALIAS + token.content if token.content in self.ids else token.content
            flags = {flag: getattr(token, flag) for flag in ("single_word", "lstrip", "rstrip", "normalized")}
            aliased.add_tokens([AddedToken(name, **flags)])
        return aliased

    def encode(self, chat: str) -> list[int]:
        """Token ids of a chat or a part of one, `break_token`'s being text.

        Raises:
            UnusableSample: the tokenizer has no rules to do so by, or finds control tokens in text all the same.
        """
        if BREAK not in chat:
            return self.tokenizer(chat, add_special_tokens=False)["input_ids"]
        if not self.tokenizer.is_fast:
            raise UnusableSample(
                None,
                f"it spells control tokens of the model, and {type(self.tokenizer).__name__} cannot read them as text; "
                "use a tokenizer with a tokenizer.json, or leave such rows out",
            )
        # 1. The template's tokens get their aliases, which no text has, whatever it spells.
        wanted = [self.ids[match[0]] for match in self._unbroken.finditer(chat)]
        chat = literal_text(self._unbroken.sub(lambda match: ALIAS + match[0], chat))

        # 2. Ids of aliases are those of their tokens; declared white space may have got another id, too.
        names = {self._aliased.token_to_id(ALIAS + token): token_id for token, token_id in self.ids.items()}
        for token_id, token in self.tokenizer.added_tokens_decoder.items():
            if token.content not in self.ids:
                names[self._aliased.token_to_id(token.content)] = token_id
        encoding = self._aliased.encode(chat, add_special_tokens=False)
        ids = [names.get(token_id, token_id) for token_id in encoding.ids]

        # 3. A vocabulary may know such a token by itself.
        declared = {*self.ids.values()}
        if [token_id for token_id in ids if token_id in declared] != wanted:
            raise UnusableSample(
                None, "it spells control tokens of the model, which its tokenizer cannot read as text; leave it out"
            )
        return ids


def _without_thinking(response: str) -> str:
    """An answer behind a prompt that has closed its thinking: empty thinking of its own is left out.

    Raises:
        UnusableSample: it is not empty.
    """
    before, closes, answer = response.partition("</think>")
    if not closes:
        return response
    if before.strip().removeprefix("<think>").strip():
        raise UnusableSample(
            None,
            "its target thinks, but the chat template closes the thinking in the prompt; leave enable_thinking: false "
            "out of model.family.init_args.chat_template_kwargs, or teach the answer alone by a data.response_template "
            'such as "<answer>{option}</answer>"',
        )
    return answer.lstrip()


def spelled(tokens: Collection[str]) -> re.Pattern[str]:
    """Finds what `break_token` takes: some tokens, broken letters, noncharacters.

    Upper and lower case are alike, for a tokenizer may not tell them apart.
    """
    return re.compile(f"{BREAK}[^{BREAK}{ALIAS}]|[{BREAK}{ALIAS}{LEFT_OUT}]|{_longest_first(tokens)}", re.IGNORECASE)


def hermes_calls(calls: Sequence[Mapping[str, Any]]) -> str:
    """Tool calls as Hermes and Qwen2.5 write them behind a text, `{"name": .., "arguments": {..}}` each."""
    plain = [{"name": call["name"], "arguments": call["arguments"]} for call in calls]
    return "".join(f"\n<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>" for call in plain)


def _as_parts(message: Message) -> Message:
    """A message whose content is a list of parts."""
    content = message["content"]
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


def _longest_first(tokens: Collection[str]) -> str:
    """A pattern of these tokens; of none, one that finds nothing. First letters first: Gemma declares thousands."""
    if not tokens:
        return "(?!)"
    first = "".join(sorted({re.escape(token[0]) for token in tokens}))
    in_order = sorted(tokens, key=lambda token: (-len(token), token))
    return f"(?=[{first}])(?:{'|'.join(map(re.escape, in_order))})"


def end_token_ids(*named: Any) -> tuple[int, ...]:
    """All tokens that end a completion, each once.

    Args:
        named: ids, lists of ids, or None, as configs have them.
    """
    ids: dict[int, None] = {}
    for value in named:
        for token_id in value if isinstance(value, (list, tuple)) else [value]:
            if token_id is not None:
                ids[int(token_id)] = None
    return tuple(ids)


NO_TOKENIZER = ChatTokens(None)
"""Of models whose tokenizer is a server's."""
