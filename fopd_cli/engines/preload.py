"""Imports everything that engines have imported once they have loaded a model; see `runtime/crew/warm.py`."""

from importlib import import_module

from fopd_cli.engines.models.library import library

library()
for _name in (
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "transformers.generation.utils",
    "transformers.modeling_utils",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.tokenization_utils_tokenizers",
    "transformers.integrations.accelerate",
    "fopd_cli.engines.learner.learner",
    "fopd_cli.engines.transformers.sampler",
    "fopd_cli.engines.transformers.teacher",
):
    import_module(_name)
