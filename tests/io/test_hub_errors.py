"""What a hub refuses is one line that names the option, the reason and the remedy."""

import builtins

import httpx
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from longrl.commands.failures import find_mistake
from longrl.datamodules.rows import sources
from longrl.io.hub_errors import DATA, FAMILY, HubError, hub_errors, naming_option

BUSY = httpx.Response(503, request=httpx.Request("GET", "https://hub.invalid/x"))
ANSWER = httpx.Response(403, request=httpx.Request("GET", "https://hub.invalid/x"))


def wrapped(kind, *args, **options):
    """As transformers gives it on: another error that came of the hub's."""
    try:
        raise kind(*args, **options)
    except Exception as error:
        return OSError(f"page of advice about {error}").with_traceback(error.__traceback__), error


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        (GatedRepoError, {"response": ANSWER}, "it is gated: accept its terms"),
        (RepositoryNotFoundError, {"response": ANSWER}, "the hub has nothing of this name, or it is private"),
        (LocalEntryNotFoundError, {}, "the hub cannot be reached, and it is not in the cache"),
        (builtins.ConnectionError, {}, "the hub cannot be reached, and it is not in the cache"),
        (OfflineModeIsEnabled, {}, "HF_HUB_OFFLINE is set: unset it, set HF_HOME to a cache"),
        (EntryNotFoundError, {}, "the hub has it, but not what is needed of it (page of advice"),
        (HfHubHTTPError, {"response": ANSWER}, "the hub refuses it (no); check HF_TOKEN"),
        (HfHubHTTPError, {"response": BUSY}, "the hub refuses it (no); try again later"),
        (httpx.ReadError, {}, "the hub cannot be reached, and it is not in the cache"),
        (HFValidationError, {}, "it is neither a folder nor a hub id"),
    ],
)
def test_each_refusal_says_why_and_what_helps(monkeypatch, kind, options, said):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    error, cause = wrapped(kind, "no", **options)
    with pytest.raises(HubError) as caught, hub_errors("owner/name"):
        raise error from cause
    text = str(caught.value)
    assert text.startswith(f"{FAMILY}=owner/name: ")
    assert said in text
    assert text.endswith("or give a local folder")
    assert find_mistake(caught.value) is caught.value


def test_other_errors_and_those_of_folders_stay(tmp_path):
    with pytest.raises(OSError, match="disk"), hub_errors("owner/name"):
        raise OSError("disk full")
    with pytest.raises(LocalEntryNotFoundError), hub_errors(tmp_path):
        raise LocalEntryNotFoundError("no")


def test_whoever_knows_the_option_names_it():
    with pytest.raises(HubError, match=r"^model.teacher.x=a/b: "), naming_option("model.teacher.x"), hub_errors("a/b"):
        raise LocalEntryNotFoundError("no")
    with pytest.raises(HubError, match=r"^data.val=a/b"), naming_option("z"), hub_errors("a/b", "data.val"):
        raise LocalEntryNotFoundError("no")


def test_a_data_set_of_the_hub_names_its_split_and_files_instead(monkeypatch):
    import datasets

    def refuse(*args, **options):
        raise ConnectionError("no")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    said = r"^data.val=owner/name:test: .*or give a local .json, "
    with pytest.raises(HubError, match=said), naming_option("data.val", DATA):
        sources.read_records("owner/name:test")


def test_a_family_whose_weights_are_on_no_hub_names_its_option(monkeypatch):
    from transformers import AutoConfig

    from longrl.models.text import LlamaFamily

    def refuse(*args, **options):
        raise LocalEntryNotFoundError("no")

    monkeypatch.setattr(AutoConfig, "from_pretrained", refuse)
    with pytest.raises(HubError, match="^model.family.init_args.model=owner-of/x: "):
        _ = LlamaFamily("owner-of/x").config
