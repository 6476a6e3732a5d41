"""`fopd chat`: the student and its teacher answer the same lines, and each student token shows how far apart
the two are there.

Both run on transformers, in this process. Each continues its conversation with its own answers. The KL
compares both models on the student's answer, exactly over the vocabulary, as in training at loss.temperature
1.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fopd_cli.engines.models import hf
from fopd_cli.engines.protocols import Sampler
from fopd_cli.engines.registry import engine_of
from fopd_cli.engines.text.pieces import pieces
from fopd_cli.engines.text.templates import Frame
from fopd_cli.engines.text.vocabularies import exchanged, inverse, match
from fopd_cli.engines.transformers.sampler import TransformersSampler
from fopd_cli.errors import UserError
from fopd_cli.inputs import check_model_name
from fopd_cli.recipe import Recipe, Teacher
from fopd_cli.runtime.build import resolve_dtype, student_frame
from fopd_cli.samples import Prompt, Request, SamplingParams

POSITIONS = 256  # compared at a time
Message = dict[str, Any]


@dataclass
class Speaker:
    """A model that answers, and its conversation so far. Callers use the student's ids; `table` maps them to
    its own.
    """

    name: str
    model: Any
    sampler: Sampler
    frame: Frame
    decoder: Any  # the student's tokenizer
    context: int | None
    device: torch.device
    table: np.ndarray | None = None
    heard: list[Message] = field(default_factory=list)

    def asked(self, line: str, chat: bool) -> np.ndarray:
        """The token ids of the prompt that ends with this line."""
        if not chat:
            return self.frame.prompt(Prompt(0, text=line))
        return self.frame.prompt(Prompt(0, messages=[*self.heard, {"role": "user", "content": line}]))

    def answer(self, ids: np.ndarray, seed: int, params: SamplingParams) -> np.ndarray:
        """The sampled ids, EOS included."""
        self.sampler.submit([Request(0, self._own(ids), seed, params)])
        while self.sampler.busy:
            for rollout in self.sampler.step():
                found = rollout.response_ids
                return found if self.table is None else exchanged(found, inverse(self.table))
        raise RuntimeError(f"{self.name} gave no answer")

    def remember(self, line: str, ids: np.ndarray) -> None:
        said = hf.decode(self.decoder, ids)
        self.heard += [{"role": "user", "content": line}, {"role": "assistant", "content": said}]

    @torch.inference_mode()
    def logits(self, ids: np.ndarray, prompt_length: int, vocab: int) -> Tensor:
        """float32 `(n, vocab)` on the CPU, in the student's numbering: the logits that predict each token
        after the prompt.
        """
        asked = torch.from_numpy(self._own(ids).astype(np.int64))[None].to(self.device)
        found = self.model(input_ids=asked, use_cache=False).logits[0, prompt_length - 1 : -1].float().cpu()
        if self.table is not None:
            found = found[:, torch.from_numpy(self.table).long()]
        return found[:, :vocab]

    def _own(self, ids: np.ndarray) -> np.ndarray:
        return ids if self.table is None else exchanged(ids, self.table)


@dataclass(frozen=True)
class Turn:
    """Both answers to one line. `pieces`: the student's tokens as text, each with its KL in nats (nan without
    a local teacher).
    """

    pieces: list[tuple[str, float]]
    kl: float | None  # mean over tokens
    teacher: str | None
    notice: str | None = None


class Chat:
    """`model` is the student's directory, `teacher` one of the recipe's teachers."""

    def __init__(
        self,
        recipe: Recipe,
        model: str,
        teacher: Teacher,
        chat: bool | None,
        max_new_tokens: int | None,
        temperature: float | None,
    ) -> None:
        devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())] or [torch.device("cpu")]
        self.tokenizer = hf.load_tokenizer(model, "MODEL")
        self.chat = has_template(recipe, self.tokenizer) if chat is None else chat
        frame = student_frame(recipe, self.tokenizer)
        config = hf.load_config(model, "MODEL")
        self.vocab, self.system = hf.vocab_size(config), getattr(recipe.task, "system", None)
        self.student = _speaker(
            "student", model, "MODEL", recipe.sampler.dtype, frame, self.tokenizer, devices[0]
        )
        self.teacher: Speaker | None = None
        if not engine_of(teacher).remote:
            self.teacher = self._load_teacher(teacher, frame, devices[-1])
        self.params = SamplingParams(
            recipe.sampler.temperature if temperature is None else temperature,
            recipe.sampler.top_p,
            max_new_tokens or recipe.sampler.max_new_tokens,
        )
        self.seed = recipe.seed
        self.forget()

    def _load_teacher(self, section: Teacher, frame: Frame, device: torch.device) -> Speaker:
        check_model_name(section.model, "teacher.model")
        theirs, config = (
            hf.load_tokenizer(section.model, "teacher.model"),
            hf.load_config(section.model, "teacher.model"),
        )
        self.vocab = min(self.vocab, hf.vocab_size(config))
        found = match(self.tokenizer, theirs, self.vocab)
        if found.different:
            raise UserError(
                "student and teacher have different tokenizers; fopd doctor says where they differ"
            )
        if section.template == "teacher":
            back = None if found.table is None else inverse(found.table)
            frame = replace(frame, tokenizer=theirs, whose="teacher", to_student=back)
        speaker = _speaker(
            section.name, section.model, "teacher.model", section.dtype, frame, self.tokenizer, device
        )
        speaker.table = found.table
        return speaker

    def forget(self) -> None:
        """Begin a new conversation."""
        for speaker in filter(None, (self.student, self.teacher)):
            speaker.heard = [{"role": "system", "content": self.system}] if self.system else []

    def turn(self, line: str) -> Turn:
        """Both answer. Raises `UserError` for a line that is too long by itself."""
        notice = None
        if not self._fits(line):
            self.forget()
            notice = "the conversation no longer fits the context; it starts over"
            if not self._fits(line):
                raise UserError(
                    "that line is too long: with its answer it does not fit the context; lower "
                    "--max-new-tokens, or say less"
                )
        self.seed += 1
        asked = self.student.asked(line, self.chat)
        said = self.student.answer(asked, self.seed, self.params)
        kls, theirs = np.full(len(said), np.nan), None
        if self.teacher is not None:
            kls = self._apart(np.concatenate([asked, said]), len(asked))
            answer = self.teacher.answer(self.teacher.asked(line, self.chat), self.seed, self.params)
            self.teacher.remember(line, answer)
            theirs = hf.decode(self.tokenizer, answer)
        self.student.remember(line, said)
        mean = None if self.teacher is None else float(kls.mean())
        shown = [(text, float(kls[a:b].sum())) for text, a, b in pieces(self.tokenizer, said)]
        return Turn(shown, mean, theirs, notice)

    def _fits(self, line: str) -> bool:
        return all(
            s.context is None or len(s.asked(line, self.chat)) + self.params.max_new_tokens <= s.context
            for s in (self.student, self.teacher)
            if s is not None
        )

    def _apart(self, ids: np.ndarray, prompt_length: int) -> np.ndarray:
        """KL(student || teacher) in nats at each token after the prompt, over the ids that both have."""
        assert self.teacher is not None
        ours, theirs = (s.logits(ids, prompt_length, self.vocab) for s in (self.student, self.teacher))
        found = []
        for a, b in zip(ours.split(POSITIONS), theirs.split(POSITIONS), strict=True):
            p, q = torch.log_softmax(a, -1), torch.log_softmax(b, -1)
            found.append((p.exp() * (p - q)).sum(-1).clamp(min=0))
        return torch.cat(found).numpy()


def _speaker(
    name: str, model: str, key: str, dtype: str, frame: Frame, decoder: Any, device: torch.device
) -> Speaker:
    config, tokenizer = hf.load_config(model, key), hf.load_tokenizer(model, key)
    loaded = hf.load_model(model, key, resolve_dtype(dtype, device.type == "cuda"))
    sampler = TransformersSampler(loaded, hf.token_rules(model, tokenizer, config, key), device, 1)
    context = getattr(hf.text_config(config), "max_position_embeddings", None)
    return Speaker(name, sampler.model, sampler, frame, decoder, context, device)


def has_template(recipe: Recipe, tokenizer: Any) -> bool:
    """Whether the run's own prompts went through the chat template, as far as the recipe tells."""
    chat = getattr(recipe.task, "chat", recipe.task.name != "arithmetic")
    return chat is not False and bool(getattr(tokenizer, "chat_template", None))


