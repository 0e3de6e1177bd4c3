import json
import pickle

import pytest
import torch
from PIL import Image

from longrl.datamodules.loading.render import RowRenderer
from longrl.datamodules.media.frame_lists import FrameListReader, read_frame_list
from longrl.datamodules.media.sampling import VideoSampling
from longrl.datamodules.media.sources import DecodeLimits, open_video, read_video
from longrl.features.cache import FeatureCache
from longrl.types import FrameShard, UnusableSample
from tests.tiny import row, vl_family


def frame_list(folder, count=20, size=(64, 48), **fields):
    """Frame i is grey of level 10 i."""
    for index in range(count):
        Image.new("RGB", size, (10 * index,) * 3).save(folder / f"{index}.png")
    path = folder / "clip.frames.json"
    fields = fields or {"fps": 4}
    path.write_text(json.dumps({"frames": [f"{index}.png" for index in range(count)], **fields}))
    return path


def shown(frames):
    return (frames.pixels.float().mean(dim=(1, 2, 3)) / 10).round().int().tolist()


def test_frames_are_sampled_by_their_times_as_those_of_a_video(tmp_path):
    frames = read_video(frame_list(tmp_path), VideoSampling(fps=2.0))
    assert (frames.kind, tuple(frames.pixels.shape)) == ("video", (10, 3, 48, 64))
    assert shown(frames) == list(frames.indices) == [1, 3, 5, 7, 9, 11, 13, 15, 17, 19]
    assert frames.timestamps == tuple(index / 4 for index in frames.indices)
    assert frames.duration_s == 5.0


def test_uneven_times_decide_and_stay_as_they_are_given(tmp_path):
    path = frame_list(tmp_path, 4, times=[2, 10, 11, 12])
    frames = read_video(path, VideoSampling(fps=None, num_frames=2, min_frames=1))
    assert shown(frames) == [0, 1]  # on show at the middles of 2 to 7.5 and 7.5 to 13 seconds
    assert frames.timestamps == (2.0, 10.0)
    part = read_video(path, VideoSampling(fps=None, num_frames=4, span_s=(10.5, 12.0)))
    assert part.timestamps == (10.0, 11.0)
    with pytest.raises(UnusableSample, match=r"it ends after 13\.0 s, before the part from 20 s on"):
        read_video(path, VideoSampling(span_s=(20.0, 30.0)))


def test_chunks_and_shards_are_parts_of_the_whole(tmp_path):
    path, sampling = frame_list(tmp_path), VideoSampling(fps=None, num_frames=9)
    whole = read_video(path, sampling)
    readers = [open_video(path, sampling, FrameShard(rank, 2), 2) for rank in range(2)]
    parts = [part for reader in readers for part in reader.chunks(3)]
    assert torch.equal(torch.cat([part.pixels for part in parts]), whole.pixels)
    assert {part.key for part in parts} == {whole.key}


def test_the_key_follows_the_content_of_the_frames_shown(tmp_path):
    sampling = VideoSampling(fps=None, num_frames=5)
    path = frame_list(tmp_path)
    before = read_video(path, sampling)
    Image.new("RGB", (64, 48)).save(tmp_path / f"{before.indices[0] + 1}.png")
    assert read_video(path, sampling).key == before.key
    Image.new("RGB", (64, 48)).save(tmp_path / f"{before.indices[0]}.png")
    assert read_video(path, sampling).key != before.key


def test_frames_are_made_upright_and_opaque_as_images_are(tmp_path):
    Image.new("RGBA", (6, 4), (0, 0, 0, 0)).save(tmp_path / "a.png")
    image = Image.new("RGB", (4, 6), (255, 255, 255))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "b.png", exif=exif)
    image.save(tmp_path / "c.tif", exif=exif)
    (tmp_path / "v.frames.json").write_text(json.dumps({"frames": ["c.tif", "a.png", "b.png"], "fps": 1}))
    pixels = read_video(tmp_path / "v.frames.json", VideoSampling()).pixels
    assert tuple(pixels.shape) == (3, 3, 4, 6)
    assert pixels.unique().tolist() == [255]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "no list of frames .KeyError: 'frames'"),
        ('{"frames": ["a.png"]}', "needs their rate"),
        ('{"frames": [], "fps": 2}', "`frames` must be a list of file names"),
        ('{"frames": ["a.png"], "fps": [1]}', "no list of frames .TypeError"),
        ("[1, 2]", "no list of frames .TypeError"),
        ("not json", "no list of frames .JSONDecodeError"),
        ("[" * 100_000, "no list of frames .JSONDecodeError"),
        ('{"frames": ["a.png"], "fps": 1' + "0" * 400 + "}", "no list of frames .OverflowError"),
    ],
)
def test_a_file_that_is_no_list_says_why(tmp_path, content, message):
    path = tmp_path / "v.frames.json"
    path.write_text(content)
    with pytest.raises(UnusableSample, match=message):
        read_frame_list(path)


def test_missing_and_broken_frames_and_those_of_another_size_are_refused(tmp_path):
    path = frame_list(tmp_path)
    everything = VideoSampling(fps=None, num_frames=20)
    (tmp_path / "7.png").write_text("no image")
    with pytest.raises(UnusableSample, match=r"7\.png: it cannot be decoded"):
        read_video(path, everything)
    Image.new("RGB", (64, 40)).save(tmp_path / "7.png")
    with pytest.raises(UnusableSample, match=r"a frame of \(40, 64\) pixels in a video that begins with \(48, 64\)"):
        read_video(path, everything)
    (tmp_path / "7.png").unlink()
    with pytest.raises(UnusableSample, match=r"7\.png: the file does not exist"):
        read_video(path, everything)


def test_a_family_is_shown_them_wherever_the_frames_wait(tmp_path):
    family = vl_family(freeze_vision_encoder=True)
    model = family.build()
    path = str(frame_list(tmp_path))
    features = []
    for max_mib in (0, 9):
        renderer = RowRenderer(family, VideoSampling(), decoding=DecodeLimits(max_held_mib=max_mib, chunk_frames=3))
        prompt = pickle.loads(pickle.dumps(renderer(row("a", videos=(path,)))))
        assert (prompt.media[0].source is None) is (max_mib > 0)
        features += FeatureCache(family).get_or_encode(model, [prompt]).values()
    torch.testing.assert_close(*features, rtol=1e-5, atol=1e-6)


def test_a_list_reads_like_the_video_that_it_was_made_of(tmp_path):
    """The same moments of both: only a decoder's rounding lies between their pixels."""
    import av

    from tests.datamodules.media.test_video import write

    video = write(tmp_path / "v.mp4", 20, size=(64, 64), rate=4)
    with av.open(str(video)) as container:
        for index, frame in enumerate(container.decode(video=0)):
            frame.to_image().save(tmp_path / f"{index}.png")
    names = [f"{index}.png" for index in range(20)]
    (tmp_path / "v.frames.json").write_text(json.dumps({"frames": names, "fps": 4}))
    one, other = (read_video(tmp_path / name, VideoSampling(fps=1.5)) for name in ("v.mp4", "v.frames.json"))
    assert one.indices == other.indices
    assert one.timestamps == other.timestamps
    assert (one.pixels.int() - other.pixels.int()).abs().max() <= 1
    assert FrameListReader(tmp_path / "v.frames.json", VideoSampling(fps=1.5)).outline.key == other.key
