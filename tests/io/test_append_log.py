import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor

from hypothesis import given, strategies as st

from longrl.io.append_log import AppendLog


def test_what_was_appended_is_read_by_another_process(tmp_path):
    log = AppendLog(tmp_path)
    log.append("a", {"n": 1, "text": "\u4f60\u597d \udce9"})
    log.append(None, {"failed": "b"})
    again = AppendLog(tmp_path).open()
    assert again["a"]["n"] == log["a"]["n"] == 1
    assert "b" not in again
    assert [entry["key"] for entry in AppendLog(tmp_path).read()] == ["a", None]


def test_the_first_record_of_a_key_counts_and_writers_have_files_of_their_own(tmp_path):
    first, second = AppendLog(tmp_path), AppendLog(tmp_path)
    first.append("a", {"n": 1})
    second.append("a", {"n": 2})
    first.append("a", {"n": 3})
    assert first["a"]["n"] == 1
    assert len(list(tmp_path.iterdir())) == 2


@given(cut=st.integers(0, 200), count=st.integers(1, 4))
def test_a_file_that_ends_anywhere_gives_its_whole_lines(tmp_path_factory, cut, count):
    folder = tmp_path_factory.mktemp("log")
    log = AppendLog(folder)
    for n in range(count):
        log.append(str(n), {"text": "x\ny"})
    log.close()
    (path,) = folder.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[: max(0, len(whole) - cut)])
    found = AppendLog(folder)
    kept = [entry["key"] for entry in found.read()]
    lines = path.read_bytes().splitlines(keepends=True)
    assert kept == [json.loads(line)["key"] for line in lines if line.endswith(b"\n")]
    found.append("new", {})
    assert "new" in AppendLog(folder).open()


def test_threads_may_write_together(tmp_path):
    log = AppendLog(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: log.append(str(n), {"text": "x" * n}), range(100)))
    again = AppendLog(tmp_path).open()
    assert [len(again[str(n)]["text"]) for n in range(100)] == list(range(100))
    assert [len(log[str(n)]["text"]) for n in range(100)] == list(range(100))


def test_what_append_returned_from_survives_kill_9(tmp_path):
    child = os.fork()
    if child == 0:
        log = AppendLog(tmp_path)
        log.append("a", {"text": "x" * 100_000})
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert len(AppendLog(tmp_path).open()["a"]["text"]) == 100_000


def test_lines_of_others_are_not_read(tmp_path):
    log = AppendLog(tmp_path)
    log.append("a", {"n": 1})
    (path,) = tmp_path.iterdir()
    with path.open("ab") as file:
        for line in (b'{"key": ' * 50_000, b'{"key": [1], "n": 2}', b'{"n": 3}', b"[1]", b"\xff\xfe{}"):
            file.write(line + b"\n")
    found = AppendLog(tmp_path)
    assert [entry["n"] for entry in found.read()] == [1]
    assert found.num_torn == 5
