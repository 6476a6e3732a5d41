"""Uploads a model directory to the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import httpx
from huggingface_hub import HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)

from fopd_cli.errors import UserError

T = TypeVar("T")
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN to a token that may write"


def check(name: str) -> None:
    """Check that the user is logged in, before an export takes its time. Raises `UserError`."""
    if name.count("/") != 1:
        raise UserError(f"--push: {name!r} is not a name on the hub; write owner/name")
    _ask(lambda: HfApi().whoami(), name)


def push(folder: Path, name: str, private: bool, leave_out: Sequence[str]) -> str:
    """Upload a directory as the model `name`, created if it does not exist; returns its address."""

    def upload() -> str:
        api = HfApi()
        address = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=name,
            folder_path=folder,
            ignore_patterns=list(leave_out),
            commit_message="Student trained with fopd",
        )
        return str(address)

    return _ask(upload, name, f"; the export is complete in {folder}")


def _ask(call: Callable[[], T], name: str, done: str = "") -> T:
    """`done` ends the error if the hub cannot be reached."""
    try:
        return call()
    except LocalTokenNotFoundError:
        raise UserError(f"--push {name}: not logged in to the hub; {LOG_IN}") from None
    except OfflineModeIsEnabled:
        raise UserError(f"--push {name}: HF_HUB_OFFLINE is set; unset it to upload") from None
    except HfHubHTTPError as error:
        hint = (
            f"; {LOG_IN}" if error.response is not None and error.response.status_code in (401, 403) else ""
        )
        raise UserError(f"--push {name}: the hub refuses: {str(error).splitlines()[0]}{hint}") from None
    except HFValidationError as error:
        raise UserError(f"--push {name}: {error}") from None
    except (OSError, httpx.HTTPError) as error:
        raise UserError(f"--push {name}: the hub cannot be reached: {error}{done}") from None
