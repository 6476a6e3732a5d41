"""What a recipe needs to know about a pair: sizes, templates, whether one can judge the other's tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fopd_cli.engines.models import hf, support
from fopd_cli.engines.text.vocabularies import listed, match
from fopd_cli.errors import UserError
from fopd_cli.inputs import check_model_name


@dataclass(frozen=True)
class Model:
    """One checkpoint, without its weights."""

    name: str
    config: Any
    tokenizer: Any
    parameters: int

    @property
    def chats(self) -> bool:
        """Whether its tokenizer has a chat template."""
        return bool(getattr(self.tokenizer, "chat_template", None))

    @property
    def packs(self) -> bool:
        """Whether samples can share a row, as far as the architecture tells."""
        return support.packing_refusal(self.config) is None

    def __str__(self) -> str:
        return f"{self.name} ({self.config.model_type}, {readable(self.parameters)} parameters)"


def look(name: str, option: str) -> Model:
    """Raises `UserError` if the model does not exist or cannot be distilled."""
    check_model_name(name, option)
    config = hf.load_config(name, option)
    support.check_architecture(config, option)
    count = sum(math.prod(tensor.shape) for tensor in hf.empty_model(config).parameters())
    return Model(name, config, hf.load_tokenizer(name, option), count)


def check_pair(student: Model, teacher: Model) -> list[str]:
    """Notes about the pair. Raises `UserError` if the teacher cannot read the student's tokens."""
    vocab = min(hf.vocab_size(m.config) for m in (student, teacher))
    found = match(student.tokenizer, teacher.tokenizer, vocab)
    if found.different:
        raise UserError(
            f"--student, --teacher: different tokenizers: {len(found.different)} of {found.shared} shared "
            f"ids differ, first {found.different[0]}; choose a pair of one model family"
        )
    notes = []
    if found.renamed:
        notes.append(f"the two name these special tokens differently: {listed(found.renamed)}")
    if teacher.parameters <= student.parameters:
        notes.append("the teacher is not larger than the student: are the two exchanged?")
    return notes


def nearby(folder: Path) -> list[str]:
    """Model directories in a folder and one level below, the smallest first."""
    found = [p.parent for pattern in ("*/config.json", "*/*/config.json") for p in folder.glob(pattern)]
    weights = {p: sum(f.stat().st_size for f in p.glob("*.safetensors")) for p in found}
    return [str(p.relative_to(folder)) for p in sorted(found, key=lambda p: weights[p]) if weights[p]]


def readable(count: float) -> str:
    """1.5e9 -> 1.5B."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.0f}"
