"""`cache-features` on real videos, and that a run with a full cache is the run without one."""

import json
import os
from unittest import mock

import pytest
import yaml

from longrl.commands.main import main
from longrl.datamodules.media.video import VideoReader
from longrl.models.qwen_vl import Qwen2_5_VLFamily
from tests.distributed import run_as_torchrun, run_distributed
from tests.runs import config, data_order, metrics, rollouts, run, videos


def values_of(folder, stage="rl", **model):
    """A run that keeps its features in `folder`."""
    values = config(stage)
    values["model"] |= {"feature_cache_dir": str(folder), **model}
    values["trainer"]["max_steps"] = 6  # an epoch
    return values


def command(folder, values, *more):
    file = folder / "given.yaml"
    file.write_text(yaml.safe_dump(values))
    return ["cache-features", "--config", str(file), *more]


class Encoder:
    """Counts media sent through the encoder."""

    def __enter__(self):
        self.num_media = 0
        plain = Qwen2_5_VLFamily.encode_media

        def counted(family, model, media):
            self.num_media += len(media)
            return plain(family, model, media)

        self._patch = mock.patch.object(Qwen2_5_VLFamily, "encode_media", counted)
        self._patch.start()
        return self

    def __exit__(self, *error):
        self._patch.stop()


class Decoded:
    """Counts decoded frames."""

    def __enter__(self):
        self.num_frames = 0
        plain = VideoReader.chunks

        def counted(reader, num_frames):
            for frames in plain(reader, num_frames):
                self.num_frames += len(frames.pixels)
                yield frames

        self._patch = mock.patch.object(VideoReader, "chunks", counted)
        self._patch.start()
        return self

    def __exit__(self, *error):
        self._patch.stop()


def stored_in(folder):
    return sorted(folder.glob("*.safetensors"))


def test_every_video_is_encoded_once_and_a_second_run_encodes_and_decodes_nothing(tmp_path, capsys):
    """3 training videos of 4 questions each, one video for validation, and the same for test."""
    values = values_of(tmp_path / "features")
    values["data"] |= {"val": str(videos() / "eval.jsonl"), "test": str(videos() / "eval.jsonl")}
    with Encoder() as vision_encoder, Decoded() as decoded:
        main(command(tmp_path, values))
    assert vision_encoder.num_media == len(stored_in(tmp_path / "features")) == 4
    assert decoded.num_frames > 0
    assert "5 videos looked at: 4 media encoded" in capsys.readouterr().out
    with Encoder() as vision_encoder, Decoded() as decoded:
        main(command(tmp_path, values))
    assert vision_encoder.num_media == decoded.num_frames == 0
    assert "5 videos looked at: 0 media encoded (0.00 GiB), 5 were there, 0 rows skipped" in capsys.readouterr().out


def test_a_run_with_a_full_cache_is_bit_for_bit_the_run_without(tmp_path):
    """RL: same completions, losses and gradient norms; no video is decoded or encoded."""
    values = values_of(tmp_path / "features")
    values["rollout"] = rollouts(sampling={"num_generations": 3, "max_completion_tokens": 5})
    main(command(tmp_path, values))
    plain = values_of(tmp_path / "features") | {"trainer": values["trainer"], "rollout": values["rollout"]}
    del plain["model"]["feature_cache_dir"]
    with Encoder() as vision_encoder, Decoded() as decoded:
        warm = run(tmp_path / "warm", values)
    assert vision_encoder.num_media == decoded.num_frames == 0
    with Encoder() as vision_encoder, Decoded() as decoded:
        without = run(tmp_path / "without", plain)
    assert vision_encoder.num_media == 3
    assert decoded.num_frames > 0
    assert metrics(warm) == metrics(without)
    assert {name for _, name in metrics(warm)} >= {"train/loss", "train/grad_norm", "reward/mean"}
    assert data_order(warm) == data_order(without)
    assert_all_from_disk(warm)


def assert_all_from_disk(folder):
    (file,) = folder.glob("logs/version_*/metrics.csv")
    names, *lines = (line.split(",") for line in file.read_text().splitlines())
    rates = [line[names.index("throughput/feature_hit_rate")] for line in lines]
    assert {float(rate) for rate in rates if rate} == {1.0}


def test_a_cold_run_fills_the_cache_and_mixed_precision_finds_its_own_files(tmp_path):
    """SFT encodes within the step's autocast, also in the command."""
    values = values_of(tmp_path / "features", "sft")
    values["trainer"]["precision"] = "bf16-mixed"
    run(tmp_path / "cold", values)
    assert len(stored_in(tmp_path / "features")) == 3
    with Encoder() as vision_encoder:
        main(command(tmp_path, values))
        run(tmp_path / "warm", values)
    assert vision_encoder.num_media == 0
    assert metrics(tmp_path / "cold") == metrics(tmp_path / "warm")


def test_workers_do_not_decode_either(tmp_path):
    values = values_of(tmp_path / "features")
    values["data"] |= {"num_workers": 1}
    main(command(tmp_path, values))
    with Encoder() as vision_encoder:
        run(tmp_path / "warm", values)
    assert vision_encoder.num_media == 0


def test_a_file_that_proves_broken_later_is_decoded_and_encoded_again(tmp_path):
    values = values_of(tmp_path / "features")
    main(command(tmp_path, values))
    whole = [file.read_bytes() for file in stored_in(tmp_path / "features")]
    for file in stored_in(tmp_path / "features"):
        file.write_bytes(file.read_bytes()[:-1])
    with Encoder() as vision_encoder:
        run(tmp_path / "run", values)
    assert vision_encoder.num_media == 3
    assert [len(file.read_bytes()) for file in stored_in(tmp_path / "features")] == list(map(len, whole))


