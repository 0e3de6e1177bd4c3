"""What a Hugging Face hub refuses, in one line: which option, which name, why, and what helps."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

FAMILY = "model.family.init_args.model"
"""The option that a family's own weights, config and tokenizer come from."""
DATA = "the data source"
"""What reads a source says of it; whoever knows of which split it is names that."""
LOCAL = "give a local folder"


class HubError(ValueError):
    """A hub gives nothing for the value of an option.

    Args:
        option: of the command line, as `data.val`.
        source: its value, a hub id.
        problem: what is wrong and what helps.
    """

    def __init__(self, option: str, source: str, problem: str) -> None:
        value = f"data source {source}" if option == DATA else f"{option}={source}"
        super().__init__(f"{value}: {problem}")
        self.option = option
        self.source = source
        self.problem = problem


@contextlib.contextmanager
def hub_errors(source: str | Path, option: str = FAMILY, remedy: str = LOCAL) -> Iterator[None]:
    """Has what a hub refuses in the block be one line.

    Args:
        source: hub id, or a folder, about which no hub is asked.
        option: that it is the value of.
        remedy: what to give in its place.

    Raises:
        HubError: in the place of errors of hub libraries; other errors are as they were.
    """
    try:
        yield
    except Exception as error:  # transformers, datasets and diffusers wrap it in their own kinds
        problem = None if Path(source).expanduser().is_dir() else hub_problem(error, remedy)
        if problem is None:
            raise
        raise HubError(option, str(source), problem) from error


@contextlib.contextmanager
def naming_option(option: str, instead_of: str = FAMILY) -> Iterator[None]:
    """Has a `HubError` of the block that names one option name another: a teacher's family is not the policy's."""
    try:
        yield
    except HubError as error:
        if error.option != instead_of:
            raise
        raise HubError(option, error.source, error.problem) from error.__cause__


def hub_problem(error: BaseException, remedy: str = LOCAL) -> str | None:
    """Why a hub gave nothing, and what helps; None of an error that is not a hub's."""
    from httpx import TransportError
    from huggingface_hub import is_offline_mode
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    chain = list(_chain(error))
    names = {type(one).__name__ for one in chain}

    def is_among(*kinds: type[BaseException]) -> bool:
        return any(isinstance(one, kinds) for one in chain)

    if is_among(GatedRepoError):
        return (
            "it is gated: accept its terms on its page of the hub, then set HF_TOKEN or run `hf auth login`; or "
            f"{remedy}"
        )
    if is_among(RepositoryNotFoundError) or "DatasetNotFoundError" in names:
        return (
            "the hub has nothing of this name, or it is private: check the name; for a private one set HF_TOKEN or run "
            f"`hf auth login`; or {remedy}"
        )
    is_unreachable = is_among(LocalEntryNotFoundError, ConnectionError, TransportError)
    if is_among(OfflineModeIsEnabled) or (is_offline_mode() and is_unreachable):
        return (
            f"it is not in the cache ({_cache()}), and HF_HUB_OFFLINE is set: unset it, set HF_HOME to a cache that "
            f"has it, or {remedy}"
        )
    if is_unreachable:
        return (
            f"the hub cannot be reached, and it is not in the cache ({_cache()}): check network and proxy, set HF_HOME "
            f"to a cache that has it, or {remedy}"
        )
    if is_among(HFValidationError):
        return f"it is neither a folder nor a hub id, which is owner/name: check the name, or {remedy}"
    if is_among(EntryNotFoundError, RevisionNotFoundError):
        return f"the hub has it, but not what is needed of it ({_said(error)}); check the name, or {remedy}"
    refusal = next((one for one in chain if isinstance(one, HfHubHTTPError)), None)
    if refusal is not None:
        is_denied = getattr(refusal.response, "status_code", None) in (401, 403)
        helps = "check HF_TOKEN, or run `hf auth login`" if is_denied else "try again later"
        return f"the hub refuses it ({_said(refusal)}); {helps}, or {remedy}"
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that it came of."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _cache() -> str:
    home = os.environ.get("HF_HOME")
    return f"HF_HOME={home}" if home else "~/.cache/huggingface"


def _said(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200].rstrip(".") if lines else type(error).__name__
