from longrl.engines.weight_files import new_folder


def test_what_a_dead_run_left_goes(tmp_path):
    import socket

    dead = tmp_path / f"longrl-weights-{socket.gethostname()}-999999999-x_y"
    dead.mkdir()
    first = new_folder(tmp_path)
    second = new_folder(tmp_path)
    assert not dead.exists()
    assert first.is_dir()
    assert second.is_dir()
    assert first != second
