"""The report stands alone and says what it was given."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from longrl.evaluation.overlaid_curves import plot_overlaid
from longrl.evaluation.report_page import (
    PageTable,
    Picture,
    Report,
    SampleCard,
    clock_time,
    duration,
    write_report,
)
from longrl.evaluation.sample_grids import encode_images
from longrl.types import Row

SCORE = {"accuracy": 0.625, "low": 0.5, "high": 0.75, "n": 48}
CURVE = {"train/loss": {0: 1.0, 1: 0.5}}
RESULTS = {
    "base": {"overall": SCORE},
    "rl": {"overall": SCORE, "plot and narrative": SCORE},
}
HOSTILE = "</style><script>alert('1')</script>&\""


def line(text: str, correct: bool | None, rewards: dict[str, float], num_tokens: int) -> dict[str, list]:
    return {
        "resps": [[text]], "correct": [correct], "rewards": [rewards], "num_completion_tokens": [num_tokens],
        "finish_reason": ["length"],
    }  # fmt: skip


def card(**fields: object) -> SampleCard:
    lines = {"rl": line("<think>1 < 2 & so</think><answer>B</answer>", True, {"accuracy": 1.0}, 12)}
    return SampleCard(Row("q<1>", "Which?\nA. cat\nB. <dog>", "B", category="spatial"), lines, **fields)


def frames(num_frames: int) -> np.ndarray:
    return np.zeros((num_frames, 20, 30, 3), np.uint8)


class Tags(HTMLParser):
    """Open tags that were not closed, and every address the page loads from."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.sources += [value for name, value in attrs if name in ("src", "href", "srcset")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    csv = folder / "metrics.csv"
    csv.write_text("step,train/reward,train/loss\n0,0.1,2\n1,0.3,1\n")
    samples = [card(frames=frames(40), timestamps=np.arange(40) * 100.0), card()]
    title = "after <1>"
    grids = [
        Picture(title, encode_images([Image.new("RGB", (30, 20))], kind), 30, kind, title=title)
        for kind in ("png", "webp")
    ]
    texts = {"subtitle": "sub", "facts": {"commit": "abc"}, "seconds": {"sft": 61.0, "rl": 125.0}}
    path = write_report(folder, Report("A <title>", RESULTS, {"rl": csv}, samples, chance=0.3, pictures=grids, **texts))
    return path.read_text(encoding="utf-8")


def test_the_page_is_well_formed_and_loads_nothing(report):
    tags = Tags(report)
    assert tags.open == []
    assert tags.sources
    assert all(source.startswith("data:image/") for source in tags.sources)
    assert not re.search(r"https?://|<script|@import|url\(", report)


def test_every_text_of_a_report_is_escaped(tmp_path):
    row = Row(HOSTILE, HOSTILE, HOSTILE, category=HOSTILE)
    sample = SampleCard(row, {HOSTILE: line(HOSTILE, None, {HOSTILE: 1.0}, 1)})
    picture = Picture(HOSTILE, b"x", 3, title=HOSTILE)
    sections = {HOSTILE: [HOSTILE, PageTable([HOSTILE], [[HOSTILE, SCORE, None]])]}
    report = Report(
        HOSTILE, {HOSTILE: {"overall": SCORE, HOSTILE: SCORE}}, samples=[sample], subtitle=HOSTILE, note=HOSTILE,
        seconds={HOSTILE: 1.0}, facts={HOSTILE: HOSTILE}, sections=sections, pictures=[picture],
    )  # fmt: skip
    page = write_report(tmp_path, report).read_text(encoding="utf-8")
    tags = Tags(page)
    assert tags.open == []
    assert all(source.startswith("data:image/") for source in tags.sources)
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 20
    assert page.count("</style>") == 1


def test_names_in_charts_are_text_and_no_formulas(tmp_path):
    name = r"$\no$"
    report = Report("r", {name: {"overall": SCORE, name: SCORE}}, sections={"Curves": [plot_overlaid({name: CURVE})]})
    assert write_report(tmp_path, report).is_file()


def test_results_intervals_times_and_facts_are_on_it(report):
    for text in ("62.5", "50.0 to 75.0", "plot and narrative", "sft 1 min 1 s, rl 2 min 5 s", "3 min 6 s", "abc", "RL"):
        assert text in report
    assert "<td>-</td>" in report  # base has no such category


def test_samples_are_escaped_and_marked(report):
    assert "<b>q&lt;1&gt;</b>" in report
    assert '<span class="gold">B. &lt;dog&gt; \u2713</span>' in report
    assert "1 &lt; 2 &amp; so" in report
    assert '<span class="said">B</span>' in report
    for text in ("accuracy 1.00", "12 tokens", "cut off", "right"):
        assert text in report


def test_of_a_long_video_twelve_frames_from_first_to_last_are_shown(report):
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", report)
    assert len(captions) == 12
    assert (captions[0], captions[-1]) == ("0:00", "1:05:00")


def test_charts_are_also_files(tmp_path):
    write_report(tmp_path, Report("t", RESULTS))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["accuracy.png", "report.html"]


def test_an_empty_report_is_a_page_with_its_title(tmp_path):
    path = write_report(tmp_path / "new", Report("Nothing yet"))
    assert "<h1>Nothing yet</h1>" in path.read_text()
    assert "<h2>" not in path.read_text()


def test_frames_in_another_layout_are_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"\[F, H, W, 3\].*got shape \(4, 3, 8, 8\); move the channels last"):
        write_report(tmp_path, Report("t", samples=[card(frames=np.zeros((4, 3, 8, 8), np.uint8))]))


def test_times_read_well():
    assert [clock_time(7), clock_time(760), clock_time(3723)] == ["0:07", "12:40", "1:02:03"]
    assert [duration(8.24), duration(200), duration(7500)] == ["8.2 s", "3 min 20 s", "2 h 5 min"]
