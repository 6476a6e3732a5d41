"""Attention through float32 against PyTorch's own in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from fopd_cli.engines.transformers import cpu_attention


class Layer(nn.Module):
    num_key_value_groups = 3


def tensors(rows: int, queries: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    shapes = ((rows, 6, queries, 32), (rows, 2, keys, 32), (rows, 2, keys, 32))
    q, k, v = (torch.randn(shape).to(torch.bfloat16) for shape in shapes)
    return q, k, v


def expected(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float | None) -> Tensor:
    k, v = (x.double().repeat_interleave(3, 1) for x in (k, v))
    return scaled_dot_product_attention(q.double(), k, v, attn_mask=mask, scale=scaling).transpose(1, 2)


@pytest.mark.parametrize(("queries", "keys"), [(1, 40), (1, 300), (40, 40), (12, 40), (300, 300)])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_it_is_attention(queries: int, keys: int, scaling: float | None) -> None:
    """Queries are the last of the keys; one row begins with padding."""
    q, k, v = tensors(2, queries, keys)
    mask = torch.ones(2, 1, queries, keys, dtype=torch.bool).tril(keys - queries)
    mask[1, :, :, : keys - queries] &= torch.arange(keys - queries) > 3
    right = expected(q, k, v, mask, scaling)
    for given in (mask, torch.zeros(mask.shape, dtype=q.dtype).masked_fill(~mask, -torch.inf)):
        found, _ = cpu_attention.attention(Layer(), q, k, v, given, scaling=scaling)
        assert found.dtype == torch.bfloat16
        # Rounded once at the end: half a unit in the last of 8 bits. PyTorch's kernel for long rows rounds in
        # between.
        torch.testing.assert_close(
            found.double(), right, rtol=2**-8 if keys <= 256 or queries == 1 else 2**-6, atol=1e-2
        )


def test_gradients_are_those_of_attention() -> None:
    q, k, v = (x.requires_grad_(True) for x in tensors(1, 20, 20))
    found, _ = cpu_attention.attention(Layer(), q, k, v, None, is_causal=True)
    weights = torch.randn(found.shape)
    ours = torch.autograd.grad((found.float() * weights).sum(), (q, k, v))
    mask = torch.ones(20, 20, dtype=torch.bool).tril()
    theirs = torch.autograd.grad((expected(q, k, v, mask, None) * weights).sum(), (q, k, v))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=2e-2, atol=2e-2)
