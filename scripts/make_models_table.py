#!/usr/bin/env python
"""Write docs/models.md: the verdict on every architecture of tests/architectures.py, found by running it
(three minutes on an idle core).

python scripts/make_models_table.py [ARCHITECTURE ...]      the named rows again, by default all of them
"""

from __future__ import annotations

import importlib.util
import re
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs" / "models.md"
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

if TYPE_CHECKING:
    from matrix import Verdict

ABOUT = """\
# Models

Every architecture here was made tiny and random, and went through sampler, teacher, learner and publication.
Log-probs, hidden states, loss and gradients are those of plain transformers on one sequence at a time
(log-probs to 1e-5, gradients to 1e-4, fp32, CPU). Windows, chunks and rope switches were so small that
samples pass them, and rows ended at different times.

Where the table says *refused*, `fopd doctor` and `fopd run` say so in one line, before workers start. The
table is made by `scripts/make_models_table.py` and checked by `tests/engines/test_architectures.py`.

- **distils**: as student and as teacher, on transformers. A vision-language model is distilled as text; its
  vision tower does not change.
- **packing**: whether samples may lie end to end in one row; if not, set `learner.packing` and
  `teacher.packing` to false.
- **LoRA**: `student.lora` with the default targets; merged weights are published.
- **decoding**: how `sampler.engine: transformers` decodes. *batched*: prompts of any lengths together. *one
  length*: the model keeps a state from token to token, which padding would spoil, so prompts of one length go
  together. *no cache*: every token runs over the whole sequence. The last two are right, but slow; use vLLM
  where it knows the model.
- **vLLM**: whether vLLM 0.32 knows the architecture by this name. Its CPU build cannot run all of them; when
  it refuses one, the error quotes the cause from its log.

Rotary embeddings that depend on a sequence's length (longrope: Phi-3-128k, Phi-4-mini; dynamic NTK) are
computed for each sequence by its own length, as transformers does for a single sequence. A response that
grows past the switch is sampled with the short factors before it and the long ones after it, and trained with
the long ones. That difference counts as drift, and doctor warns about it. vLLM chooses longrope's factors
once, by the longest sample of the run; where it samples, the learner and transformers teachers do the same.
vLLM's dynamic NTK is another formula; doctor refuses it.

What an architecture does after its output head (soft caps, scales, biases, under any name) is applied on both
sides, as its own code does it. The tiny models have caps and scales that are large enough to matter.

Soft caps in attention (Gemma 2) run with the architecture's own attention, because PyTorch's leaves them out;
so does what has sinks.

| architecture | distils | packing | LoRA | decoding | vLLM |
|---|---|---|---|---|---|
"""


def row(name: str, found: Verdict) -> str:
    """A line of the table."""
    if found.refused:
        cells = [f"refused: {found.refused}", "", "", ""]
    else:
        cells = [
            "right",
            found.packing and f"no: {found.packing}",
            found.lora and f"refused: {found.lora}",
            found.decoding,
        ]
        cells = [cells[0], cells[1] or "yes", cells[2] or "yes", cells[3]]
    return (
        f"| {name} | {' | '.join(cell.replace('|', '/') for cell in cells)} | "
        f"{'yes' if in_vllm(name) else 'no'} |"
    )


def in_vllm(name: str) -> bool:
    """Whether vLLM's list of architectures names this one's class. Read as text, since importing vLLM changes
    a process.
    """
    import architectures

    from fopd_cli.engines.models import hf

    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("vLLM is not installed, and its column cannot be made")
    listed = Path(spec.submodule_search_locations[0], "model_executor", "models", "registry.py").read_text()
    architecture = hf.model_class(architectures.ARCHITECTURES[name]())
    return (
        architecture is not None and re.search(rf'^    "{architecture.__name__}":', listed, re.M) is not None
    )


def rows() -> dict[str, str]:
    """The table's lines, by architecture."""
    lines = TABLE.read_text().splitlines() if TABLE.is_file() else []
    found = [line for line in lines if line.startswith("| ") and not line.startswith("| architecture")]
    return {line.split(" | ")[0].removeprefix("| "): line for line in found}


def main(names: list[str]) -> int:
    import architectures
    import matrix

    found, wrong = rows() if names else {}, 0
    for name in names or architectures.ARCHITECTURES:
        with tempfile.TemporaryDirectory() as folder:
            try:
                found[name] = row(name, matrix.verdict(name, Path(folder)))
                print(found[name], flush=True)
            except AssertionError as error:
                wrong += 1
                print(f"{name} is WRONG and gets no row: {error}", file=sys.stderr, flush=True)
    TABLE.write_text(
        ABOUT + "".join(found[name] + "\n" for name in architectures.ARCHITECTURES if name in found)
    )
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
