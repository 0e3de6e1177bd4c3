"""What a reader says each answer means, written by hand, and the scorer beside it: every line must agree.

Strict reads the `<answer>` alone, robust the text after the thinking where there is no such tag. None: no option.
"""

import random
import re

import pytest
from math_verify import parse, verify

from longrl.rewards.answers import (
    lenient_text,
    multiple_choice,
    multiple_choice_lenient,
    strict_text,
    think_answer_format,
)
from longrl.rewards.numeric import numeric
from longrl.rewards.option_choice import chosen_option
from longrl.rewards.options import parse_options
from longrl.types import Completion, Row

PROBLEM = (
    "What does the scene show?\nA. A man is walking\nB. Dogs chase cats\nC. The red car stops\nD. Nothing happens\n"
)
OPTIONS = parse_options(PROBLEM)

TABLE: list[tuple[str, str | None, str | None]] = [
    # ---- the wanted form, and what stands inside the tag ----
    ("<think>Dogs run.</think><answer>B</answer>", "B", "B"),
    ("<think>Dogs run.</think>\n<answer>B</answer>\n", "B", "B"),
    ("<answer>B</answer>", "B", "B"),
    ("<answer> b </answer>", "B", "B"),
    ("<answer>\nC\n</answer>", "C", "C"),
    ("<answer>(B)</answer>", "B", "B"),
    ("<answer>B.</answer>", "B", "B"),
    ("<answer>c)</answer>", "C", "C"),
    ("<answer>**B**</answer>", "B", "B"),
    (r"<answer>\boxed{B}</answer>", "B", "B"),
    (r"<answer>$\boxed{\text{(D)}}$</answer>", "D", "D"),
    ("<answer>Option B</answer>", "B", "B"),
    ("<answer>Answer: C</answer>", "C", "C"),
    ("<answer>the letter is C</answer>", "C", "C"),
    ("<answer>B. Dogs chase cats</answer>", "B", "B"),
    ("<answer>B.Dogs chase cats</answer>", "B", "B"),
    ("<answer>B (Dogs chase cats)</answer>", "B", "B"),
    ("<answer>C) The red car stops.</answer>", "C", "C"),
    ("<answer>Dogs chase cats</answer>", "B", "B"),
    ("<answer>nothing happens.</answer>", "D", "D"),
    ("<answer>A man is walking</answer>", "A", "A"),
    ("<answer>Therefore the final answer is: D</answer>", "D", "D"),
    ("<answer>C because A and B are wrong</answer>", "C", "C"),
    ("<answer>A because C is wrong</answer>", "A", "A"),
    ('<answer>{"answer": "C"}</answer>', "C", "C"),
    ("<ANSWER>B</ANSWER>", "B", "B"),
    ("< answer >B</ answer >", "B", "B"),
    # ---- letters that distract ----
    ("<think>A? B? It might be D.</think><answer>C</answer>", "C", "C"),
    ("<think>The answer is A</think>The answer is D.", None, "D"),
    ("<answer>C</answer> A, B and D are wrong.", "C", "C"),
    ("The answer is B. Cats and Dogs run", None, "B"),
    ("The best answer is: (B) Dogs chase Cats", None, "B"),
    ("A man is walking. So the answer is C", None, "C"),
    ("The correct option is C because A and B are wrong. D is wrong too.", None, "C"),
    ("Option C is correct. Options A, B and D are not shown.", None, "C"),
    ("I considered A, B and D, but they contradict the video, so C.", None, "C"),
    ("The answer isn't A or B but D.", None, "D"),
    ("Final answer: B (not C)", None, "B"),
    ("A: no. B: no. C: yes. D: no.", None, "C"),
    ("B\n\nExplanation: A man walks first, and D is not true.", None, "B"),
    ("Although a man is seen at first, it is option B.", None, "B"),
    ("Since A happens before B, and C after both, I choose D.", None, "D"),
    ("The man in the blue T-shirt leaves, hence C.", None, "C"),
    ("Vitamin A is shown on the label; the answer is D.", None, "D"),
    ("Plan B fails in the video. Answer: A", None, "A"),
    # ---- no tag, in every usual form ----
    ("B", None, "B"),
    ("a", None, "A"),
    ("(c)", None, "C"),
    ("d.", None, "D"),
    ("B) Dogs chase cats", None, "B"),
    ("**C**", None, "C"),
    ("**Answer: C**", None, "C"),
    ("Answer: **(B)**", None, "B"),
    ("### Final Answer\n\nB", None, "B"),
    ("ANSWER: d", None, "D"),
    ("Answer = D", None, "D"),
    (r"\boxed{C}", None, "C"),
    (r"The final answer is $\boxed{\textbf{(A)}}$.", None, "A"),
    ("```\nB\n```", None, "B"),
    ('{"answer": "B"}', None, "B"),
    ("My final answer is definitely (c).", None, "C"),
    ("Dogs chase cats", None, "B"),
    ("It shows that the red car stops.", None, "C"),
    ("The answer is a man is walking.", None, "A"),
    ("I think a man is walking, i.e. option A.", None, "A"),
    ("<think>Hm.</think>\n\nThe video ends.\n\n**Final Answer:** D", None, "D"),
    # ---- broken and repeated tags ----
    ("<think>It must be A, so the answer is A", None, None),
    ("<think>It never ends <answer>C</answer>", "C", "C"),
    ("<think>Dogs.</think><answer>B", None, "B"),
    ("<answer>A</answer> Wait. <answer>B</answer>", "B", "B"),
    ("<think>First <answer>A</answer>, no.</think><answer>D</answer>", "D", "D"),
    ("<think>Maybe <answer>A</answer></think>", None, None),
    ("<answer><answer>C</answer></answer>", "C", "C"),
    ("B</answer>", None, "B"),
    ("<answer></answer>", None, None),
    ("<think></think>", None, None),
    # ---- other languages ----
    ("<answer>\u7b54\u6848\uff1aB</answer>", "B", "B"),  # Chinese: answer: B
    ("<answer>\u9009\u9879C</answer>", "C", "C"),  # Chinese: option C
    ("<answer>\uff22</answer>", "B", "B"),  # full width
    ("\u7b54\u6848\u662fB\u3002", None, "B"),  # Chinese: the answer is B.
    ("\u4e0d\u662fA\uff0c\u800c\u662fC\u3002", None, "C"),  # Chinese: not A but C.
    ("\u6b63\u89e3\u306fC\u3067\u3059\u3002", None, "C"),  # Japanese: the right answer is C.
    ("\uc815\ub2f5\uc740 B\uc785\ub2c8\ub2e4.", None, "B"),  # Korean: the right answer is B.
    ("\u041e\u0442\u0432\u0435\u0442: D", None, "D"),  # Russian: answer: D
    ("\u0627\u0644\u0625\u062c\u0627\u0628\u0629 \u0647\u064a D", None, "D"),  # Arabic: the answer is D
    ("La respuesta correcta es la B.", None, "B"),
    ("La respuesta es A porque el hombre camina.", None, "A"),
    ("La r\u00e9ponse est C.", None, "C"),
    ("A resposta \u00e9 C.", None, "C"),
    ("Die richtige Antwort ist D, nicht A.", None, "D"),
    # ---- no option: refusals, hedging, noise ----
    ("<answer>I cannot tell from the video.</answer>", None, None),
    ("<answer>unknown</answer>", None, None),
    ("<answer>None of the above</answer>", None, None),
    ("I'm sorry, but I can't help with that.", None, None),
    ("As an AI model, I am unable to watch a video.", None, None),
    ("<answer>A or B</answer>", None, None),
    ("<answer>A, B</answer>", None, None),
    ("<answer>AB</answer>", None, None),
    ("<answer>B/C</answer>", None, None),
    ("Either C or D.", None, None),
    ("Both A and B are correct.", None, None),
    ("<answer>E</answer>", None, None),
    ("<answer>2</answer>", None, None),
    ("It is not B.", None, None),
    ("!!!!!!!!!!!!", None, None),
    ("BBBBBBBBBBBB", None, None),
    ("", None, None),
    # ---- a second reading, of longer and stranger ones ----
    ("The video shows dogs; B is therefore the correct answer.", None, "B"),
    ("Based on the video, the correct answer is:\n\n**C. The red car stops**", None, "C"),
    ("Answer: B. Dogs chase cats. A man is not walking.", None, "B"),
    ("I would say B, although A is tempting.", None, "B"),
    ("It's between B and C, but I'd go with C.", None, "C"),
    ("Not D. B.", None, "B"),
    ("(A) is incorrect; (B) is correct.", None, "B"),
    ('The man asks "Why A?" but the answer would be C', None, "C"),
    ("Option A: A man is walking. Option B: Dogs chase cats. I believe option B fits best.", None, "B"),
    ("The correct choice is B) Dogs chase cats, not C) The red car stops.", None, "B"),
    ("C) The red car stops. A) and B) are wrong.", None, "C"),
    ("The B-roll shows a car; so the answer is C.", None, "C"),
    ("In scene A the man sits; in scene B he stands. Answer: D", None, "D"),
    ("After reviewing frames 1 to 8, I conclude that the answer must be (D) Nothing happens.", None, "D"),
    ("A woman walks while dogs chase cats", None, "B"),
    ("Answer: The red car stops", None, "C"),
    ("Hmm, A? No, C.", None, "C"),
    ("B? Yes, B.", None, "B"),
    ("A\nA\nA", None, "A"),
    ("A) is my pick", None, "A"),
    ("I am certain: B", None, "B"),
    ("D, I think.", None, "D"),
    ("The answer is 'C'.", None, "C"),
    ("The answer is option number C.", None, "C"),
    ("So answer=B", None, "B"),
    ("Ans. C", None, "C"),
    ("<think>ok</think> I choose option a", None, "A"),
    ("<answer>It's C.</answer>", "C", "C"),
    ("<answer>C, the red car stops</answer>", "C", "C"),
    ("<answer>I think it's B</answer>", "B", "B"),
    ("<answer>[B]</answer>", "B", "B"),
    ('<answer>"B"</answer>', "B", "B"),
    ("<answer>B </answer", None, "B"),
    ("<answer>B<answer>", None, "B"),
    ("\u6700\u7ec8\u7b54\u6848\uff1a**D**", None, "D"),  # Chinese: final answer: D
    ("\u7b54\u6848\u5e94\u8be5\u662f(C)", None, "C"),  # Chinese: the answer should be (C)
    ("B\u9009\u9879", None, "B"),  # Chinese: option B
    ("\u9009B\uff0c\u56e0\u4e3a\u72d7\u5728\u8ffd\u732b\uff0cA\u4e0d\u5bf9\u3002", None, "B"),  # choose B; A is wrong
    ("\u0110\u00e1p \u00e1n: B", None, "B"),  # Vietnamese: answer: B
    ("\u0e04\u0e33\u0e15\u0e2d\u0e1a\u0e04\u0e37\u0e2d B", None, "B"),  # Thai: the answer is B
    ("Resposta: letra A", None, "A"),
    ("La risposta \u00e8 la A", None, "A"),
    ("C'est la r\u00e9ponse D.", None, "D"),
    ("D'accord, la r\u00e9ponse est B.", None, "B"),
    ("<answer>A. A man is walking, D. Nothing happens</answer>", None, None),
    ("<answer>C\nD</answer>", None, None),
    ("<answer>A B C D</answer>", None, None),
    ("<answer>All of the above</answer>", None, None),
    ("<answer>a dog</answer>", None, None),
    ("It could be A, B, C or D.", None, None),
    ("I see a man. I see a car.", None, None),
    ("Cannot be determined.", None, None),
]


