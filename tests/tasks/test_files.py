"""Rows of every kind of file become prompts, and what is wrong with one names its file and row."""

from __future__ import annotations

import csv
import json
import math
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from task_kit import built

from fopd_cli.errors import UserError
from fopd_cli.tasks import load_task
from fopd_cli.tasks.conversations import asked
from fopd_cli.tasks.files import read_rows
from fopd_cli.tasks.swe.instances import load_instances

ROWS: list[dict[str, Any]] = [
    {"question": f'What is {i}+1?\nSay "it", in one word', "reward": {"truth": f"{i + 1}"}} for i in range(9)
]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """The rows in the format that the name says."""
    if path.suffix in (".jsonl", ".ndjson"):
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="") as file:
            table = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
            table.writerow(rows[0])
            for row in rows:
                table.writerow(
                    [v if isinstance(v, str) else "" if v is None else json.dumps(v) for v in row.values()]
                )
    elif path.suffix == ".parquet":
        pa.parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        with pa.OSFile(str(path), "w") as sink:
            table = pa.Table.from_pylist(rows)
            with pa.ipc.new_stream(sink, table.schema) as stream:
                stream.write_table(table)
    return path


KINDS = ["a.jsonl", "a.ndjson", "a.json", "a.csv", "a.tsv", "a.parquet", "a.arrow"]


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_gives_the_same_prompts(tmp_path: Path, name: str) -> None:
    path = str(write(tmp_path / name, ROWS))
    task = built("math", train=path, eval=path, answer="reward.truth", eval_prompts=4)
    assert [p.payload["answer"] for p in task.prompts("eval")] == ["1", "2", "3", "4"]
    train = task.prompts("train")
    assert [p.messages[-1]["content"] for p in train] == [row["question"] for row in ROWS[4:]]  # type: ignore[index]
    assert [p.index for p in train] == list(range(5))
    if name not in ("a.jsonl", "a.ndjson"):
        assert train[0].place == f"row 5 of {path!r}"


@pytest.mark.parametrize("name", KINDS)
def test_messages_in_every_kind_of_file(tmp_path: Path, name: str) -> None:
    talk = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
    ]
    path = str(write(tmp_path / name, [{"data": {"messages": talk}}, {"data": {"messages": talk[1:2]}}]))
    task = built("chat", train=path, eval=path, question="data.messages", eval_prompts=1)
    assert task.prompts("eval")[0].messages == talk[:2]
    assert task.prompts("eval")[0].payload["solution"] == "a"
    assert task.prompts("train")[0].messages == talk[1:2]


def test_a_directory_is_all_its_files_by_name(tmp_path: Path) -> None:
    for i, name in enumerate(("train-0.parquet", "train-1.csv", "sub/train-2.jsonl")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, [{"question": f"q{i}", "answer": "1"}])
    (tmp_path / "README.md").write_text("# no data")
    (tmp_path / "dataset_info.json").write_text("{}")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "train-9.jsonl").write_text('{"question": "hidden"}')
    rows = read_rows(str(tmp_path), "task.train")
    assert sorted(row.values["question"] for row in rows) == ["q0", "q1", "q2"]
    assert rows[-1].place == f"row 1 of {str(tmp_path / 'train-1.csv')!r}"
    write(tmp_path / "test-0.jsonl", ROWS)
    with pytest.raises(UserError, match=r"files of several splits \(test, train\)"):
        read_rows(str(tmp_path), "task.train")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UserError, match=r"holds no data file; fopd reads .jsonl"):
        read_rows(str(tmp_path / "nothing"), "task.train")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "x", "of an unknown kind; fopd reads .jsonl"),
        ("a.json", "[1]", "row 1 of '.*a.json' is not a JSON object"),
        ("a.json", "{", r"is not JSON \(.*, line 1\)"),
        ("a.json", '{"question": "1"}\n{"question": 2', "line 2 of '.*a.json' is not JSON"),
        ("a.json", '{"data": 1}', "must be a list of JSON objects"),
        ("a.csv", 'question,answer\n"x",1\ny,1,2\n', "row 2 of '.*a.csv' has 3 cells, its header has 2"),
        ("a.csv", "question,question\nx,y\n", "the header of '.*a.csv' has 'question' twice"),
        ("a.csv", "question,answer\nx,1\n,1\n", "row 2 of '.*a.csv': column 'question' is null"),
        ("a.parquet", "no parquet", "cannot read '.*a.parquet'"),
        ("a.arrow", "no arrow", "cannot read '.*a.arrow'"),
        ("a.csv", "", "has no rows"),
        ("a.jsonl", '{"question": ' + "[" * 100_000, "nested too deeply"),
        ("a.jsonl", '{"question": "x", "answer": 1' + "0" * 5000 + "}", "line 1 of '.*a.jsonl' is not JSON"),
        (
            "a.jsonl",
            '{"question": "x", "answer": {"value": 1}}',
            r"several values, .* for example task.answer: answer.value",
        ),
        ("a.jsonl", '{"question": "x", "answer": ["1", "2"]}', r"for example task.answer: answer.0"),
        ("a.jsonl", '{"question ": "x", "answer": 1}', r"did you mean task.question: 'question '\?"),
        (
            "a.jsonl",
            '{"question": "x", "answr": 1}',
            r"row 1 .* no column 'answer'; .*; did you mean task.answer: answr\?",
        ),
    ],
)
def test_what_is_wrong_with_a_file_names_it(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message) as error:
        built("math", train=str(tmp_path / name), eval=str(tmp_path / name)).prompts("eval")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_other_encodings_than_utf8_are_refused(tmp_path: Path, name: str, encoding: str) -> None:
    (tmp_path / name).write_bytes('{"question": "é", "answer": 1}\n'.encode(encoding))
    with pytest.raises(UserError, match=r"is not text in UTF-8 \(byte \d+\); save it as UTF-8"):
        read_rows(str(tmp_path / name), "task.train")


