"""Writes a trained student: through transformers if that can save it, without it otherwise.

transformers is strict when it saves and lenient when it loads: a `generation_config.json` with a temperature
and `do_sample: false`, or a `config.json` with a temperature in it, loads with a warning and cannot be saved.
That shows only at the last step, and must not cost a finished training run. What the student's own directory
says about generation is therefore copied unchanged, and anything else that transformers refuses is written
without it.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from fopd_cli.engines.models import hf
from fopd_cli.errors import UserError

GENERATION = "generation_config.json"
TOKENIZER_SUFFIXES = (".json", ".jinja", ".model", ".txt", ".tiktoken")
NOT_TOKENIZERS = ("config.json", GENERATION, "fopd.json", "adapter_config.json")


def write_model(model: Any, source: str, out: Path) -> None:
    """Weights in the model's dtypes and its configuration, in the existing directory `out`; `source` is the
    model that it was made from.

    Raises OSError or SafetensorError if the disk does not take it, `UserError` if what was written does not
    load.
    """
    generation = hf.model_file(source, GENERATION)
    if generation is not None and hasattr(model, "generation_config"):
        model.generation_config = type(model.generation_config)()
    try:
        model.save_pretrained(out)
        if generation is not None:
            shutil.copyfile(generation, out / GENERATION)
        _check(out)
    except OSError:
        raise
    except Exception as error:  # ValueError, huggingface_hub's validation errors, ...: any bad configuration
        _warn("model", error)
        _write_plainly(model, source, out)
        _check(out)


def write_tokenizer(source: str, out: Path) -> None:
    """Likewise the tokenizer."""
    try:
        hf.load_tokenizer(source, "student.model").save_pretrained(out)
    except OSError:
        raise
    except Exception as error:
        _warn("tokenizer", error)
        folder = hf.local_folder(source, "student.model")
        for path in folder.iterdir():
            of_weights = path.name in NOT_TOKENIZERS or path.name.endswith(".index.json")
            if path.suffix in TOKENIZER_SUFFIXES and not of_weights:
                shutil.copyfile(path, out / path.name)


def _write_plainly(model: Any, source: str, out: Path) -> None:
    """Every distinct tensor under its own name, and the student's own configuration."""
    for stale in (*out.glob("*.safetensors"), *out.glob("*.index.json")):
        stale.unlink()
    tensors, seen = {}, set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor.detach().contiguous()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    own = hf.model_file(source, "config.json")
    assert own is not None
    config = json.loads(own.read_text())
    config.pop("torch_dtype", None)
    config["dtype"] = str(model.dtype).removeprefix("torch.")
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if (generation := hf.model_file(source, GENERATION)) is not None:
        shutil.copyfile(generation, out / GENERATION)


def _check(out: Path) -> None:
    """Raise `UserError` unless what was written is a complete model."""
    report = hf.load_report(str(out), hf.load_config(str(out), "the student"), "the student")
    if report is None:
        raise UserError(f"the student: there are no weights in {out}")
    report.refuse(f"the student: {str(out)!r}")


def _warn(what: str, error: Exception) -> None:
    line = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    print(
        f"warning: transformers does not save this {what} ({line}); its files are written without it",
        file=sys.stderr,
        flush=True,
    )