def completion(text: str) -> Completion:
    return Completion(token_ids=(), logprobs=(), text=text, finish_reason="stop")


def test_the_table_is_long_and_without_repeats():
    assert len(TABLE) >= 60
    assert len({text for text, *_ in TABLE}) == len(TABLE)


@pytest.mark.parametrize(("text", "strict", "robust"), TABLE)
def test_the_letter_is_the_one_a_reader_finds(text, strict, robust):
    assert chosen_option(strict_text(text), OPTIONS) == strict
    assert chosen_option(lenient_text(text), OPTIONS) == robust


@pytest.mark.parametrize("gold", OPTIONS)
def test_rewards_follow_the_letters(gold):
    row = Row("1", PROBLEM, gold)
    for text, strict, robust in TABLE:
        assert multiple_choice(completion(text), row) == (strict == gold)
        assert multiple_choice_lenient(completion(text), row) == (robust == gold)


def test_robust_never_takes_back_what_strict_found():
    assert all(robust == strict for _, strict, robust in TABLE if strict is not None)


# ---- independent public extractors ----
# Facts of two released scorers, stated anew. LongVideo-Reason (arXiv:2507.07966): the first <answer>, else the whole
# completion, compared by bytes; its format reward says when the completion has the form it is defined for. Video-R1
# (arXiv:2503.21776): the content of <answer> without space around it; numbers equal after rounding to two decimals.

