import weakref

import numpy as np
import torch

from longrl.engines.vllm_extension import read_shards, write_shards
from longrl.engines.weight_stream import engine_weights
from tests.tiny import text_family


def test_weights_come_out_of_files_as_they_went_in(tmp_path):
    family = text_family()
    model = family.build()
    wanted = dict(engine_weights(family, model))
    write_shards(engine_weights(family, model), tmp_path, max_bytes=1 << 14)
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    torch.testing.assert_close(dict(read_shards(tmp_path)), wanted, rtol=0, atol=0)


def test_two_names_of_one_weight_both_arrive(tmp_path):
    weight = torch.randn(3, 2)
    write_shards([("embed", weight), ("head", weight), ("part", weight[1:])], tmp_path, max_bytes=1 << 20)
    found = dict(read_shards(tmp_path))
    assert torch.equal(found["embed"], weight)
    assert torch.equal(found["head"], weight)
    assert torch.equal(found["part"], weight[1:])


def test_a_written_shard_is_let_go_before_the_next_is_filled(tmp_path):
    made = []
    alive = []

    def weights():
        for index in range(6):
            alive.append(sum(ref() is not None for ref in made))
            values = np.full(64, index, np.float32)  # 256 bytes, which tensors share
            made.append(weakref.ref(values))
            weight = torch.from_numpy(values)
            del values
            yield f"w{index}", weight
            del weight

    write_shards(weights(), tmp_path, max_bytes=512)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    assert max(alive) == 2  # the shard before this weight, full
