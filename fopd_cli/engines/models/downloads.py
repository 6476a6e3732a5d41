"""Downloads hub models before any process needs them: once, with a progress bar and a size.

Otherwise workers would download their missing models in parallel, silently, in the time that they have to
start.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from fopd_cli.engines.models.checkpoint_files import CheckpointFiles
from fopd_cli.errors import UserError

SAFE = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
PICKLED = ["*.json", "*.bin", "*.model", "*.txt", "*.jinja"]


def obtain(model: str, key: str, say: Callable[[str], None]) -> bool:
    """Get all files of a model; returns whether any had to be downloaded.

    Raises a one-line `UserError`, prefixed with `key`, if the hub cannot be reached or has no such model, or
    if the disk is too small.
    """
    if Path(model).is_dir() or _whole(model):
        return False
    from huggingface_hub import constants, snapshot_download

    try:
        patterns = SAFE
        files = snapshot_download(model, allow_patterns=patterns, dry_run=True)
        if not any(file.filename.endswith(".safetensors") for file in files):
            patterns = PICKLED
            files = snapshot_download(model, allow_patterns=patterns, dry_run=True)
        size = sum(file.file_size or 0 for file in files if file.will_download)
        _room_for(size, Path(constants.HF_HUB_CACHE), model, key)
        say(f"downloading {model}: {size / 1e9:.2f} GB to {constants.HF_HUB_CACHE}")
        snapshot_download(model, allow_patterns=patterns)
    except UserError:
        raise
    except Exception as error:  # network, hub and disk errors each have their own classes
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{key}: {model!r} is not (all) on this machine and cannot be downloaded: {first[:200]}; "
            f"where there is a network: hf download {model}; or give a model directory"
        ) from None
    if not _whole(model):
        raise UserError(f"{key}: {model!r} has no weights on the hub that can be read; choose another model")
    return True


def _whole(model: str) -> bool:
    """Whether the cache holds all of a model's weights."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(model, allow_patterns=SAFE, local_files_only=True))
        return CheckpointFiles.of(folder) is not None
    except Exception:  # missing or incomplete
        return False


def _room_for(size: int, cache: Path, model: str, key: str) -> None:
    folder = cache
    while not folder.exists():
        folder = folder.parent
    if size > (free := shutil.disk_usage(folder).free):
        raise UserError(
            f"{key}: {model!r} takes {size / 1e9:.1f} GB, {folder} has {free / 1e9:.1f} GB free; free "
            "some, or set HF_HOME to a larger disk"
        )
