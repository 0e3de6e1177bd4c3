"""Traces as targets have the tokens, positions and media of the rollout that they are written down from."""

import json
from dataclasses import replace

import pytest
import torch

from longrl.datamodules.loading.render import RowRenderer
from longrl.datamodules.media.sampling import VideoSampling
from longrl.datamodules.rows import longvideo_reason_row
from longrl.environments.rendering import as_observation, render_observation
from longrl.environments.traces import record_trace
from longrl.environments.trajectory import Trajectory
from longrl.environments.video_tools import VideoTools
from longrl.features.cache import encode_shard
from longrl.packing.lengths import LengthLimit
from longrl.strategies.parallel import Parallel
from longrl.testing.tool_traces import crop_call, evidence_trace
from longrl.types import FrameShard, SamplingParams, UnusableSample
from tests.datamodules.media.test_video import write
from tests.runs import config, metrics, run, videos
from tests.tiny import internvl_family, qwen3_5_family, qwen3_vl_family, vila_family, vl_family

SAMPLING = VideoSampling(fps=0.5, min_frames=1)
ZOOM = '<tool_call>\n{"name": "zoom", "arguments": {"time_s": 2, "box": [0, 0, 570, 1000]}}\n</tool_call>'
BAD = '<tool_call>\n{"name": "zoom"\n</tool_call>'
TURNS = (f"<think>Look.</think>\n{crop_call(1, 3)}\n{ZOOM}", f"<think>Again.</think>{BAD}", "<answer>B</answer>")


@pytest.fixture(scope="module")
def media_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("traces")
    write(root / "v.mp4", 60, noise=True)
    return str(root)


def record(**fields):
    return {"problem": "Which? A. red B. blue", "answer": "B", "videos": "v.mp4", **fields}


def traced(media_root, turns=TURNS):
    row = longvideo_reason_row(record(), 0, media_root)
    trace = record_trace(VideoTools(fps=4, max_frames=6), row, turns, media_root)
    trace = json.loads(json.dumps(trace))
    return longvideo_reason_row(record(trace=trace), 0, media_root)


def rollout(family, prompt, turns=TURNS):
    """What a rollout of these turns comes to."""
    environment = VideoTools(fps=4, max_frames=6)
    environment.reset(prompt.row)
    trajectory = Trajectory(prompt, 0, SamplingParams(max_completion_tokens=10_000), max_turns=len(turns))
    for turn in turns:
        ids = family.encode_response(turn)
        if trajectory.add_turn(ids, torch.zeros(len(ids)), turn, stopped=True):
            trajectory.add_observed(render_observation(family, as_observation(environment.step(turn)), True))
    return trajectory.completion()


def renderer(family, **options):
    return RowRenderer(family, SAMPLING, stage="sft", **options)


@pytest.mark.parametrize("make", [vl_family, qwen3_vl_family, qwen3_5_family, internvl_family, vila_family])
def test_a_trace_has_the_tokens_of_its_rollout(make, media_root):
    """Turns, answers, positions, and media under the keys under which a rollout encodes them; errors are shown, too."""
    family = make()
    prompt = renderer(family)(traced(media_root))
    wanted = rollout(family, prompt)
    got = prompt.response
    assert got.token_ids.tolist() == wanted.token_ids.tolist()
    assert got.sampled.tolist() == wanted.sampled.tolist()
    assert torch.equal(got.position_ids, wanted.position_ids.to(got.position_ids))
    assert [item.key for item in got.media] == [item.key for item in wanted.media]
    assert [item.kind for item in got.media] == ["video", "image"]
    taught = [family.encode_response(turn).tolist() for turn in TURNS]
    assert got.token_ids[got.sampled].tolist() == [token for turn in taught for token in turn]


