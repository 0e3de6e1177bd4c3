import pytest
import torch


def test_the_server_keeps_tensors_up_to_its_memory():
    pytest.importorskip("fastapi")
    from longrl.engines.server_routes import TensorStore

    store, kib = TensorStore(2048), torch.zeros(256)
    assert store.find(["a", "b"], {"a": kib}) == ({"a": kib}, ["b"])
    store.find(["b"], {"b": kib})
    store.find(["a"], {})
    found, missing = store.find(["c"], {"c": kib})
    assert (list(found), missing) == (["c"], [])
    assert store.find(["a", "c"], {})[1] == []
    assert store.find(["b"], {})[1] == ["b"]  # used longest ago
    found, _ = store.find(["d", "e", "f"], dict.fromkeys("def", kib))
    assert list(found) == ["d", "e", "f"]  # of one request all, whatever their size
