import os
import stat

import pytest

from longrl.commands import serve
from longrl.engines import server_key
from longrl.engines.server_client import ServerClient
from tests.tiny import text_family


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in (server_key.KEY_VARIABLE, "VLLM_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def test_a_server_without_a_key_makes_one_that_its_user_alone_can_read():
    with server_key.server_key(8123) as key:
        path = server_key.key_file(8123)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert server_key.client_key("http://127.0.0.1:8123") == key
        assert server_key.client_key("http://localhost:8124") is None  # no server there
        assert server_key.client_key("http://elsewhere:8123") is None  # it is not told to strangers
        assert ServerClient("http://127.0.0.1:8123", 1, 0)._headers()["Authorization"] == f"Bearer {key}"
    assert len(key) == 64
    assert not path.exists()


def test_the_file_of_a_server_that_took_the_port_over_stays():
    with server_key.server_key(8123) as first:
        pass
    with server_key.server_key(8123):
        server_key.key_file(8123).write_text("the next one's")
    assert server_key.key_file(8123).read_text() == "the next one's"
    assert first != "the next one's"


def test_a_key_of_the_environment_is_written_nowhere(monkeypatch):
    monkeypatch.setenv("LONGRL_SERVER_KEY", "a-key-of-the-test\n")
    with server_key.server_key(8123) as key:
        assert key == "a-key-of-the-test" == server_key.client_key("http://elsewhere:8123")
        assert not server_key.key_file(8123).exists()
    monkeypatch.setenv("LONGRL_SERVER_KEY", "line\nbreak")
    with pytest.raises(ValueError, match="LONGRL_SERVER_KEY must be of printable ASCII"):
        server_key.environment_key()


def test_a_key_that_others_can_read_is_refused():
    with server_key.server_key(8123):
        os.chmod(server_key.key_file(8123), 0o644)
        with pytest.raises(ValueError, match="can be read by others; start the server again"):
            server_key.client_key("http://127.0.0.1:8123")


def test_a_key_that_cannot_be_written_is_an_error_that_names_the_variable(tmp_path):
    (tmp_path / ".cache").write_text("no folder")
    with pytest.raises(ValueError, match=r"cannot be written to .*set LONGRL_SERVER_KEY"), server_key.server_key(8123):
        pass


def test_a_server_for_others_must_have_a_good_key(monkeypatch):
    options = serve.ServerOptions(host="0.0.0.0")
    with pytest.raises(ValueError, match=r"--host=0\.0\.0\.0 opens the server.*there is no key; set LONGRL_SERVER_KEY"):
        serve.run(text_family(), options)
    monkeypatch.setenv("LONGRL_SERVER_KEY", "short")
    with pytest.raises(ValueError, match="a key of 5 characters"):
        serve.check_access(options)
    monkeypatch.setenv("LONGRL_SERVER_KEY", "a-key-of-the-test")
    serve.check_access(options)


@pytest.mark.parametrize("name", ["host", "port", "api_key"])
def test_the_key_cannot_be_got_round_by_options_of_vllm(name):
    with pytest.raises(ValueError, match=f"--options has '{name}'") as raised:
        serve.check_access(serve.ServerOptions(options={name: ["canary"]}))
    assert "canary" not in str(raised.value)
