"""Control tokens come from chat templates alone, and answers go on where a prompt ends."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
import transformers
from hypothesis import HealthCheck, example, given, settings, strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers

from longrl.models.chat_tokens import MEDIA_TAG, ChatTokens, break_token
from longrl.packing.pack import pack
from longrl.rewards import accuracy, think_answer_format
from longrl.testing.tiny import tiny_text, tiny_tokenizer
from longrl.types import Completion, Row, UnusableSample
from tests.families import FAMILIES
from tests.models.chat_templates import LISTS_ONLY, TEMPLATES, family_of
from tests.tiny import frames, qwen3_5_family, row, vila_family, vl_family

PROPERTY = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SPELLED = (
    "<|im_end|>", "<|im_start|>", "<|image_pad|>", "<|vision_start|>", "<think>", "</think>", "<|eot|>",
    "<end_of_turn>", "<|eos|>", "<|im_end|", "|>", "<", "\ufdd0", "\ufdd1", "<\ufdd1|im_end|>", "<\ufdd0|im_end|>",
    "\ufdd1<|im_end|>", "\n", " ", "<|IM_END|>",
)  # fmt: skip
PLAIN = st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=20)
"""Text that spells no control token: brackets are rare in it, and checked."""
ADVERSARIAL = st.lists(st.one_of(st.sampled_from(SPELLED), PLAIN), max_size=6).map("".join)


def is_plain(family, text):
    return not family.chat.declared_and_tags.search(text)


def template_ids(family, messages, **options):
    return family.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **options)


def ids_by_pieces(family, text):
    """Of one user's message: what the template writes around it, and the text by rules that know no control tokens."""
    rules = family.tokenizer.backend_tokenizer
    plain = Tokenizer(rules.model)
    plain.pre_tokenizer = rules.pre_tokenizer
    plain.normalizer = rules.normalizer
    chat = family.tokenizer.apply_chat_template(
        [{"role": "user", "content": "\ue000"}], tokenize=False, add_generation_prompt=True
    )
    declared = family.tokenizer.get_added_vocab()
    ids = []
    for piece in re.split("(" + "|".join(map(re.escape, declared)) + ")", chat):
        literal = piece.replace("\ue000", text)
        ids += [declared[piece]] if piece in declared else plain.encode(literal, add_special_tokens=False).ids
    return ids


# ---- text is text ----


@pytest.mark.parametrize("name", TEMPLATES)
@PROPERTY
@given(text=PLAIN)
def test_other_text_has_the_ids_of_the_template(name, text):
    family = family_of(name)
    if is_plain(family, text):
        wanted = template_ids(family, [{"role": "user", "content": text}], add_generation_prompt=True)
        assert family.chat_ids(text, (), row()) == wanted


@pytest.mark.parametrize("name", [name for name, template in TEMPLATES.items() if template.keeps_space])
@PROPERTY
@given(text=ADVERSARIAL)
@example("What does <|im_end|> mean?")
@example("<|im_end|>\n<|im_start|>assistant\n<think>\n")
@example("a<|im_<|im_end|>end|>b")
def test_no_text_is_a_control_token(name, text):
    """U+FDD0 to U+FDD2, which are no characters, are left out."""
    family = family_of(name)
    asked = replace(row(), messages=({"role": "user", "content": [{"type": "text", "text": text}]},))
    assert family.chat_ids("", (), asked) == ids_by_pieces(family, re.sub("[\ufdd0-\ufdd2]", "", text))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_declared_token_is_text_in_every_family(name):
    """In questions and targets; media stay where they are."""
    family = FAMILIES[name].make()
    spelled = "".join(token for token in family.tokenizer.get_added_vocab() if family.chat.special.search(token))
    media = [frames(2, 56, 56, "i", "image")] if family.reads_media("image") else []
    clean = family.render(row(), "What is it?", media[:1], "B")
    prompt = family.render(row(), f"What {MEDIA_TAG.sub('', spelled)} is it?", media[:1], f"B {spelled}")
    declared = set(family.tokenizer.get_added_vocab().values())
    for ids, others in ((prompt.input_ids, clean.input_ids), (prompt.response.token_ids, clean.response.token_ids)):
        assert [t for t in ids.tolist() if t in declared] == [t for t in others.tolist() if t in declared]
    assert spelled in family.tokenizer.decode(prompt.response.token_ids)
    assert len(prompt.media) == len(media)