def with_broken_video(tmp_path, shared):
    """The training rows, and more: one shows a broken file, or as many as there are good ones."""
    lines = (videos() / "train.jsonl").read_text().splitlines()
    (tmp_path / "broken.mp4").write_bytes(b"no video at all")
    records = []
    for number in range(len(lines) if shared else 1):
        record = json.loads(lines[0])
        name = next(key for key, value in record.items() if str(value).endswith(".mp4"))
        records.append(
            record | {name: str(tmp_path / "broken.mp4"), "id": f"bad{number}", "problem_id": f"bad{number}"}
        )
    (tmp_path / "rows.jsonl").write_text("\n".join([*lines, *map(json.dumps, records)]) + "\n")
    return {"train": str(tmp_path / "rows.jsonl"), "media_root": str(videos()), "allow_outside_paths": True}


def test_broken_videos_are_listed_beside_the_features_and_the_others_are_stored(tmp_path, capsys):
    values = values_of(tmp_path / "features")
    values["data"] |= with_broken_video(tmp_path, shared=False)
    main(command(tmp_path, values, f"--run_dir={tmp_path / 'run'}"))
    (listed,) = [json.loads(line) for line in (tmp_path / "features" / "skipped.jsonl").read_text().splitlines()]
    assert listed["path"] == str(tmp_path / "broken.mp4")
    assert len(stored_in(tmp_path / "features")) == 3
    assert "1 rows skipped" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_too_many_broken_rows_end_it_as_they_end_a_run(tmp_path):
    values = values_of(tmp_path / "features")
    values["data"] |= with_broken_video(tmp_path, shared=True)
    with pytest.raises(ValueError, match=r"data\.max_skipped_share=0\.05 of the train rows may be skipped"):
        main(command(tmp_path, values))


def test_a_row_that_is_too_long_leaves_the_video_to_others(tmp_path):
    values = values_of(tmp_path / "features")
    lines = [json.loads(line) for line in (videos() / "train.jsonl").read_text().splitlines()]
    lines[0]["problem"] += " and so on" * 2000
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    values["data"] |= {"train": str(tmp_path / "rows.jsonl"), "media_root": str(videos()), "max_prompt_tokens": 1500}
    main(command(tmp_path, values))
    assert len(stored_in(tmp_path / "features")) == 3


def test_without_a_folder_it_says_which_option_is_missing(tmp_path):
    with pytest.raises(ValueError, match=r"writes to model\.feature_cache_dir, which is not set"):
        main(command(tmp_path, config("rl")))


def test_a_limit_below_a_single_file_is_an_error_here(tmp_path):
    with pytest.raises(ValueError, match=r"cannot be stored in model\.feature_cache_dir=.*feature_cache_disk_bytes"):
        main(command(tmp_path, values_of(tmp_path / "features", feature_cache_disk_bytes=100)))


def test_a_trainable_tower_is_refused(tmp_path):
    values = values_of(tmp_path / "features")
    values["model"]["family"]["init_args"]["freeze_vision_encoder"] = False
    with pytest.raises(ValueError, match=r"freeze it with model\.family\.init_args\.freeze_vision_encoder=true"):
        main(command(tmp_path, values))


def test_each_rank_of_torchrun_takes_its_part(tmp_path):
    values = values_of(tmp_path / "features")
    for rank, wanted in ((0, 2), (1, 1)):
        environment = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
        with mock.patch.dict(os.environ, environment), Encoder() as vision_encoder:
            main(command(tmp_path, values))
        assert vision_encoder.num_media == wanted
    assert len(stored_in(tmp_path / "features")) == 3


def test_under_torchrun_on_a_config_for_two_devices(tmp_path):
    values = values_of(tmp_path / "features")
    values["trainer"] |= {
        "devices": 2,
        "strategy": {"class_path": "longrl.strategies.mr_sp.MRSPStrategy", "init_args": {"sequence_parallel_size": 2}},
    }
    first, second = run_as_torchrun(2, *command(tmp_path, values))
    assert len(stored_in(tmp_path / "features")) == 3
    assert "rank 0 of 2: 2 videos" in first
    assert "rank 1 of 2: 1 videos" in second


@pytest.mark.slow
def test_two_ranks_that_share_frames_fill_the_cache_and_read_it(tmp_path):
    """Validation too; of one file that breaks in between both ranks decode and encode their share again."""
    values = values_of(tmp_path / "features")
    values["trainer"] |= {
        "devices": 2,
        "val_check_interval": 3,
        "strategy": {"class_path": "longrl.strategies.mr_sp.MRSPStrategy", "init_args": {"sequence_parallel_size": 2}},
    }
    values["data"] |= {"val": str(videos() / "eval.jsonl"), "eval_prompts_per_batch": 4}
    run_distributed(run, 2, tmp_path / "cold", values)
    files = stored_in(tmp_path / "features")
    assert len(files) == 4
    run_distributed(run, 2, tmp_path / "warm", values)
    assert metrics(tmp_path / "warm") == metrics(tmp_path / "cold")
    assert_all_from_disk(tmp_path / "warm")
    whole = [file.read_bytes() for file in files]
    for file in files:
        file.write_bytes(file.read_bytes()[:-1])
    run_distributed(run, 2, tmp_path / "broken", values)
    assert metrics(tmp_path / "broken") == metrics(tmp_path / "cold")
    assert [len(file.read_bytes()) for file in files] == list(map(len, whole))
