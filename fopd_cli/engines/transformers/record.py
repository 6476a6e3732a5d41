"""The reference engine: PyTorch and transformers, anywhere."""

from fopd_cli.engines.record import Engine, SamplerFacts, TeacherFacts

JOINS = 1 / 8
RECORD = Engine(
    "transformers",
    sampler=SamplerFacts(draws=True, joins=JOINS),
    teacher=TeacherFacts(
        frozenset({"hidden", "topk", "sampled"}), asked_tokens=True, our_forward=True, generates=0
    ),
)