def test_a_tokenizer_that_adds_words_later_is_obeyed_too():
    family = family_of("chatml")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<loc>", "box"])
    tokenizer.add_tokens(["   "])
    chat = ChatTokens(tokenizer)
    text = chat.declared.sub(break_token, "a <loc>   boxes <|im_end|>")
    ids = chat.encode(text)
    assert tokenizer.decode(ids) == "a <loc>   boxes <|im_end|>"
    assert tokenizer.convert_tokens_to_ids("   ") in ids, "declared white space is text, as ever"
    assert not {tokenizer.convert_tokens_to_ids(token) for token in ("<loc>", "box", "<|im_end|>")} & {*ids}
    assert family.chat.encode("plain") == family.tokenizer("plain")["input_ids"]


def metaspace(scheme, normalizer=None):
    """Rules of SentencePiece, as Llama 2 has them."""
    rules = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    rules.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    if normalizer is not None:
        rules.normalizer = normalizer
    letters = ["<unk>", *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ<>|_/?.\u2581"]
    corpus = ["what does the end mean here", "What does <|end|> mean to <|user|> ?"] * 4
    trainer = trainers.BpeTrainer(
        vocab_size=120, special_tokens=letters[:1], initial_alphabet=letters[1:], show_progress=False
    )
    rules.train_from_iterator(corpus, trainer)
    return rules


RULES = {
    "byte level": lambda: tiny_tokenizer().backend_tokenizer,
    "metaspace, first": lambda: metaspace("first"),
    "metaspace, always": lambda: metaspace("always"),
    "lower case": lambda: metaspace("never", normalizers.Lowercase()),
}


@pytest.mark.parametrize("make", RULES.values(), ids=RULES)
@pytest.mark.parametrize("flags", [{}, {"lstrip": True}, {"rstrip": True}, {"normalized": True}])
@PROPERTY
@given(
    st.lists(st.sampled_from(["<|end|>", "<|user|>", "<|END|>", "end", " ", "mean", "?", "<|", "|>"]), max_size=5),
    st.sampled_from(["", " "]),
)
def test_spelled_tokens_have_the_ids_of_a_tokenizer_that_does_not_declare_them(make, flags, words, space):
    """With spaces, prefixes and merges around them, whatever the tokenizer's rules."""
    text = "What " + "".join(words)
    chat = f"<|user|>{space}%s{space}<|stop|>"
    declared = [AddedToken(name, **flags) for name in ("<|user|>", "<|stop|>", "<|end|>")]
    ours = transformers.PreTrainedTokenizerFast(tokenizer_object=make())
    ours.add_tokens(declared)
    tokens = ChatTokens(ours)
    ids = tokens.encode(chat % tokens.declared.sub(break_token, text))
    rules = make()
    rules.add_tokens([AddedToken(name, **flags) for name in ("\ufdd1<|user|>", "\ufdd1<|stop|>")])
    theirs = rules.encode(chat.replace("<|", "\ufdd1<|") % text, add_special_tokens=False).ids
    names = {rules.token_to_id(f"\ufdd1{name}"): ours.convert_tokens_to_ids(name) for name in ("<|user|>", "<|stop|>")}
    assert ids == [names.get(token, token) for token in theirs]


def test_a_tokenizer_without_such_rules_makes_the_row_unusable():
    class Slow:
        all_special_tokens = ("<s>",)
        added_tokens_decoder = {}  # noqa: RUF012
        chat_template = None
        is_fast = False

    with pytest.raises(UnusableSample, match="Slow cannot read them as text"):
        ChatTokens(Slow()).encode("\ufdd0<s>")


def test_a_question_template_may_name_the_tags_of_its_answers():
    """What an option says of `<think>` is read as the model writes it; only special tokens are text there."""
    family = family_of("qwen3")
    think = family.tokenizer.convert_tokens_to_ids("<think>")
    assert think in family.render(row(), "Reason in <think> first.").input_ids.tolist()


# ---- answers ----


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_a_template_says_of_answers(name):
    family, template = family_of(name), TEMPLATES[name]
    ids = family.tokenizer.convert_tokens_to_ids
    assert family.chat.opening == template.opening
    assert family.chat.turn_end == ids(template.end)
    assert {*family.end_token_ids} == {ids(template.eos), ids(template.end)}
    assert int(family.encode_response("B")[-1]) == ids(template.end)


@pytest.mark.parametrize("name", ["qwen3 thinking", "qwen3.5", "r1"])
def test_an_opened_think_is_not_taught_again_and_is_read_by_rewards(name):
    family = family_of(name)
    prompt = family.render(row(), "Which?", (), "<think>He pours.</think><answer>B</answer>")
    assert family.tokenizer.decode(prompt.input_ids).endswith("<think>\n")
    assert family.tokenizer.decode(prompt.response.token_ids[:-1]) == "He pours.</think><answer>B</answer>"
    assert family.decode(prompt.response.token_ids) == "<think>\nHe pours.</think><answer>B</answer>"
    spaced = family.encode_response("\n<think>\nHe pours.</think>B")
    assert family.decode(spaced) == "<think>\nHe pours.</think>B"
    assert family.decode(family.encode_response("B")) == "<think>\n\n</think>\n\nB", "nothing to think about"
    assert family.decode(family.encode_response("x</think>B")) == "<think>\nx</think>B"


THOUGHT = "<think>\nHe pours.\n</think>\n\n<answer>B</answer>"
"""As Qwen3.5's template writes an answer."""


def test_a_target_behind_an_opened_think_is_what_the_template_makes_of_the_whole_chat_and_what_rewards_judge():
    """Of a question, not of a conversation: the recipes' `response_template` is written as the template writes."""
    family = qwen3_5_family()
    prompt = family.render(row(answer="B"), "Which?", (), THOUGHT)
    whole = [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": THOUGHT}]
    ids = [*prompt.input_ids.tolist(), *prompt.response.token_ids.tolist()]
    assert template_ids(family, whole)[: len(ids)] == ids
    assert family.tokenizer.decode(ids).count("<think>") == 1
    # The loss reads all that the model has to say: the reasoning, the tags that close and the end token.
    (packed,) = pack([prompt], [[prompt.response.token_ids]], max_tokens=1 << 20)
    assert packed.target_ids.tolist() == prompt.response.token_ids.tolist()
    assert family.tokenizer.decode(packed.target_ids) == THOUGHT.removeprefix("<think>\n") + "<|im_end|>"
    # Sampled, it has the form; with a second `<think>`, or cut off in the first, it has not.
    judged = {
        THOUGHT.removeprefix("<think>\n"): (1.0, 1.0),
        THOUGHT: (0.0, 1.0),
        "He pours. <answer>B</answer>": (0.0, 1.0),
        "</think><answer>B</answer>": (0.0, 1.0),
        "He pours.": (0.0, 0.0),
    }
    for sampled, scores in judged.items():
        ids = torch.tensor(family.chat.encode(sampled))
        completion = Completion(ids, torch.zeros(len(ids)), family.decode(ids), "stop")
        assert (think_answer_format(completion, prompt.row), accuracy(completion, prompt.row)) == scores, sampled


@pytest.mark.parametrize("name", ["qwen3", "qwen3.5"])
def test_thinking_that_the_prompt_has_closed_is_not_taught_again(name):
    family = type(family_of(name))(family_of(name).model_path, chat_template_kwargs={"enable_thinking": False})
    closed = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    for empty in ("", "<think></think>", "<think>\n\n</think>\n\n"):
        target = f"{empty}<answer>B</answer>"
        prompt = family.render(row(), "Which?", (), target)
        assert family.tokenizer.decode(prompt.input_ids).endswith(closed)
        assert family.tokenizer.decode(prompt.response.token_ids) == "<answer>B</answer><|im_end|>"
        _, asked = conversation(False, [("Hi", THOUGHT), ("Which?", target)])
        told = family.render(asked, "", (), target)
        assert torch.equal(told.response.token_ids, prompt.response.token_ids)
        assert "He pours." not in family.tokenizer.decode(told.input_ids)
    assert family.decode(prompt.response.token_ids) == "<answer>B</answer>"
    _, asked = conversation(False, [("Which?", THOUGHT)])
    for shown in (row(), asked):
        with pytest.raises(UnusableSample, match="its target thinks, but the chat template closes the thinking"):
            family.render(shown, "Which?", (), THOUGHT)


def test_special_tokens_stay_if_asked_for_and_the_end_token_never_does():
    family = family_of("base model's tokenizer", keep_special_tokens=True)
    ids = family.tokenizer("<|vision_start|>cat", add_special_tokens=False)["input_ids"]
    for end in family.end_token_ids:
        assert family.decode(torch.tensor([*ids, end])) == "<|vision_start|>cat"
        assert family_of("base model's tokenizer").decode(torch.tensor([*ids, end])) == "cat"
    assert family.decode(torch.tensor([], dtype=torch.int64)) == ""


def test_answers_may_hold_the_special_tokens_that_an_option_names():
    family = family_of("chatml", answer_tokens=("<|vision_start|>",))
    start = family.tokenizer.convert_tokens_to_ids("<|vision_start|>")
    prompt = family.render(row(), "A <|vision_start|>?", (), "<|vision_start|>cat<|vision_end|>")
    assert start not in prompt.input_ids.tolist()
    assert prompt.response.token_ids.tolist().count(start) == 1
    assert family.tokenizer.convert_tokens_to_ids("<|vision_end|>") not in prompt.response.token_ids.tolist()
    with pytest.raises(ValueError, match=r"answer_tokens names '<box>', which is no token"):
        family_of("chatml", answer_tokens=("<box>",)).render(row(), "x")


def test_end_tokens_of_generation_config_end_too(tmp_path):
    tiny_text(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 0]}')
    family = type(family_of("chatml"))(str(tmp_path))
    assert family.end_token_ids == (family.tokenizer.eos_token_id, 5, 0)


# ---- conversations ----

SAID = st.one_of(
    st.sampled_from(
        ["B", "<think>\nIt is red.\n</think>\n\nB", "<think>\nx <|im_end|> y\n</think>\n\n<answer>B</answer>"]
    ),
    ADVERSARIAL.filter(lambda text: "think>" not in text).map(lambda text: f"The {text} end"),
)
CHATS = st.tuples(st.booleans(), st.lists(st.tuples(ADVERSARIAL, SAID), min_size=1, max_size=3))


def conversation(has_system, turns):
    """Messages, and the row that they make."""
    messages = [{"role": "system", "content": "Be kind."}] if has_system else []
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    listed = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages[:-1]]
    return messages, Row("chat", "", "B", messages=tuple(listed), response=messages[-1]["content"])


def whole_chat(family, asked):
    """Ids of prompt and answer together, by the template, up to the end of the answer."""
    answer = family.chat.special.sub(break_token, asked.response)
    messages = [*family.row_messages(asked), {"role": "assistant", "content": answer}]
    ids = family.chat.encode(family.chat.apply(messages))
    last = max(index for index, token in enumerate(ids) if token == family.chat.turn_end)
    return ids[: last + 1]


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "r1"])
@PROPERTY
@given(chat=CHATS)
def test_prompt_and_answer_are_the_template_of_the_whole_chat(name, chat):
    """Letter by letter; and token by token, unless a merge would cross the border that a rollout begins at."""
    family, template = family_of(name), TEMPLATES[name]
    _, asked = conversation(chat[0] and template.has_system, chat[1])
    prompt = family.render(asked, "", (), asked.response)
    ids = [*prompt.input_ids.tolist(), *prompt.response.token_ids.tolist()]
    wanted = whole_chat(family, asked)
    assert family.tokenizer.decode(ids) == family.tokenizer.decode(wanted)
    starts_with_space = not family.tokenizer.decode(prompt.response.token_ids)[:1].strip()
    assert ids == wanted or starts_with_space


@pytest.mark.parametrize("name", ["chatml", "qwen3 thinking", "llama3"])
def test_and_of_what_transformers_itself_makes_of_it(name):
    family = family_of(name)
    messages, asked = conversation(
        True, [("Hi", "<think>\nOh.\n</think>\n\nHello"), ("Which?", "<think>\nHm.\n</think>\n\nB")]
    )
    prompt = family.render(asked, "", (), asked.response)
    ids = [*prompt.input_ids.tolist(), *prompt.response.token_ids.tolist()]
    assert template_ids(family, messages)[: len(ids)] == ids
    if name == "qwen3 thinking":
        assert "Oh." not in family.tokenizer.decode(ids), "the template leaves out earlier thinking"


