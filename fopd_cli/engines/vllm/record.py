"""vLLM, inside our worker processes."""

from fopd_cli.engines.record import Engine, SamplerFacts, TeacherFacts

RECORD = Engine(
    "vllm",
    sampler=SamplerFacts(adapters=True, one_rotation=True),
    teacher=TeacherFacts(frozenset({"topk", "sampled"}), by_name=frozenset({"hidden"})),
    claims=True,
    cuda=True,
    split="tensor_parallel",
)