@pytest.mark.parametrize(
    "content",
    [
        b'\xef\xbb\xbfquestion,answer\r\n"a, b",1\r\n',
        b"question , answer\na; b,1\n".replace(b"a; b", b'"a, b"'),
        b"question;answer\na, b;1\n",
        b'question,answer\r"a, b",1\r',
    ],
)
def test_csv_as_spreadsheets_write_it(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    assert read_rows(str(tmp_path / "a.csv"), "k")[0].values == {"question": "a, b", "answer": "1"}


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_columns_of_bytes_are_text_where_they_can_be(tmp_path: Path, name: str) -> None:
    """Never a prompt of `b'...'`."""
    path = write(tmp_path / name, [{"question": "é".encode(), "answer": b"1", "image": b"\xff\xd8"}])
    values = read_rows(str(path), "k")[0].values
    assert values == {"question": "é", "answer": "1", "image": b"\xff\xd8"}
    with pytest.raises(ValueError, match="holds bytes"):
        asked(values["image"])


def test_json_files_that_are_really_jsonl_or_hold_their_rows_under_a_key(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"question": "1"}\n{"question": "2"}\n')
    assert [r.values["question"] for r in read_rows(str(path), "k")] == ["1", "2"]
    path.write_text('{"data": [{"question": "1"}]}')
    assert read_rows(str(path), "k")[0].values == {"question": "1"}


def test_line_breaks_that_only_unicode_knows_stay_inside_their_row(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"question": "one\u2028two\x85three"}])
    assert read_rows(str(path), "k")[0].values["question"] == "one\u2028two\x85three"


def test_a_missing_extra_is_one_line_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.parquet", ROWS)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    for source in (str(path), "hf:owner/name"):
        with pytest.raises(UserError, match=r"task.train: .* pip install 'fopd\[data\]'"):
            read_rows(source, "task.train")


def test_a_hub_dataset_in_a_local_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write(tmp_path / "train.parquet", ROWS)
    task = built("math", train=f"hf:{tmp_path}", eval=f"hf:{tmp_path}:train[:3]", answer="reward.truth")
    assert len(task.prompts("eval")) == 3
    assert len(task.prompts("train")) == 6
    with pytest.raises(UserError, match=r"cannot load 'hf:.*:nothing'"):
        read_rows(f"hf:{tmp_path}:nothing", "k")


def test_an_instance_of_a_table_has_its_own_files_only(tmp_path: Path) -> None:
    """A parquet file has a field for the paths of all rows, null where a row has none."""
    common = {"problem_statement": "p", "FAIL_TO_PASS": ["t"], "PASS_TO_PASS": '["u"]'}
    rows = [{"instance_id": n, **common, "files": {f"{n}.py": "x"}} for n in ("a", "b")]
    for name in ("i.parquet", "i.csv", "i.jsonl"):
        first, second = load_instances(str(write(tmp_path / name, rows)), "task.train")
        assert first.files == {"a.py": "x"}
        assert second.files == {"b.py": "x"}
        assert second.pass_to_pass == ("u",)
    write(tmp_path / "i.jsonl", [*rows, {**rows[0], "problem_statement": None}])
    with pytest.raises(UserError, match=r"row 3 of .*: column 'problem_statement' is null"):
        load_instances(str(tmp_path / "i.jsonl"), "task.train")


# ---- conversations -----------------------------------------------------------------------------------------

U, A, S = ({"role": role, "content": role} for role in ("user", "assistant", "system"))