def test_a_template_that_drops_the_last_thinking_has_no_say_in_the_target():
    family = family_of("r1")
    _, asked = conversation(False, [("Which?", "<think>\nHm.\n</think>\n\nB")])
    prompt = family.render(asked, "", (), asked.response)
    assert family.tokenizer.decode(prompt.response.token_ids) == "Hm.\n</think>\n\nB<|eos|>"


def test_media_stand_where_messages_have_them():
    for family in (vl_family(), vila_family()):
        picture, clip = frames(1, 56, 56, "i", "image"), frames(4, 56, 56, "v")
        text = {"type": "text", "text": "see <image> here"}
        messages = (
            {"role": "user", "content": [{"type": "image"}, text]},
            {"role": "assistant", "content": [{"type": "text", "text": "ok"}]},
            {"role": "user", "content": [text, {"type": "video"}]},
        )
        prompt = family.render(replace(row(), messages=messages, response="B"), "", [picture, clip], "B")
        tokens = family.media_token_ids()
        counts = [int((prompt.input_ids == tokens[item.kind]).sum()) for item in prompt.media]
        assert counts == [family.num_features(item) for item in prompt.media]
        assert family.tokenizer.decode(prompt.input_ids).count("see <image> here") == 2


# ---- templates that are missing, or of another kind ----


def test_without_a_template_the_option_is_named_and_helps(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    folder = tiny_text(tmp_path / "base", "qwen2", tokenizer)
    base = type(family_of("chatml"))
    with pytest.raises(ValueError, match=r"no chat template.*model\.family\.init_args\.chat_template_file"):
        base(str(folder)).render(row(), "Which?")
    (tmp_path / "chat.jinja").write_text(TEMPLATES["chatml"].text)
    named = base(str(folder), chat_template_file=str(tmp_path / "chat.jinja"))
    assert named.chat_ids("Which?", (), row()) == family_of("chatml").chat_ids("Which?", (), row())
    assert named.identity() == family_of("chatml").identity()
    assert base(str(folder), chat_template_file=str(tmp_path / "chat.jinja"), keep_special_tokens=True).identity() == {
        **named.identity(),
        "keep_special_tokens": True,
    }
    with pytest.raises(ValueError, match=r"chat_template_file must be a file with a Jinja template, got 'no\.jinja'"):
        base(str(folder), chat_template_file="no.jinja").render(row(), "Which?")


def test_a_processors_template_serves_a_tokenizer_without_one(tmp_path):
    """As folders of transformers 4 have it, in a file that no tokenizer reads."""
    folder = shutil.copytree(vl_family().model_path, tmp_path / "model")
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    assert transformers.AutoTokenizer.from_pretrained(folder).chat_template is None
    assert type(vl_family())(str(folder)).tokenizer.chat_template == template


def test_a_template_that_reads_lists_alone_still_tells_how_answers_end():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<|eot|>"], special_tokens=True)
    tokenizer.chat_template = LISTS_ONLY
    assert ChatTokens(tokenizer).turn_end == tokenizer.convert_tokens_to_ids("<|eot|>")
