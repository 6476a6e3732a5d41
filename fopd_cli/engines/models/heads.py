"""What an architecture does to its logits, found from its own code rather than from names in its
configuration.

Whether a soft cap is called `final_logit_softcapping`, `logits_soft_cap` or `output_logit_soft_cap`, whether
`logits_scaling` divides (granite) or multiplies, whether the scale comes before the head (minicpm3) or after
it (cohere): a model's `forward` knows. It is run with its backbone and its output head replaced, so that only
the code between and after them is left. That code is given numbers, and for every one it must return what
`losses.head.Head` computes, or the architecture is refused. No weights are needed: a model on the meta device
will do.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fopd_cli.losses.head import Head, soft_cap

TOLERANCE = 1e-5  # relative; a cap's or a scale's effect of one in a thousand is a hundred times that
ONE = 1e-6  # a scale this close to 1 is 1, in a model that goes through float32
SMALL, LARGE = 1e-6, 1e30  # where a cap has no effect, and where it is the only effect
SPREADS = (0.1, 1.0, 10.0, 100.0)  # of the numbers tried, one row each


@dataclass(frozen=True)
class HeadRule:
    """What is done besides the product with the unembedding, see `losses.head.Head`."""

    scale: float
    cap: float | None

    def head(self, lm: Any) -> Head:
        """The model's head as it is now, sharing its parameters."""
        output = lm.get_output_embeddings()
        return Head(output.weight, output.bias, self.scale, self.cap)


class UnknownHead(ValueError):
    """What comes between hidden states and logits, as the end of a sentence that begins with the model's
    name.
    """


@torch.no_grad()
def find_rule(lm: Any, backbone: nn.Module) -> HeadRule:
    """The rule of a causal language model in float32 whose hidden states come from `backbone`. Raises
    `UnknownHead` if anything else comes between these and the logits.
    """
    output = lm.get_output_embeddings()
    if type(output) is not nn.Linear:
        raise UnknownHead(
            f"has an output head ({type(output).__name__}) that is no linear layer, which fopd does not "
            "support"
        )
    try:
        hidden, entered, given, logits = _run_either(lm, backbone, output)
        before = float(entered[0, 0] / hidden[0, 0])
        after = float(logits[1, 0] / given[1, 0])
    except Exception as error:  # whatever an architecture's code raises on inputs that it does not expect
        what = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UnknownHead(
            f"does not let fopd find out what it does between hidden states and logits ({what})"
        ) from None
    largest = abs(float(logits[2, 0]))
    cap = largest if largest < 0.5 * abs(after) * LARGE else None
    if not (_close(entered, before * hidden) and _close(logits, soft_cap(after * given, cap))):
        raise UnknownHead(
            "does something between hidden states and logits that fopd does not know (it knows scales, soft "
            "caps and a bias of the output head)"
        )
    if output.bias is not None and abs(before - 1) > ONE:
        raise UnknownHead(
            "scales its hidden states before an output head with a bias, which fopd does not know"
        )
    scale = before * after
    return HeadRule(1.0 if abs(scale - 1) < ONE else scale, cap)


def _run_either(lm: Any, backbone: nn.Module, output: nn.Linear) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`_run`; if the code around the backbone needs real inputs (images' places), then without it."""
    try:
        return _run(lm, backbone, output)
    except Exception as error:
        if lm.base_model in (lm, backbone):
            raise
        try:
            return _run(lm, lm.base_model, output)
        except Exception:
            raise error from None


def _run(lm: Any, backbone: nn.Module, output: nn.Linear) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The hidden states `(n, hidden)` that the backbone returns, what then enters the head, the product `(n,
    V)` that the head returns, and the logits made from it, `(n, V)`, or fewer if padding is cut off.
    """
    generator = torch.Generator().manual_seed(0)
    vocab, width = output.weight.shape
    spread = torch.tensor(SPREADS, dtype=torch.float64)[:, None]
    hidden = spread * torch.randn(len(SPREADS), width, generator=generator, dtype=torch.float64)
    given = spread * torch.randn(len(SPREADS), vocab, generator=generator, dtype=torch.float64)
    given[:3, 0] = torch.tensor([0.0, SMALL, LARGE], dtype=torch.float64)
    entered: list[Tensor] = []

    def head(x: Tensor) -> Tensor:
        entered.append(x.double().reshape(-1, x.shape[-1]))
        return given[None].clone()

    ids = torch.zeros(1, len(SPREADS), dtype=torch.int64, device=output.weight.device)
    with _replaced(backbone, lambda *_, **__: _Output(hidden[None].clone())), _replaced(output, head):
        logits = lm(input_ids=ids, use_cache=False).logits[0].double()
    if len(entered) != 1:
        raise ValueError("its output head is not called once")
    return hidden, entered[0], given[:, : logits.shape[-1]], logits


class _Output:
    """What a backbone returns, with only hidden states in it."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getattr__(self, _: str) -> None:
        return None

    def __getitem__(self, place: int) -> Tensor | None:
        return self.last_hidden_state if place == 0 else None


@contextmanager
def _replaced(module: nn.Module, forward: Any) -> Iterator[None]:
    """Temporarily replace the module's forward."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


def _close(found: Tensor, expected: Tensor) -> bool:
    return found.shape == expected.shape and bool(
        torch.isclose(found, expected, rtol=TOLERANCE, atol=0.0).all()
    )