SHADES = (
    (0.05, None),
    (0.3, "48;5;229;30"),
    (1.0, "48;5;215;30"),
    (float("inf"), "48;5;203;30"),
)  # nats, ANSI


def coloured(found: Iterable[tuple[str, float]]) -> str:
    """For a terminal: the background shows how far apart the two are."""
    parts = []
    for text, kl in found:
        shade = next((shade for limit, shade in SHADES if not kl >= limit), None)
        parts.append(text if shade is None else f"\x1b[{shade}m{text}\x1b[0m")
    return "".join(parts)


def numbered(found: Iterable[tuple[str, float]]) -> str:
    """Without colors: each token followed by its KL, on one line."""
    return "".join(text.replace("\n", "⏎") + ("" if kl != kl else f"[{kl:.2f}]") for text, kl in found)


def converse(chat: Chat, lines: Iterable[str], colours: bool) -> Iterator[str]:
    """The text to print for each input line. `/new` forgets the conversation, `/quit` ends it."""
    for raw in lines:
        line = raw.strip()
        if line == "/quit":
            return
        if line == "/new":
            chat.forget()
            yield "(a new conversation)"
        elif line:
            try:
                yield shown(chat.turn(line), chat, colours)
            except UserError as error:
                yield f"({error})"


def shown(turn: Turn, chat: Chat, colours: bool) -> str:
    notice = [f"({turn.notice})"] if turn.notice else []
    text = coloured(turn.pieces) if colours else numbered(turn.pieces)
    far = "" if turn.kl is None else f", {turn.kl:.3f} nats per token from the teacher"
    said = [f"student{far}:", f"  {text}"]
    if turn.teacher is not None and chat.teacher is not None:
        said += [f"{chat.teacher.name}:", f"  {turn.teacher}"]
    return "\n".join([*notice, *said])


def typed() -> Iterator[str]:
    """Lines of standard input, with a prompt in a terminal."""
    while True:
        try:
            yield input("> ") if sys.stdin.isatty() else input()
        except EOFError:
            return


def has_colours() -> bool:
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ
