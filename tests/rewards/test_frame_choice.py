"""The frames of a generated video that a reward sees."""

import pytest

from longrl.rewards.frame_choice import frame_indices


@pytest.mark.parametrize(
    ("frames_of", "indices"), [("all", list(range(10))), ("first", [0]), ("last", [9]), ("every 4", [0, 4, 8])]
)
def test_the_indices_of_ten_frames(frames_of, indices):
    assert frame_indices(10, frames_of) == indices


@pytest.mark.parametrize("frames_of", ["every 0", "every", "middle", ""])
def test_another_choice_is_refused(frames_of):
    with pytest.raises(ValueError, match="must be all, first, last or 'every N'"):
        frame_indices(10, frames_of)