def test_ranks_that_share_a_sequence_decode_their_part(media_root):
    """The parts together are what one rank reads."""
    family = qwen3_vl_family()
    row = traced(media_root)
    whole = renderer(family)(row).response.media
    parts = [renderer(family, shard=FrameShard(rank, 2))(row).response for rank in range(2)]
    for index, item in enumerate(whole):
        patches = [part.media[index].patches for part in parts if part.media[index].patches.numel()]
        assert torch.equal(torch.cat(patches), item.patches)
    assert parts[0].token_ids.tolist() == parts[1].token_ids.tolist()


class Stored:
    def has(self, key):
        return True


def test_media_with_stored_features_are_not_decoded_until_they_are_needed(media_root):
    family = vl_family()
    row = traced(media_root)
    kept, decoded = (renderer(family, stored=one)(row).response for one in (Stored(), None))
    assert kept.token_ids.tolist() == decoded.token_ids.tolist()
    assert [item.key for item in kept.media] == [item.key for item in decoded.media]
    assert all(item.patches.numel() == 0 and item.source is not None for item in kept.media)
    model = family.build()
    features = [encode_shard(family, model, one.media, Parallel(), one_by_one=True) for one in (kept, decoded)]
    assert torch.equal(*features)


def test_what_cannot_be_shown_makes_the_row_unusable(media_root):
    """With its reason: nothing is taught beside frames that are not there."""
    row = traced(media_root)
    asks, shows, *rest = row.trace
    late = {**shows["content"][1], "span_s": [50.0, 60.0]}
    late = replace(row, trace=(asks, {"role": "tool", "content": [late]}, *rest))
    with pytest.raises(UnusableSample, match="it ends after 6.0 s, before the part from 50 s on"):
        renderer(vl_family())(late)
    with pytest.raises(UnusableSample, match="shorten|shorter|fewer"):
        renderer(vl_family(), limits=(LengthLimit(100, "model.max_tokens_per_micro_batch", 0),))(row)


def test_evidence_is_looked_at_before_the_answer(media_root):
    """A synthetic trace: what a record says of its evidence is what the call asks for."""
    made = evidence_trace(record(metadata={"evidence_s": [1, 2.5]}), VideoTools(fps=4), media_root)
    made = json.loads(json.dumps(made))
    asks, shows, answers = made["trace"]
    assert asks["content"].endswith(crop_call(1.0, 2.5))
    text, crop = shows["content"]
    assert text["text"].startswith("The video from 1 to 2.5 s, 6 frames.")
    assert (crop["video"], crop["span_s"], crop["fps"]) == ("v.mp4", [1.0, 2.5], 4.0)
    assert answers["content"].endswith("<answer>B</answer>")
    prompt = renderer(vl_family())(longvideo_reason_row(made, 0, media_root))
    assert prompt.response.num_sampled < len(prompt.response.token_ids)
    assert "crop_video" in vl_family().tokenizer.decode(prompt.input_ids), "tools are offered"
    with pytest.raises(ValueError, match="evidence_s"):
        evidence_trace(record(), VideoTools(), media_root)


@pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization")
def test_a_run_learns_from_traces(tmp_path):
    """Through the command line, media inside the targets included, and rows without a trace beside them."""
    root = videos()
    records = [json.loads(line) for line in (root / "train.jsonl").read_text().splitlines()[:4]]
    for entry in records[1:]:
        entry |= evidence_trace(entry, VideoTools(fps=1), str(root), span_s=(2, 6))
    source = tmp_path / "traces.jsonl"
    source.write_text("".join(json.dumps(entry) + "\n" for entry in records))
    values = config("sft")
    values["trainer"]["max_steps"] = 6
    values["model"]["max_tokens_per_micro_batch"] = 2000
    values["data"] |= {"train": str(source), "media_root": str(root)}
    run(tmp_path / "run", values)
    logged = metrics(tmp_path / "run")
    losses = [float(value) for (_, name), value in sorted(logged.items()) if name == "train/loss"]
    assert len(losses) == 6
    assert losses[-1] < losses[0]