LONGVIDEO_REASON_FORM = re.compile(r"<think>.*?</think>\s*<answer>.*?</answer>", re.DOTALL)


def longvideo_reason_letter(text: str) -> str:
    phrase = "Therefore the final answer is: " if "Therefore the final answer is:" in text else ""
    found = re.search(rf"<answer>{phrase}(.*?)</answer>", text, re.DOTALL)
    return (found[1] if found else text).strip()


def video_r1_answer(text: str) -> str:
    found = re.search(r"<answer>\s*(.*?)\s*</answer>", text, re.DOTALL)
    return found[1].strip() if found else ""


def predictions(count: int) -> list[str]:
    """Completions of the published form, with thinking that names letters."""
    draw = random.Random(0)
    thoughts = ("Hm.", "A or B?", "The answer is D, no.", "(C) and option A\nare wrong.", "\u56e0\u4e3aB")
    tails = ("<answer>{}</answer>", "\n<answer> {}\n</answer>", "<answer>Therefore the final answer is: {}</answer>")
    return [
        f"<think>{draw.choice(thoughts)}</think>{draw.choice(tails).format(draw.choice('ABCD'))}" for _ in range(count)
    ]


def test_the_strict_score_is_that_of_the_released_scorer_where_both_are_defined():
    texts = [*predictions(500), *(text for text, *_ in TABLE)]
    defined = [text for text in texts if LONGVIDEO_REASON_FORM.fullmatch(text.strip()) and text.count("<answer>") == 1]
    defined = [text for text in defined if longvideo_reason_letter(text) in OPTIONS]  # of two tags it takes the first
    assert len(defined) > 500
    for text in defined:
        assert chosen_option(strict_text(text), OPTIONS) == longvideo_reason_letter(text)
    bare = [text for text in texts if text.strip() in OPTIONS]  # there the released scorer reads the whole completion
    assert bare
    assert all(chosen_option(lenient_text(text), OPTIONS) == longvideo_reason_letter(text) for text in bare)


