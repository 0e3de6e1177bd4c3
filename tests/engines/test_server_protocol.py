import json

import pytest
import torch

from longrl.engines import server_protocol
from longrl.engines.server_protocol import (
    PIECE_ROWS,
    content_name,
    dump_requests,
    load_requests,
    pack_message,
    unpack_message,
)


def test_a_request_comes_out_as_it_went_in():
    whole = torch.arange(12, dtype=torch.bfloat16).view(4, 3)
    request = {
        "prompt_token_ids": [1, 2, 3],
        "multi_modal_data": {"video": {"video_embeds": whole[1:3], "second_per_grid_ts": torch.tensor([0.7]).double()}},
        "multi_modal_uuids": {"video": ["a|1.4"]},
        "prompt_is_token_ids": [True, False],
        "more": [whole[:1], whole[:1].clone(), None],
    }
    tensors = {}
    text = dump_requests([request], tensors)
    assert len(tensors) == 3  # equal content is one tensor
    message, arrived = unpack_message(pack_message({"requests": text}, tensors))
    assert arrived.keys() == tensors.keys()
    (found,) = load_requests(message["requests"], arrived)
    assert dump_requests([found], {}) == text
    video = found["multi_modal_data"]["video"]
    assert torch.equal(video["video_embeds"], whole[1:3])
    assert video["second_per_grid_ts"].dtype == torch.float64
    with pytest.raises(ValueError, match="no safetensors with a message"):
        unpack_message(b"\x80\x04pickle")


def test_features_that_others_were_appended_to_cross_once():
    video = torch.arange(2 * PIECE_ROWS + 5.0)[:, None]
    sent = {}
    dump_requests([{"video_embeds": video}], sent)
    assert sorted(len(piece) for piece in sent.values()) == [5, PIECE_ROWS, PIECE_ROWS]
    brought = len(sent)
    longer = torch.cat([video, torch.ones(3, 1)])
    text = dump_requests([{"video_embeds": longer}], sent)
    assert len(sent) == brought + 1  # the last piece, which is another one now
    (found,) = load_requests(text, sent, width=1)
    assert torch.equal(found["video_embeds"], longer)
    joined = {}
    one, other = (load_requests(text, sent, 1, joined)[0]["video_embeds"] for _ in range(2))
    assert one is other


def test_features_are_hashed_once_however_often_they_are_asked_about(monkeypatch):
    hashed = []

    def name(tensor):
        hashed.append(tensor)
        return content_name(tensor)

    monkeypatch.setattr(server_protocol, "content_name", name)
    video = torch.arange(PIECE_ROWS + 5.0)[:, None]
    first = dump_requests([{"video_embeds": video}], {})
    sent = {}
    assert dump_requests([{"video_embeds": video}, {"video_embeds": video}], sent)[1:-1].startswith(first[1:-1])
    assert len(hashed) == len(sent) == 2, "its pieces"
    video[0] = 7  # written to, it is another one
    assert dump_requests([{"video_embeds": video}], sent) != first
    assert len(hashed) == 4
    with torch.inference_mode():
        inferred = video + 0
    assert dump_requests([{"video_embeds": inferred}], sent) == dump_requests([{"video_embeds": video}], sent)


def test_pieces_of_different_tensors_are_refused():
    sent = {}
    dump_requests([{"embeds": torch.ones(2, 3), "more": torch.ones(2, 4)}], sent)
    text = json.dumps([{"embeds": {"tensor:": list(sent)}}])
    with pytest.raises(ValueError, match="no JSON with the tensors"):
        load_requests(text, sent)
