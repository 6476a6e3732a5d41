"""transformers, without what it would import on the side."""

from __future__ import annotations

import functools
import sys
from typing import Any


@functools.cache
def library() -> Any:
    """The package, quiet. It takes seconds to import, so only where a model or tokenizer is loaded."""
    _leave_out_extras()
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def _leave_out_extras() -> None:
    """Have transformers find that scikit-learn and scipy are not installed.

    It would import them, and pandas with them, for assisted decoding and for finding objects in pictures.
    Nothing here does that, and it is a fifth of a worker's imports. It asks once and remembers; everything
    else can import them as ever.
    """
    modules: dict[str, Any] = sys.modules
    absent = [package for package in ("sklearn", "scipy") if package not in modules]
    modules |= dict.fromkeys(absent)  # None is how Python is told that there is no such package
    try:
        from transformers.utils import is_scipy_available, is_sklearn_available

        is_scipy_available()
        is_sklearn_available()
    finally:
        for package in absent:
            del modules[package]
