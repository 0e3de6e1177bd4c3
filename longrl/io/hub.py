"""Exported folders on a Hugging Face hub: `python -m longrl export ... --push_to owner/name`."""

from __future__ import annotations

import re
from pathlib import Path

REPO = re.compile(r"[\w.-]+/[\w.-]+")


def check_target(repo: str) -> None:
    """Check that a push to `repo` can begin, made before anything else is done and without a request.

    Raises:
        ValueError: the name is no `owner/name`, the hub is switched off, or there is no token.
    """
    from huggingface_hub import get_token, is_offline_mode

    if not REPO.fullmatch(repo):
        raise ValueError(f"--push_to must be owner/name, got {repo!r}; the owner is your hub account or organisation")
    if is_offline_mode():
        raise ValueError(f"--push_to={repo} needs the hub, but HF_HUB_OFFLINE is set; unset it, or leave --push_to out")
    if get_token() is None:
        raise ValueError(
            f"--push_to={repo} needs a hub token that may write; set HF_TOKEN, run `hf auth login`, or leave "
            "--push_to out"
        )


def push(folder: str | Path, repo: str, private: bool) -> str:
    """Uploads a folder as one commit to a model repository, which is made if missing.

    Args:
        folder: what to upload.
        repo: `owner/name`.
        private: whether only its owner can see the repository; one that is there must be so already.

    Returns:
        The commit's URL.

    Raises:
        ValueError: the repository is there and is not as private as asked.
        RuntimeError: the hub refuses or cannot be reached; the folder stays.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        if api.model_info(repo).private != private:
            state = "public" if private else "private"
            raise ValueError(f"{repo} exists and is {state}; give --private {str(not private).lower()} or another name")
        return api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Export by longrl").commit_url
    except (HfHubHTTPError, OSError) as error:
        raise RuntimeError(
            f"{folder} is written, but was not pushed to {repo}: {error}; push it with `hf upload {repo} {folder}`"
        ) from error
