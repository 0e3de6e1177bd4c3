import math

import pytest

from longrl.datamodules.loading.learning_progress import LearningProgress, SourceProgress, source_names


def test_shares_by_hand():
    found = SourceProgress(LearningProgress(window=2, floor=0.2), ["a", "b"], [0.75, 0.25])
    assert found.weights() == [0.75, 0.25]
    assert all(map(math.isnan, found.progress()))
    for reward in (9.0, 0.0, 0.0, 0.5, 1.0):  # the first is older than two windows
        found.observe(0, reward)
    assert found.weights() == [0.75, 0.25]  # of b nothing is known
    for reward in (1.0, 1.0, 0.5, 1.0):  # what is forgotten counts, too
        found.observe(1, reward)
    assert found.progress() == [0.75, 0.25]
    # 0.2 by the sources' own weights, 0.8 by progress, 3 to 1.
    assert found.weights() == pytest.approx([0.2 * 0.75 + 0.8 * 0.75, 0.2 * 0.25 + 0.8 * 0.25])
    assert found.metrics() == pytest.approx(
        {"data/weight_a": 0.75, "data/progress_a": 0.75, "data/weight_b": 0.25, "data/progress_b": 0.25}
    )


def test_where_nothing_changes_the_sources_have_their_own_weights():
    found = SourceProgress(LearningProgress(window=1), ["a", "b"], [0.5, 0.5])
    for source in (0, 0, 1, 1):
        found.observe(source, 1.0)
    assert found.progress() == [0, 0]
    assert found.weights() == [0.5, 0.5]


def test_progress_goes_on_from_its_state():
    found = SourceProgress(LearningProgress(window=1), ["a", "b"], [0.5, 0.5])
    for source, reward in ((0, 1.0), (0, 0.5), (1, 0.0), (1, 0.25)):
        found.observe(source, reward)
    again = SourceProgress(LearningProgress(window=1), ["a", "b"], [0.5, 0.5])
    again.load_state_dict(found.state_dict())
    assert again.weights() == found.weights() != [0.5, 0.5]


def test_names_of_sources_are_names_of_metrics():
    names = source_names(["a/train.jsonl", "b/train.jsonl", "owner/set:test[:1%]", "c/train.jsonl"])
    assert names == ["train", "train_2", "owner_set_test_1", "train_3"]
