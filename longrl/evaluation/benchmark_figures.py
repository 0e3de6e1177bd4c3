"""What published benchmarks report of all answers together (`protocol.figures`): functions of records, in percent.

A question that several completions answer counts once, with their mean. Records without a rule's value count as their
strict score does.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from longrl.evaluation.records import Record
from longrl.evaluation.scores import RULE, Responses, by_question, mean_of

VSI_DIRECTIONS = "object_rel_direction"
"""Beginning of three question types of VSI-Bench that are one of its eight tasks."""
CG_THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5)
ACTIVITYNET_FREE = ("Yes/No", "Color", "Object", "Location", "Number", "Other")
"""Types of ActivityNet-QA that are its "free" questions."""


def recall_at_iou(records: Sequence[Record]) -> dict[str, float]:
    """R@0.3, R@0.5, R@0.7 and mIoU by the rule's IoU, overall and, where there are several, of each category."""
    values = _values(records)
    sets = {"": [value for each in values.values() for value in each]}
    if len(values) > 1:
        sets |= {f"{category}: ": each for category, each in values.items()}
    figures = {}
    for name, each in sets.items():
        for degree in (0.3, 0.5, 0.7):
            figures[f"{name}R@{degree:g}"] = _percent([float(value >= degree) for value in each])
        figures[f"{name}mIoU"] = _percent(each)
    return figures


def vsi_bench(records: Sequence[Record]) -> dict[str, float]:
    """Each of the eight tasks of VSI-Bench (arXiv:2412.14171), a direction the mean of three, and the plain mean."""
    means = {category: _percent(each) for category, each in _values(records).items()}
    directions = {name: means.pop(name) for name in list(means) if name.startswith(VSI_DIRECTIONS)}
    if directions:
        means[VSI_DIRECTIONS] = sum(directions.values()) / len(directions)
    return {"average of tasks": sum(means.values()) / len(means), **dict(sorted(means.items()))}


def cg_bench(records: Sequence[Record]) -> dict[str, float]:
    """Figures of CG-Bench (arXiv:2412.12075): long-acc, clue-acc, CRR, mIoU, rec@IoU and acc@IoU.

    CRR is the share of clue-acc that the whole video leaves, at most 100. At IoU means: averaged over the thresholds
    0.1 to 0.5, and for acc the same question must be right as well. What was not asked is left out.
    """
    modes: dict[str, dict[str, float]] = defaultdict(dict)  # mode -> qid -> value
    for question in by_question(records):
        qid, _, mode = str(question[0]["id"]).rpartition("/")
        modes[mode][qid] = _value(question)
    values, figures = _values(records), {}
    for mode, name in (("long", "long-acc"), ("clue", "clue-acc"), ("grounding", "mIoU")):
        if mode in values:
            figures[name] = _percent(values[mode])
    if figures.get("clue-acc") and "long-acc" in figures:
        figures["CRR"] = 100 * min(figures["long-acc"], figures["clue-acc"]) / figures["clue-acc"]
    grounded = modes["grounding"]
    if grounded:
        reached = {qid: sum(iou >= least for least in CG_THRESHOLDS) / 5 for qid, iou in grounded.items()}
        figures["rec@IoU"] = _percent(list(reached.values()))
        both = reached.keys() & modes["long"].keys()
        if both:
            figures["acc@IoU"] = _percent([reached[qid] * modes["long"][qid] for qid in both])
    return figures


def video_mmmu(records: Sequence[Record]) -> dict[str, float]:
    """Tracks of VideoMMMU (arXiv:2501.13826), their mean, and what its videos teach, where both were asked.

    The gain is (after - before) / (100 - before), of adaptation with its video and with the question's image alone;
    beside it the shares of wrong answers that became right and of right ones that became wrong.
    """
    questions: dict[str, dict[str, float]] = defaultdict(dict)  # track -> id -> value
    for question in by_question(records):
        record_id = str(question[0]["id"]).partition("/")[0]
        questions[str(question[0]["category"])][record_id] = _value(question)
    before, after = questions["question only"], questions["adaptation"]
    tracks = {name: each for name, each in _values(records).items() if name != "question only"}
    figures = {name: _percent(each) for name, each in tracks.items()}
    if figures:
        figures = {"overall": _percent([value for each in tracks.values() for value in each]), **figures}
    both = sorted(before.keys() & after.keys())
    if both:
        start, end = _percent([before[qid] for qid in both]), _percent([after[qid] for qid in both])
        figures["question only"] = start
        wrong, right = [qid for qid in both if before[qid] < 1], [qid for qid in both if before[qid] == 1]
        if wrong:
            figures["gain of knowledge"] = 100 * (end - start) / (100 - start)
            figures["wrong to right"] = _percent([after[qid] for qid in wrong])
        if right:
            figures["right to wrong"] = _percent([1 - after[qid] for qid in right])
    return figures


def activitynet_qa(records: Sequence[Record]) -> dict[str, float]:
    """Accuracy and mean score (0 to 5) of ActivityNet-QA by its judge, of all, of free questions and of each type.

    They are the parts `accuracy` and `score` of the reward (`configs/reward/activitynet_qa.yaml`); without them nothing
    is reported.
    """
    parts: dict[str, dict[str, list[float]]] = {"accuracy": defaultdict(list), "score": defaultdict(list)}
    for question in by_question(records):
        for part, by_category in parts.items():
            given = [record["rewards"][part] for record in question if part in record["rewards"]]
            if given:
                by_category[str(question[0]["category"])].append(sum(given) / len(given))
    figures: dict[str, float] = {}
    for part, by_category in parts.items():
        if not by_category:
            continue
        scale, name = (1.0, "accuracy") if part == "accuracy" else (0.05, "score of 5")
        free = [value for category in ACTIVITYNET_FREE for value in by_category.get(category, ())]
        sets = {"": [value for each in by_category.values() for value in each]} | ({"Free: ": free} if free else {})
        sets |= {f"{category}: ": each for category, each in sorted(by_category.items())} if scale == 1.0 else {}
        figures |= {f"{where}{name}": scale * _percent(each) for where, each in sets.items()}
    return figures


def mmvu(records: Sequence[Record]) -> dict[str, float]:
    """Accuracy of MMVU (arXiv:2501.12380) by its judge, the part `accuracy` of the reward, of all and of both kinds."""
    kinds: dict[str, list[float]] = defaultdict(list)
    for question in by_question(records):
        given = [record["rewards"]["accuracy"] for record in question if "accuracy" in record["rewards"]]
        if given:
            kinds[str(question[0]["task"]).replace("_", " ")].append(sum(given) / len(given))
    if not kinds:
        return {}
    everything = [value for each in kinds.values() for value in each]
    return {"accuracy": _percent(everything)} | {name: _percent(each) for name, each in sorted(kinds.items())}


def _values(records: Sequence[Record]) -> Mapping[str, list[float]]:
    """Category -> the value of each of its questions."""
    values: dict[str, list[float]] = defaultdict(list)
    for question in by_question(records):
        values[str(question[0]["category"])].append(_value(question))
    return dict(sorted(values.items()))


def _value(question: Responses) -> float:
    return mean_of(question, RULE if question[0].get(RULE) is not None else "correct")


def _percent(values: Sequence[float]) -> float:
    return 100 * sum(values) / len(values)
