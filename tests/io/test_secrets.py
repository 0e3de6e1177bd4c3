import pytest

from longrl.chat.endpoint import Endpoint
from longrl.engines.server_client import ServerClient
from longrl.io.secrets import MASK, mask_secrets

CANARY = "sk-canary-0123456789"


@pytest.mark.parametrize(
    "name", ["OPENAI_API_KEY", "WANDB_API_KEY", "HF_TOKEN", "LONGRL_SERVER_KEY", "DB_PASSWORD", "MY_SECRET", "APIKEY"]
)
def test_keys_of_the_environment_are_masked_wherever_they_stand(monkeypatch, name):
    monkeypatch.setenv(name, CANARY)
    found = mask_secrets({"a": [f"Bearer {CANARY}", 1, None], f"x{CANARY}": CANARY})
    assert found == {"a": [f"Bearer {MASK}", 1, None], f"x{MASK}": MASK}


def test_words_and_other_variables_stay(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "false")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "sometimes")
    monkeypatch.setenv("MONKEYS", "elephants")
    assert mask_secrets("false sometimes elephants") == "false sometimes elephants"
    assert mask_secrets("said outright", "outright") == f"said {MASK}"


@pytest.mark.parametrize(
    "options",
    [
        {"url": f"http://user:{CANARY}@host/v1"},
        {"key_variable": CANARY},
        {"extra": {"api_key": CANARY}},
        {"extra": {"Authorization": CANARY}},
    ],
)
def test_an_endpoint_with_a_key_in_its_options_is_refused_and_the_key_not_said(options):
    with pytest.raises(ValueError, match=r"must not hold a password|it is not the key|must hold no key") as raised:
        Endpoint("m", **options)
    assert CANARY not in str(raised.value)


def test_a_url_of_a_server_with_a_password_is_refused_and_not_said():
    with pytest.raises(ValueError, match="urls of VLLMServerEngine must not hold a password") as raised:
        ServerClient(f"http://user:{CANARY}@host:8000", 1, 0)
    assert CANARY not in str(raised.value)
