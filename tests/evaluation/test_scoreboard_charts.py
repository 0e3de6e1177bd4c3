"""Charts of a scoreboard: the front, and labels that hide nothing."""

import itertools

from matplotlib.figure import Figure

from longrl.evaluation.label_places import Bar, Label, place_labels
from longrl.evaluation.scoreboard_charts import pareto_front


def test_the_front_has_what_nothing_cheaper_beats():
    points = [(4, 0.6), (1, 0.2), (2, 0.1), (4, 0.5), (8, 0.6), (16, 0.7)]
    assert pareto_front(points) == [(1, 0.2), (4, 0.6), (16, 0.7)]
    assert pareto_front([]) == []


def test_labels_hide_neither_each_other_nor_intervals():
    figure = Figure(figsize=(8, 4), dpi=100)
    axes = figure.add_subplot()
    axes.set(xlim=(0, 10), ylim=(0, 100))
    points = [(4.0, 50.0), (4.3, 50.0), (4.6, 54.0), (9.9, 99.0), (0.1, 1.0)]
    axes.plot(*zip(*points, strict=True))
    bars = [Bar(x, y - 10, y + 10) for x, y in points]
    place_labels(figure, axes, [Label(f"{n}: 16 frames", x, y, "#000000") for n, (x, y) in enumerate(points)], bars)
    boxes = [text.get_window_extent() for text in axes.texts]
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    inside = axes.get_window_extent()
    assert all(inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 for box in boxes)
    for bar in bars:
        (x, low), (_, high) = axes.transData.transform([(bar.x, bar.low), (bar.x, bar.high)])
        assert not any(box.x0 < x < box.x1 and box.y0 < high and box.y1 > low for box in boxes)
