"""The reference engine: PyTorch and transformers, anywhere."""

from fopd_cli.engines.record import Engine, SamplerFacts, TeacherFacts

RECORD = Engine(
    "transformers",
    sampler=SamplerFacts(draws=True),
    teacher=TeacherFacts(
        frozenset({"hidden", "topk", "sampled"}), asked_tokens=True, our_forward=True, generates=0
    ),
)