@pytest.mark.parametrize(
    ("value", "content", "said"),
    [
        ("q", "q", None),
        (7, "7", None),
        ([U], [U], None),
        (U, [U], None),
        ([S, U, A], [S, U], "assistant"),
        ([U, A, U, A], [U, A, U], "assistant"),
        (json.dumps([U, A]), [U], "assistant"),
        ("[{ is no JSON", "[{ is no JSON", None),
        (str([U, A]), [U], "assistant"),
        ([{"role": "User", "content": "user"}, {"role": " GPT", "content": "assistant"}], [U], "assistant"),
        ({"role": ["user", "assistant"], "content": ["user", "assistant"]}, [U], "assistant"),
        ([{"from": "human", "value": "user"}, {"from": "gpt", "value": "assistant"}], [U], "assistant"),
        ([{**U, "tool_calls": None, "name": None}], [U], None),
        (
            [{"role": "user", "content": [{"type": "text", "text": "us"}, {"type": "text", "text": "er"}]}],
            [U],
            None,
        ),
        (
            [
                U,
                {"role": "assistant", "content": None, "tool_calls": [1]},
                {"role": "tool", "content": "t"},
                A,
            ],
            [U, {"role": "assistant", "content": "", "tool_calls": [1]}, {"role": "tool", "content": "t"}],
            "assistant",
        ),
    ],
)
def test_what_is_asked(value: Any, content: Any, said: str | None) -> None:
    assert asked(value) == (content, said)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "is null"),
        (math.nan, "is null"),
        ("", "is empty"),
        (" \n", "is empty"),
        ("a\ud800", "holds half of a character"),
        ([{"role": "user", "content": "\udfff"}], "holds half of a character"),
        ("[{'role': 'user', 'content': 'q'}\n {'role': 'assistant', 'content': 'a'}]", "looks like messages"),
        ([], "is empty"),
        ([A], "only the assistant's words"),
        ([S], "holds no user message"),
        ([{"content": "x"}], "no role in message 1"),
        (["x"], "no role in message 1"),
        ([U, {"role": "user", "content": None}], "no text in message 2"),
        ([{"role": "user", "content": " "}], "empty text in message 1"),
        ([{"role": "user", "content": [{"type": "image"}]}], "something else than text in message 1"),
    ],
)
def test_what_is_no_question(tmp_path: Path, value: Any, message: str) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({"messages": [U]}) + "\n" + json.dumps({"messages": value}) + "\n")
    with pytest.raises(UserError, match=rf"task.eval: row 2 of '.*q.jsonl': column 'messages' .*{message}"):
        built("chat", train=str(path), eval=str(path)).prompts("eval")


def test_conversations_that_end_alike_are_different_questions(tmp_path: Path) -> None:
    """200 that end in "go on" are 200; the same one twice is one, and is not trained on when it is held
    out.
    """
    talks = [[{**U, "content": f"story {i}"}, A, {**U, "content": "go on"}] for i in range(200)]
    path = write(tmp_path / "q.jsonl", [{"messages": talk} for talk in [*talks, talks[0], talks[150]]])
    task = built("chat", train=str(path), eval=str(path), eval_prompts=50)
    assert len(task.prompts("eval")) == 50
    assert [p.messages for p in task.prompts("train")] == talks[50:]
    assert task.notices == ["task.train: 2 of 202 rows repeat a question; each is used once"]


def test_answers_at_the_end_are_left_out_and_said_once(tmp_path: Path) -> None:
    talks = [[{**U, "content": f"q{i}"}, *([{**A, "content": f"a{i}"}] if i % 2 else [])] for i in range(6)]
    path = write(tmp_path / "q.jsonl", [{"messages": talk, "worked": "w"} for talk in talks])
    task = built("chat", train=str(path), eval=str(path), eval_prompts=2)
    task.prompts("train")
    assert [p.payload["solution"] for p in task.prompts("train")] == [None, "a3", None, "a5"]
    assert all(p.messages == [t[0]] for p, t in zip(task.prompts("train"), talks[2:], strict=True))
    (said,) = [notice for notice in task.notices if notice.startswith("task.train")]
    assert "3 of 6 rows end with the assistant's answer, left out of the prompt; it is {solution}" in said
    own = built("chat", train=str(path), eval=str(path), eval_prompts=2, solution="worked")
    assert own.prompts("train")[1].payload["solution"] == "w"


def test_messages_without_a_chat_template_are_not_half_shown(tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", [{"messages": [U]}, {"messages": [S, U]}])
    with pytest.raises(UserError, match=r"row 2 of .* holds 2 messages, .* set task.chat: true"):
        built("chat", train=str(path), eval=str(path), chat=False).prompts("eval")


def test_rows_without_an_answer(tmp_path: Path) -> None:
    """Held out they cannot be graded; trained on they can do without, and it is said."""
    train, held_out = tmp_path / "t.jsonl", tmp_path / "e.jsonl"
    write(train, [{"question": "a", "answer": None}, {"question": "b", "answer": "2"}])
    write(held_out, [{"question": "c", "answer": "2"}])
    task = built("math", train=str(train), eval=str(held_out))
    assert math.isnan(task.grade(task.prompts("train")[0], "2"))
    assert task.notices[-1] == "task.train: 1 of 2 rows have no answer; they are trained on, but not graded"
    write(held_out, [{"question": "c", "answer": "2"}, {"question": "d", "answer": " "}])
    with pytest.raises(UserError, match=r"task.eval: row 2 of .*: column 'answer' is null or empty"):
        built("math", train=str(train), eval=str(held_out)).prompts("eval")


def test_the_chat_task_grades_nothing(tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", [{"messages": [U]}])
    task = load_task("chat", {"train": str(path), "eval": str(path)})
    grade = task.grade(task.prompts("eval")[0], "anything")
    assert isinstance(grade, float)
    assert math.isnan(grade)
