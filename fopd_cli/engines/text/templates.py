"""Chat templates: from prompts and observations to token ids, and back to readable text.

Everything that a run renders is rendered here, with the run's own `task.chat_template_kwargs`.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fopd_cli.engines.text.vocabularies import exchanged, special_ids
from fopd_cli.errors import UserError
from fopd_cli.samples import Prompt

SAID = "\u2063said\u2063"  # invisible separators: no template contains them
SHOWN_CHARS = 3000


@dataclass(frozen=True)
class Frame:
    """How prompts become token ids for one reader. Ids are always in the student's numbering."""

    tokenizer: Any
    variables: dict[str, Any] = field(default_factory=dict)  # of the chat template
    whose: str = "student"
    system: str | None = None  # the recipe's own system message, so that an error can name its key
    to_student: np.ndarray | None = None  # id of this tokenizer -> the student's; None: they are the same

    def prompt(self, prompt: Prompt) -> np.ndarray:
        """int32 token ids: through the chat template if it holds messages, as plain text otherwise."""
        if prompt.messages is None:
            ids = self.tokenizer(prompt.text)["input_ids"]
        elif not getattr(self.tokenizer, "chat_template", None):
            raise UserError(
                f"task.chat: the {self.whose}'s tokenizer has no chat template; set task.chat: false to send "
                "plain text, or use an instruct model"
            )
        else:
            ids = self._rendered(prompt, prompt.messages)
        found = np.asarray(ids, dtype=np.int32)
        return found if self.to_student is None else exchanged(found, self.to_student)

    def _rendered(self, prompt: Prompt, messages: list[dict[str, Any]]) -> Any:
        def render(shown: list[dict[str, Any]]) -> Any:
            return self.tokenizer.apply_chat_template(
                shown,
                tools=prompt.tools or None,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,
                **self.variables,
            )

        try:
            return render(messages)
        except Exception as error:  # the template's own, jinja's, or any Python error in it
            index, said = _refused(render, messages), _first_line(error)
        role = messages[index]["role"]
        ours = role == "system" and self.system is not None and messages[index]["content"] == self.system
        key = "task.system" if ours else "task.question" if prompt.place else "task"
        cure = (
            "set it to null and put the text into task.template"
            if ours
            else "use roles that it knows, or another model"
        )
        raise UserError(
            f"{key}: {prompt.where}: the {self.whose}'s chat template refuses message {index + 1}, of "
            f"role {role!r} ({said}); {cure}"
        )


def _refused(render: Any, messages: list[dict[str, Any]]) -> int:
    """The index of the first message that the template cannot render."""
    for count in range(1, len(messages)):
        try:
            render(messages[:count])
        except Exception:
            return count - 1
    return len(messages) - 1


def encode_prompt(tokenizer: Any, prompt: Prompt, variables: dict[str, Any] | None = None) -> np.ndarray:
    """Token ids of a prompt as the student sees it."""
    return Frame(tokenizer, variables or {}).prompt(prompt)


def encode_observation(
    tokenizer: Any,
    text: str | Sequence[str],
    role: str,
    chat: bool,
    ended: int | None = None,
    variables: dict[str, Any] | None = None,
) -> np.ndarray:
    """Token ids of what comes between two assistant turns: observations in the chat template's frame.

    Made from a placeholder conversation, so that nothing sampled is rendered again. Each text is a message of
    its own. The template's end of turn is left out if it is the token sampled there: `ended`, by default the
    tokenizer's EOS. Special tokens spelled out in a text are treated as plain text.
    """
    texts = [text] if isinstance(text, str) else list(text)
    if not chat:
        return np.asarray([i for t in texts for i in _plain_ids(tokenizer, t)], dtype=np.int32)
    first, *rest = _around(tokenizer, role, len(texts), variables or {})
    ids = _without_end(tokenizer, _ids(tokenizer, first), tokenizer.eos_token_id if ended is None else ended)
    for seen, after in zip(texts, rest, strict=True):
        ids += [*_plain_ids(tokenizer, seen), *_ids(tokenizer, after)]
    return np.asarray(ids, dtype=np.int32)


def end_of_turn(tokenizer: Any, variables: dict[str, Any]) -> int | None:
    """The first non-blank token that the chat template puts after the assistant's words, which should end
    them. None if unknown.

    Some templates, such as GLM's, have no token of their own for that; theirs is the one that opens the next
    message.
    """
    try:
        ids = _ids(tokenizer, _around(tokenizer, "user", 1, variables)[0])
    except UserError:
        return None
    return next((i for i in ids if tokenizer.decode([i]).strip()), None)


def _around(tokenizer: Any, role: str, count: int, variables: dict[str, Any]) -> list[str]:
    """The template's text after the assistant's words, between `count` messages of a role, and after them."""
    seen = [f"\u2063seen{i}\u2063" for i in range(count)]
    talk = [{"role": "user", "content": "?"}, {"role": "assistant", "content": SAID}]
    talk += [{"role": role, "content": word} for word in seen]
    try:
        whole = str(
            tokenizer.apply_chat_template(talk, add_generation_prompt=True, tokenize=False, **variables)
        )
    except Exception as error:
        raise UserError(
            f"task: the student's chat template refuses a message of role {role!r} after the assistant's "
            f"({_first_line(error)}); set task.notation: code, or use a model whose template knows that role"
        ) from None
    left, parts = whole.partition(SAID)[2], []
    for word in seen:
        before, found, left = left.partition(word)
        if not found:
            raise UserError(f"task: the student's chat template does not show messages of role {role!r}")
        parts.append(before)
    return [*parts, left]


def _without_end(tokenizer: Any, ids: list[int], ended: int | None) -> list[int]:
    """A template may put whitespace before the end of turn; anything else belongs to the next message."""
    if ended in ids:
        at = ids.index(ended)
        if not tokenizer.decode(ids[:at]).strip():
            return ids[at + 1 :]
    return ids


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _plain_ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])


def check_variables(variables: Iterable[str], tokenizers: Sequence[Any]) -> None:
    """Raise `UserError` for a variable that no template reads; Jinja would silently ignore it."""
    templates = [str(getattr(t, "chat_template", None) or "") for t in tokenizers]
    for name in variables:
        for tokenizer in tokenizers:
            if name == "messages" or name in inspect.signature(tokenizer.apply_chat_template).parameters:
                raise UserError(
                    f"task.chat_template_kwargs: {name!r} is not for recipes to set; leave it out"
                )
        if not any(re.search(rf"\b{re.escape(name)}\b", template) for template in templates):
            raise UserError(
                f"task.chat_template_kwargs: the chat template reads no variable {name!r}; look at the "
                "model's chat_template for the names that it knows, or leave it out"
            )


def readable(tokenizer: Any, ids: Sequence[int] | np.ndarray) -> str:
    """The text with special tokens marked, to tell them from plain text that looks like them; a long text
    loses its middle.
    """
    special, parts, plain = (
        special_ids(tokenizer) | set(getattr(tokenizer, "added_tokens_decoder", {})),
        [],
        list[int](),
    )
    for i in [*map(int, ids), None]:
        if i is not None and i not in special:
            plain.append(i)
            continue
        if plain:
            parts.append(str(tokenizer.decode(plain)))
            plain = []
        if i is not None:
            parts.append(f"⟦{tokenizer.convert_ids_to_tokens(i)}⟧")
    text = "".join(parts)
    if len(text) > SHOWN_CHARS:
        half = SHOWN_CHARS // 2
        text = f"{text[:half]}\n... {len(text) - SHOWN_CHARS} characters left out ...\n{text[-half:]}"
    return text


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
