"""The frames of real models' chat templates: what they put around turns, and what they refuse."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conftest import TINY
from transformers import AutoTokenizer

from fopd_cli.engines.models import hf
from fopd_cli.engines.text.templates import (
    Frame,
    check_variables,
    encode_observation,
    encode_prompt,
    end_of_turn,
    readable,
)
from fopd_cli.errors import UserError
from fopd_cli.samples import Prompt

# name -> (template, special tokens, tokenizer.eos_token, what ends the assistant's turn)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') "
    "}}{% endif %}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ "
    "raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}{% "
    "if m['role'] == 'assistant' %}{% set role = 'model' %}{% else %}{% set role = m['role'] %}{% endif "
    "%}{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}{% if "
    "add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
GLM = (
    "[gMASK]<sop>{% for m in messages %}{% if m['role'] == 'user' %}<|user|>\n{{ m['content'] }}{% if "
    "enable_thinking is defined and not enable_thinking %}/nothink{% endif %}{% elif m['role'] == "
    "'assistant' %}<|assistant|>\n<think></think>\n{{ m['content'] }}{% elif m['role'] == 'tool' %}{% if "
    "loop.first or messages[loop.index0 - 1]['role'] != 'tool' %}<|observation|>{% endif %}{{ "
    "'\n<tool_response>\n' + m['content'] + '\n</tool_response>' }}{% elif m['role'] == 'system' "
    "%}<|system|>\n{{ m['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{{ "
    "'\n<think></think>' if enable_thinking is defined and not enable_thinking else '' }}{% endif %}"
)
PHI4_MINI = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% "
    "endif %}"
)
VICUNA = (
    "{% for m in messages %}{% if m['role'] == 'user' %}USER: {{ m['content'] }} {% else %}ASSISTANT: {{ "
    "m['content'] }} </s>{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
MODELS: dict[str, tuple[str, list[str], str, str]] = {
    "gemma": (GEMMA, ["<bos>", "<start_of_turn>", "<end_of_turn>", "<eos>"], "<eos>", "<end_of_turn>"),
    "glm": (
        GLM,
        ["[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "<|endoftext|>"],
        "<|endoftext|>",
        "<|user|>",
    ),
    "phi4-mini": (
        PHI4_MINI,
        ["<|user|>", "<|assistant|>", "<|system|>", "<|tool|>", "<|end|>", "<|endoftext|>"],
        "<|endoftext|>",
        "<|end|>",
    ),
    "qwen": (CHATML, ["<|im_start|>", "<|im_end|>", "<|endoftext|>"], "<|im_end|>", "<|im_end|>"),
    "qwen base": (CHATML, ["<|im_start|>", "<|im_end|>", "<|endoftext|>"], "<|endoftext|>", "<|im_end|>"),
    "vicuna": (VICUNA, ["</s>"], "</s>", "</s>"),
}


def tokenizer_of(name: str) -> Any:
    """The pair's byte tokenizer with a model's special tokens and template."""
    template, specials, eos, _ = MODELS[name]
    tokenizer = AutoTokenizer.from_pretrained(TINY / "student")
    tokenizer.add_special_tokens({"additional_special_tokens": specials})
    tokenizer.eos_token = eos
    tokenizer.bos_token = "<bos>" if "<bos>" in specials else None
    tokenizer.chat_template = template
    return tokenizer


U, A = {"role": "user", "content": "question"}, {"role": "assistant", "content": "first turn"}


@pytest.mark.parametrize("name", MODELS)
def test_turns_and_observations_are_what_the_template_renders(name: str) -> None:
    """Prompt, sampled turn with its end, and observation together are the template's own rendering, with no
    token twice.
    """
    tokenizer = tokenizer_of(name)
    end = tokenizer.convert_tokens_to_ids(MODELS[name][3])
    prompt = encode_prompt(tokenizer, Prompt(0, messages=[U]))
    after_role = " " if name == "vicuna" else "\n<think></think>\n" if name == "glm" else ""
    before_end = " " if name == "vicuna" else ""
    said = tokenizer(after_role + A["content"] + before_end, add_special_tokens=False)["input_ids"]
    seen = encode_observation(tokenizer, "seen", "user", True, end)
    ours = tokenizer.decode([*prompt, *said, end, *seen])
    talk = [U, A, {"role": "user", "content": "seen"}]
    assert ours == tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)


def test_another_end_than_the_templates_leaves_the_frame_whole() -> None:
    """A student that ends with <|endoftext|> has not emitted the token that opens the next message."""
    for name, frame in (
        ("glm", "<|user|>\nx<|assistant|>"),
        ("phi4-mini", "<|end|><|user|>x<|end|><|assistant|>"),
    ):
        tokenizer = tokenizer_of(name)
        seen = encode_observation(
            tokenizer, "x", "user", True, tokenizer.convert_tokens_to_ids("<|endoftext|>")
        )
        assert tokenizer.decode(seen) == frame
    glm = tokenizer_of("glm")
    called = encode_observation(glm, "x", "tool", True, glm.convert_tokens_to_ids("<|observation|>"))
    assert glm.decode(called) == "\n<tool_response>\nx\n</tool_response><|assistant|>"


def test_answers_to_parallel_calls_are_a_message_each() -> None:
    tokenizer = tokenizer_of("glm")
    seen = encode_observation(
        tokenizer, ["1", "<|user|>"], "tool", True, tokenizer.convert_tokens_to_ids("<|observation|>")
    )
    block = "\n<tool_response>\n{}\n</tool_response>"
    assert tokenizer.decode(seen) == block.format("1") + block.format("<|user|>") + "<|assistant|>"
    assert tokenizer.convert_tokens_to_ids("<|user|>") not in seen.tolist()
    assert tokenizer.decode(encode_observation(tokenizer, ["1", "2"], "user", False)) == "12"


@pytest.mark.parametrize("name", MODELS)
def test_what_ends_the_assistants_turn(name: str) -> None:
    tokenizer = tokenizer_of(name)
    assert tokenizer.convert_ids_to_tokens(end_of_turn(tokenizer, {})) == MODELS[name][3]


def test_a_role_that_a_template_refuses_is_named_with_its_key() -> None:
    frame = Frame(tokenizer_of("gemma"), system="be brief")
    ours, theirs = ({"role": "system", "content": text} for text in ("be brief", "of the data"))
    for messages, message in (
        (
            [ours, U],
            (
                r"^task.system: row 3 of f: the student's chat template refuses message 1, of role 'system' "
                r"\(System role not"
            ),
        ),
        ([theirs, U], r"^task.question: row 3 of f: .* refuses message 1, of role 'system'"),
        ([U, A, {"role": "tool", "content": "x"}], r"refuses message 3, of role 'tool'"),
        ([U, U], r"refuses message 2, of role 'user' \(Conversation roles must alternate"),
    ):
        with pytest.raises(UserError, match=message) as error:
            frame.prompt(Prompt(0, messages=messages, place="row 3 of f"))
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="refuses a message of role 'tool' after the assistant's"):
        encode_observation(frame.tokenizer, "x", "tool", True)


def test_a_template_that_fails_by_itself_is_one_line() -> None:
    tokenizer = tokenizer_of("qwen")
    for template in ("{{ messages[0]['content'] + 1 }}", "{{ nothing.at.all }}", "{% for %}"):
        tokenizer.chat_template = template
        with pytest.raises(UserError, match=r"^task: prompt 0: the student's chat template refuses"):
            encode_prompt(tokenizer, Prompt(0, messages=[U]))


def test_variables_reach_prompts_and_observations() -> None:
    tokenizer = tokenizer_of("qwen")
    off = {"enable_thinking": False}
    asked = encode_prompt(tokenizer, Prompt(0, messages=[U]), off)
    assert tokenizer.decode(asked).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert not tokenizer.decode(encode_prompt(tokenizer, Prompt(0, messages=[U]))).endswith("</think>\n\n")
    seen = encode_observation(tokenizer, "x", "user", True, None, off)
    assert (
        tokenizer.decode(seen)
        == "\n<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )


def test_variables_that_no_template_reads_are_refused() -> None:
    tokenizer = tokenizer_of("qwen")
    check_variables(["enable_thinking"], [tokenizer])
    for name, message in (
        ("enable_thinkin", "reads no variable 'enable_thinkin'"),
        ("tokenize", "not for recipes to set"),
    ):
        with pytest.raises(UserError, match=rf"^task.chat_template_kwargs: .*{message}"):
            check_variables([name], [tokenizer])


def test_readable_marks_what_is_special() -> None:
    tokenizer = tokenizer_of("qwen")
    ids = [*tokenizer("a <|im_end|>", split_special_tokens=True)["input_ids"], tokenizer.eos_token_id]
    assert readable(tokenizer, ids) == "a <|im_end|>⟦<|im_end|>⟧"
    assert "characters left out" in readable(tokenizer, tokenizer("x" * 9000)["input_ids"])


def test_marks_of_thoughts_and_calls_are_heard_even_if_they_are_special() -> None:
    tokenizer = tokenizer_of("qwen")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>", "[TOOL_CALLS]"]})
    turn = "<think>a</think>[TOOL_CALLS][]<|im_end|>"
    ids = np.array(tokenizer(turn, add_special_tokens=False)["input_ids"])
    assert hf.decode_turn(tokenizer, ids) == "<think>a</think>[TOOL_CALLS][]"
    assert hf.decode(tokenizer, ids) == "a[]"
