import pytest
import torch

from longrl.engines.server_protocol import dump_requests, load_requests, pack_message, unpack_message


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