def test_accuracy_is_that_of_both_released_scorers_on_the_same_predictions():
    draw = random.Random(1)
    texts = [text for text in predictions(500) if "Therefore" not in text]
    golds = [draw.choice("ABCD") for _ in texts]
    ours = [multiple_choice(completion(text), Row("1", PROBLEM, gold)) for text, gold in zip(texts, golds, strict=True)]
    for public in (longvideo_reason_letter, video_r1_answer):
        assert ours == [float(public(text) == gold) for text, gold in zip(texts, golds, strict=True)]
    assert 0 < sum(ours) < len(ours)
    assert all(think_answer_format(completion(text), Row("1", PROBLEM, "A")) for text in texts)


def test_numbers_are_judged_as_by_video_r1_and_by_math_verify():
    draw = random.Random(2)
    for _ in range(300):
        gold, off = round(draw.uniform(-50, 50), 2), draw.choice((0.0, 0.01, -0.5, 3.0))
        said = round(gold + off, 2)
        ours = numeric(completion(f"<think>I add.</think><answer>{said}</answer>"), Row("1", "How far?", str(gold)))
        text = video_r1_answer(f"<answer>{said}</answer>")
        assert ours == float(round(float(text), 2) == round(gold, 2))
        assert ours == float(verify(parse(f"${gold}$"), parse(f"${text}$"), float_rounding=2))
