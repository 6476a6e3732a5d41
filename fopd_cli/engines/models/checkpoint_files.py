"""What a model's files contain, and how it fits the model, without reading the weights.

transformers gives weights that a file lacks random values and says so only in its log. So every load is
checked (`LoadReport`), and `fopd doctor` and `fopd run` check the files' headers before anything else is
done.
"""

from __future__ import annotations

import contextlib
import functools
import json
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from fopd_cli.errors import UserError

SHOWN = 3  # names in a message
POINTER = b"version https://git-lfs"  # what a clone without LFS leaves in a file's place
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}

Read = Callable[[str, tuple[slice, ...]], Tensor]  # name, and what of the tensor


@dataclass(frozen=True)
class CheckpointFiles:
    """Name of each tensor -> the file that holds it. If there are several kinds of files, the kind that
    transformers takes.
    """

    where: Mapping[str, Path]

    @classmethod
    def of(cls, folder: Path) -> CheckpointFiles | None:
        """None if there are none. Raises `ValueError` if they cannot be read or are incomplete."""
        for single, index in (
            ("model.safetensors", "model.safetensors.index.json"),
            ("pytorch_model.bin", "pytorch_model.bin.index.json"),
        ):
            if (folder / single).is_file():
                return cls._of_files([folder / single])
            if (folder / index).is_file():
                return cls._of_files(_indexed(folder / index))
        return None

    @classmethod
    def _of_files(cls, paths: list[Path]) -> CheckpointFiles:
        where: dict[str, Path] = {}
        twice: dict[str, Path] = {}
        for path in paths:
            for name in _names(path):
                (twice if name in where else where)[name] = path
        found = cls(where)
        for name, path in twice.items():
            if not torch.equal(found.tensor(name), cls({name: path}).tensor(name)):
                raise ValueError(f"{where[name].name} and {path.name} both hold {name}, and differ")
        return found

    def empty(self) -> dict[str, Tensor]:
        """All tensors on the meta device: names, shapes and dtypes."""
        found: dict[str, Tensor] = {}
        for path in dict.fromkeys(self.where.values()):
            if path.suffix == ".bin":
                found |= torch.load(path, map_location="meta", weights_only=True)
                continue
            with safe_open(str(path), "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (safe_open is no mapping)
                    part = tensors.get_slice(name)
                    dtype = DTYPES.get(part.get_dtype(), torch.uint8)
                    found[name] = torch.empty(part.get_shape(), dtype=dtype, device="meta")
        return found

    def tensor(self, name: str) -> Tensor:
        """Read one of them."""
        path = self.where[name]
        if path.suffix == ".bin":
            found: Tensor = torch.load(path, map_location="cpu", weights_only=True, mmap=True)[name]
            return found
        with safe_open(str(path), "pt") as tensors:
            return tensors.get_tensor(name)

    @contextlib.contextmanager
    def reading(self) -> Iterator[Read]:
        """A function that reads a part of a tensor, and no more; each file is opened once."""
        with contextlib.ExitStack() as stack:

            @functools.cache
            def opened(path: Path) -> Any:
                return stack.enter_context(safe_open(str(path), "pt"))

            def read(name: str, at: tuple[slice, ...]) -> Tensor:
                path = self.where[name]
                if path.suffix == ".bin" or not at:
                    return self.tensor(name)[at]
                found: Tensor = opened(path).get_slice(name)[at]
                return found

            yield read

    def differ(self, names: Iterable[str]) -> bool:
        """Whether the tensors of these names, as far as they exist, are not all the same."""
        first, *others = [self.tensor(name) for name in names if name in self.where] or [torch.empty(0)]
        return any(not torch.equal(first, other) for other in others)


@dataclass
class LoadReport:
    """How a checkpoint fits its model."""

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)  # name, shape in the file, shape in the model
    # two names that the configuration ties, with different values
    untied: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, info: Mapping[str, Any], untied: Mapping[str, str]) -> LoadReport:
        """From transformers' loading info, and from the tied names (other -> first) whose values differ."""
        mismatched = [
            f"{name} {list(file)} instead of {list(model)}" for name, file, model in info["mismatched_keys"]
        ]
        pairs = [f"{other} and {first}" for other, first in untied.items()]
        return cls(
            sorted(info["missing_keys"]), sorted(info["unexpected_keys"]), sorted(mismatched), sorted(pairs)
        )

    def errors(self, where: str) -> list[tuple[str, str]]:
        """(what is wrong, what to do about it); each begins with `where`, which says which model it is."""
        found = []
        if self.missing:
            found.append(
                (
                    f"{where} lacks {_some(self.missing, 'weight')}, which would be random numbers",
                    "get the whole checkpoint, or the config.json that belongs to it",
                )
            )
        if self.mismatched:
            found.append(
                (
                    (
                        f"{where} has {_some(self.mismatched, 'weight')} of another shape than its "
                        "configuration says"
                    ),
                    "get the config.json that belongs to the checkpoint",
                )
            )
        if self.untied:
            found.append(
                (
                    f"{where} says that its input and output embeddings are one (tie_word_embeddings), but "
                    f"its file holds two that differ: {', '.join(self.untied)}",
                    (
                        "set tie_word_embeddings: false in its config.json, or delete the one that is not "
                        "meant from the file"
                    ),
                )
            )
        return found

    def warnings(self, where: str) -> list[tuple[str, str]]:
        """Likewise, for the user to judge."""
        if not self.unexpected:
            return []
        what = f"{where} holds {_some(self.unexpected, 'weight')} that its architecture does not have"
        return [(what, "they are not used; make sure that its config.json is the right one")]

    def refuse(self, where: str) -> None:
        """Raise `UserError` for the errors."""
        if found := self.errors(where):
            raise UserError("; ".join(f"{what}; {cure}" for what, cure in found))


def unconvertible(error: BaseException) -> list[str]:
    """Weights that transformers could not assemble (from single experts, say): it names them only in its
    log.
    """
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if found := getattr(frame.f_locals.get("loading_info"), "conversion_errors", None):
            return sorted(found)
    return []


def _some(names: list[str], what: str) -> str:
    """A few of them and how many there are."""
    shown = ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
    return f"{len(names)} {what}{'s' if len(names) > 1 else ''} ({shown})"


def _names(path: Path) -> list[str]:
    with path.open("rb") as file:
        if file.read(len(POINTER)) == POINTER:
            raise ValueError(f"{path.name} is a pointer of Git LFS instead of the file; run git lfs pull")
    try:
        if path.suffix == ".bin":
            return list(torch.load(path, map_location="meta", weights_only=True))
        with safe_open(str(path), "pt") as tensors:
            return list(tensors.keys())
    except Exception as error:  # whatever the two libraries raise on a broken file
        what = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{path.name} is not whole, or something else than its name says ({what[:200]})"
        ) from None


def _indexed(index: Path) -> list[Path]:
    """The files that an index names."""
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index.name} is no index of weights ({type(error).__name__}: {error})") from None
    missing = [name for name in names if not (index.parent / str(name)).is_file()]
    if missing or not names:
        raise ValueError(
            f"{index.name} names {_some(missing, 'file')} that are not there"
            if names
            else f"{index.name} names no file"
        )
    return [index.parent / name for name in names]
