"""A directory to a repository of the Hugging Face hub, with the hub's own client and its own login."""

from __future__ import annotations

import re
from pathlib import Path

from keel.types import Fault, UserFault

HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
"""user/name of a repository."""


class PushRefusedError(UserFault):
    """The hub cannot be reached as things are set, or the repository's name is none; nothing was sent."""


class PushFailedError(Fault):
    """The upload did not go through; what was written stays where it is."""


def check_pushable(repository: str, base: str) -> None:
    """Raise PushRefusedError, before anything is written, if a push to `repository` cannot work.

    `base` is the model an adapter names, if an adapter is pushed: it must be one that others can load too. No token is
    read beyond asking whether there is one.
    """
    import huggingface_hub
    from huggingface_hub import constants

    if not HUB_ID.fullmatch(repository):
        raise PushRefusedError(f"--push: got {repository!r}; give a repository of the hub: user/name")
    if base and (Path(base).is_absolute() or Path(base).is_dir()):
        raise PushRefusedError(
            "--push: the adapter's base is a directory of this machine, which nobody else has; push with --merged"
        )
    if constants.HF_HUB_OFFLINE:
        raise PushRefusedError(
            "--push: HF_HUB_OFFLINE is set, so nothing can be sent; unset it, or export without --push"
        )
    if huggingface_hub.get_token() is None:
        raise PushRefusedError("--push: not logged in to the hub; `hf auth login` does that, once per machine")


def push_directory(path: Path, repository: str) -> str:
    """Upload `path` to `repository`, made private if it is new; returns its address.

    Raises PushFailedError with the hub's own words.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        address = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=address.repo_id, folder_path=path, commit_message="Export of a run of Keel")
    except Exception as error:  # its own errors, its HTTP library's, the system's: all end the same way
        raise PushFailedError(
            f"--push: {type(error).__name__}: {error}; the export lies whole at {path}: "
            f"`hf upload {repository} {path}` sends it again"
        ) from error
    return str(address)
