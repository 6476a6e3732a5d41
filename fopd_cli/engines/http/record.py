"""A server that fopd does not run."""

from fopd_cli.engines.record import Engine, TeacherFacts

RECORD = Engine(
    "http",
    teacher=TeacherFacts(frozenset({"topk", "sampled"})),
    remote=True,
    required=(("url", "the server's address, for example http://localhost:8000/v1"),),
)
