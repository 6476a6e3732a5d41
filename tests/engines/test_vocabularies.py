"""Tokenizers that differ only in special tokens: they are paired, and the teacher's side swaps its ids."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY

from fopd_cli.engines.models import hf
from fopd_cli.engines.renumbered_teacher import RenumberedTeacher, renumbered_head
from fopd_cli.engines.text.vocabularies import inverse, listed, match
from fopd_cli.engines.transformers.teacher import TransformersTeacher
from fopd_cli.losses.head import Head
from fopd_cli.samples import Context, Rollout, TargetSpec, TeacherTargets

CPU, VOCAB = torch.device("cpu"), 260


class Names:
    """The part of a tokenizer that is used: the names of its ids, and which are special."""

    def __init__(self, *tokens: str) -> None:
        self.tokens = tokens
        self.all_special_ids = [i for i, t in enumerate(tokens) if t.startswith("<")]
        self.added_tokens_decoder: dict[int, Any] = {}

    def get_vocab(self) -> dict[str, int]:
        return {token: i for i, token in enumerate(self.tokens)}


@pytest.mark.parametrize(
    ("teacher", "table", "renamed"),
    [
        ("a b <x> <y> <z>", None, 0),
        ("a b <x> <new> <z>", None, 1),
        ("a b <new> <newer> <z>", None, 2),
        ("a b <y> <x> <z>", [0, 1, 3, 2, 4], 2),
        ("a b <y> <z> <x>", [0, 1, 4, 2, 3], 3),
        ("a b <y> <new> <z>", [0, 1, 3, 2, 4], 2),  # <x> is renamed, <y> is elsewhere
    ],
)
def test_special_tokens_are_paired_by_name_and_then_by_id(
    teacher: str, table: list[int] | None, renamed: int
) -> None:
    found = match(Names("a", "b", "<x>", "<y>", "<z>"), Names(*teacher.split()), 5)
    assert found.different == []
    assert len(found.renamed) == renamed
    assert (
        (found.table is None)
        if table is None
        else (found.table is not None and found.table.tolist() == table)
    )


@pytest.mark.parametrize(
    "teacher", ["b a <x> <y> <z>", "a <b> <x> <y> <z>", "a b x <y> <z>", "a <x> b <y> <z>"]
)
def test_what_stands_for_text_cannot_be_paired(teacher: str) -> None:
    found = match(Names("a", "b", "<x>", "<y>", "<z>"), Names(*teacher.split()), 5)
    assert found.different
    assert found.table is None


def test_ids_that_only_one_knows_are_counted() -> None:
    found = match(Names("a", "b"), Names("a", "b", "<x>", "<y>"), 3)
    assert (found.shared, found.beyond, found.different) == (2, 1, [])
    assert listed([str(i) for i in range(10)]) == "0, 1, 2, 3, 4, 5, 6, 7 and 2 more"


def permuted(table: np.ndarray) -> Any:
    """The tiny teacher with other token ids: rows of both embeddings are moved."""
    model: Any = hf.load_model(str(TINY / "teacher"), "m", torch.float32)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    with torch.no_grad():
        for part in [model.get_input_embeddings()] + ([] if tied else [model.get_output_embeddings()]):
            part.weight[:VOCAB] = part.weight[torch.from_numpy(inverse(table)).long()]
    return model


@pytest.mark.parametrize(
    ("kind", "width", "student_k"), [("hidden", 128, 0), ("topk", 5, 0), ("topk", 5, 2), ("sampled", 1, 0)]
)
@pytest.mark.parametrize("own_context", [False, True])
def test_a_renumbered_teacher_says_what_it_said_before(
    kind: Any, width: int, student_k: int, own_context: bool
) -> None:
    table = np.arange(VOCAB, dtype=np.int32)
    table[[1, 2, 3, 40]] = [3, 40, 1, 2]
    rng = np.random.default_rng(0)
    ids = rng.integers(0, VOCAB, 24).astype(np.int32)
    ids[10:16] = [1, 2, 3, 40, 1, 2]
    order = torch.randn(16, VOCAB, generator=torch.Generator().manual_seed(0)).argsort(-1).int().numpy()
    rollout = Rollout(
        0,
        ids,
        8,
        np.ones(16, bool),
        np.full(16, -1, np.float32),
        [(0, 0, 16)],
        "stop",
        topk_logprobs=np.tile(-np.arange(6, dtype=np.float32), (16, 1)),
        topk_ids=order[:, :6],
    )
    if own_context:
        told = rng.integers(0, VOCAB, 11).astype(np.int32)
        rollout.context = Context(np.concatenate([told, ids[8:]]), np.arange(11, 27))
    spec = TargetSpec(kind, width, torch.float32)
    results, heads = [], []
    for model, mapped in (
        (hf.load_model(str(TINY / "teacher"), "m", torch.float32), False),
        (permuted(table), True),
    ):
        teacher: Any = TransformersTeacher(model, CPU, 1, 4096, VOCAB, 64, packing=False, student_k=student_k)
        teacher = RenumberedTeacher(teacher, table) if mapped else teacher
        target = TeacherTargets(kind, **{n: torch.zeros(s, dtype=d) for n, d, s in spec.fields(16)})  # type: ignore[arg-type]
        teacher.score([rollout], [target])
        results.append(target)
        heads.append(teacher.head())
    plain, renumbered = results
    for name, _, _ in spec.fields(16):
        torch.testing.assert_close(getattr(renumbered, name), getattr(plain, name), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(heads[1].weight, heads[0].weight)
    own = torch.from_numpy(inverse(table)).long()
    theirs = Head(permuted(table).get_output_embeddings().weight[:VOCAB], torch.arange(VOCAB)[own])
    again = renumbered_head(theirs, table)
    torch.testing.assert_close(again.weight, heads[0].weight)
    torch.testing.assert_close(again.bias, torch.arange(VOCAB))
