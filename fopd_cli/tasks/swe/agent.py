"""mini-SWE-agent's own agent, its loop and its prompts, with our student behind its model interface.

The agent asks its model and waits, while our runtime brings turns and takes observations. So the agent runs
in its own thread and its model is a pair of queues: what the agent would send to a model is the observation,
what the student wrote is the model's answer. Tokens never pass through here, only the text of turns.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import queue
import tempfile
import threading
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import yaml

from fopd_cli.errors import UserError
from fopd_cli.sandbox.limits import Limits, Outcome
from fopd_cli.tasks.base import Observation
from fopd_cli.tasks.calls import Call, native, spoken
from fopd_cli.tasks.swe.workspaces import Workspace, shown

LONGEST = 100_000  # Linux's limit for one argument is 128 kB
INSTALL = "pip install 'fopd[swe]' && pip install --no-deps mini-swe-agent==2.4.6"


def require() -> None:
    """Raises `UserError` unless the scaffold can be imported. Importing it would make a folder in the user's
    home and print; both are prevented here.
    """
    if importlib.util.find_spec("minisweagent") is None:
        raise UserError(
            f"task: the swe task needs mini-swe-agent: {INSTALL} (without its own requirements: litellm "
            "would replace packages that transformers needs)"
        )
    os.environ.setdefault("MSWEA_SILENT_STARTUP", "1")
    os.environ.setdefault("MSWEA_GLOBAL_CONFIG_DIR", str(Path(tempfile.gettempdir()) / "fopd-mswea"))


class Scaffold:
    """A configuration of mini-SWE-agent: one that comes with it, by name (`swebench_backticks`), or the
    user's YAML file.
    """

    def __init__(self, name: str, notation: Literal["code", "native"], max_turns: int) -> None:
        require()
        from minisweagent.config import builtin_config_dir

        candidates = [
            builtin_config_dir / "benchmarks" / f"{name}.yaml",
            builtin_config_dir / f"{name}.yaml",
            Path(name),
        ]
        found = next((p for p in candidates if p.is_file()), None)
        if found is None:
            raise UserError(
                f"task.scaffold: {name!r} is neither a configuration of mini-swe-agent nor a file"
            )
        config = yaml.safe_load(found.read_text(encoding="utf-8"))
        try:
            self.agent = {**config["agent"], "step_limit": max_turns, "cost_limit": 0.0}
            self.model = dict(config["model"])
            self.model["observation_template"], self.model["format_error_template"]  # both are needed
        except (KeyError, TypeError) as error:
            raise UserError(
                f"task.scaffold: {found} has no {error}; it is not a configuration of mini-swe-agent"
            ) from None
        self.notation = notation
        self.environment = dict(config.get("environment", {}))

    def messages(self, task: str) -> list[dict[str, str]]:
        """The agent's first messages."""
        from minisweagent.agents.default import DefaultAgent

        nowhere: Any = _Nowhere(self.environment)
        agent = DefaultAgent(TurnModel(self, None), nowhere, **self.agent)
        agent.extra_template_vars = {"task": task}
        rendered = [("system", agent.config.system_template), ("user", agent.config.instance_template)]
        return [{"role": role, "content": agent._render_template(text)} for role, text in rendered if text]


class _Stopped(BaseException):
    """The episode was given up; not an `Exception`, which the agent would report."""


class TurnModel:
    """minisweagent's `Model`: `send` passes the agent's messages to the student, `said` brings the student's
    turn (None: give up).
    """

    def __init__(self, scaffold: Scaffold, send: Any) -> None:
        from minisweagent.models.utils import actions_text, actions_toolcall

        self._text, self._toolcall = actions_text, actions_toolcall
        self.scaffold, self.send, self.said = scaffold, send, queue.Queue[str | None]()
        self.config = SimpleNamespace(model_name="student")
        self.invalid: list[dict[str, Any]] = []
        self._seen = 0

    def query(self, messages: list[dict[str, Any]], **_: Any) -> dict[str, Any]:
        from minisweagent.exceptions import FormatError

        self.send([m for m in messages[self._seen :] if m["role"] != "assistant"])
        self._seen = len(messages)
        if (turn := self.said.get()) is None:
            raise _Stopped
        try:
            actions = self._actions(turn)
        except FormatError as error:
            self.invalid.append(
                {
                    "tool": "bash",
                    "input": turn,
                    "output": str(error.messages[0]["content"]),
                    "ok": False,
                    "seconds": 0.0,
                }
            )
            raise
        return {"role": "assistant", "content": turn, "extra": {"actions": actions, "cost": 0.0}}

    def _actions(self, turn: str) -> list[dict[str, Any]]:
        config = self.scaffold.model
        if self.scaffold.notation == "code":
            regex = config.get("action_regex", r"```mswea_bash_command\s*\n(.*?)\n```")
            found: list[dict[str, Any]] = self._text.parse_regex_actions(
                spoken(turn), action_regex=regex, format_error_template=config["format_error_template"]
            )
            return found
        calls = [_tool_call(call, str(i)) for i, call in enumerate(native(turn))]
        parsed: list[dict[str, Any]] = self._toolcall.parse_toolcall_actions(
            calls,
            format_error_template=config["format_error_template"],
            template_kwargs={"finish_reason": "stop"},
        )
        return parsed

    def format_message(self, **message: Any) -> dict[str, Any]:
        return message

    def format_observation_messages(
        self,
        message: dict[str, Any],
        outputs: list[dict[str, Any]],
        template_vars: dict[str, Any] | None = None,
    ) -> list[dict[str, Any]]:
        template = self.scaffold.model["observation_template"]
        if self.scaffold.notation == "code":
            found: list[dict[str, Any]] = self._text.format_observation_messages(
                outputs, observation_template=template, template_vars=template_vars
            )
            return found
        actions = message.get("extra", {}).get("actions", [])
        answers: list[dict[str, Any]] = self._toolcall.format_toolcall_observation_messages(
            actions=actions, outputs=outputs, observation_template=template, template_vars=template_vars
        )
        return answers

    def get_template_vars(self, **_: Any) -> dict[str, Any]:
        return {}

    def serialize(self) -> dict[str, Any]:
        return {}


def _tool_call(call: Call, number: str) -> Any:
    """A chat template's call in the form of OpenAI's API, which is what the scaffold checks."""
    name, arguments = (call.name, json.dumps(call.arguments)) if call.problem is None else ("bash", call.text)
    return SimpleNamespace(id=number, function=SimpleNamespace(name=name, arguments=arguments))


class _Nowhere:
    """Enough of an environment to render a prompt."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def get_template_vars(self, **_: Any) -> dict[str, Any]:
        # What the machine inside the sandbox would say, never ours.
        return {"system": "Linux", "release": "", "version": "", "machine": "x86_64", **self.config}


class WorkspaceEnvironment(_Nowhere):
    """minisweagent's `Environment` on one of our workspaces; the line that submits is that of its own."""

    def __init__(self, workspace: Workspace, limits: Limits, config: dict[str, Any]) -> None:
        super().__init__({**config, "cwd": workspace.directory})
        self.workspace, self.limits = workspace, limits
        self.calls: list[dict[str, Any]] = []

    def execute(self, action: dict[str, Any], **_: Any) -> dict[str, Any]:
        from minisweagent.exceptions import Submitted

        # A process's arguments cannot hold NUL or halves of surrogate pairs.
        command = str(action["command"]).replace("\0", "").encode(errors="replace").decode()
        if len(command.encode()) > LONGEST:
            outcome = Outcome(f"stopped: a command of more than {LONGEST} bytes\n", "exit", 126, 0.0)
        else:
            outcome = self.workspace.run(command)
        text, ok = shown(outcome, self.limits), outcome.reason == "exit"
        self.calls.append(
            {"tool": "bash", "input": action["command"], "output": text, "ok": ok, "seconds": outcome.seconds}
        )
        first, _newline, rest = text.lstrip().partition("\n")
        if first.strip() == "COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT" and outcome.code == 0:
            extra = {"exit_status": "Submitted", "submission": rest}
            raise Submitted({"role": "exit", "content": rest, "extra": extra})
        return {
            "output": text,
            "returncode": -1 if outcome.code is None else outcome.code,
            "exception_info": "",
        }

    def serialize(self) -> dict[str, Any]:
        return {}


class AgentEpisode:
    """Implements `base.Episode`. `make_workspace` is called in the agent's thread: checking out may take a
    while.
    """

    def __init__(self, scaffold: Scaffold, task: str, make_workspace: Any, limits: Limits) -> None:
        self.scaffold, self.task, self.make_workspace, self.limits = scaffold, task, make_workspace, limits
        self._heard: asyncio.Queue[Any] | None = None
        self._model: TurnModel | None = None
        self._environment: WorkspaceEnvironment | None = None
        self._thread: threading.Thread | None = None

    async def observe(self, turn: str) -> Observation:
        if self._heard is None:
            self._start()
            # the prompt, which the student already has; or the error that prevented the workspace
            first = await self._next()
            if isinstance(first, BaseException):
                raise first
        assert self._model is not None
        self._model.said.put(turn)
        heard = await self._next()
        calls = self._taken()
        if isinstance(heard, BaseException):
            raise heard
        if isinstance(heard, dict):
            return Observation(None, calls=calls, answer=str(heard.get("submission", "")))
        texts = [str(m["content"]) for m in heard]
        if all(m["role"] == "tool" for m in heard):
            return Observation(texts if len(texts) > 1 else texts[0], "tool", calls)
        return Observation("\n".join(texts), "user", calls)

    async def close(self) -> None:
        if self._thread is None or self._model is None:
            return
        self._model.said.put(None)
        if self._environment is not None:
            self._environment.workspace.stop()
        await asyncio.to_thread(self._thread.join)

    def _start(self) -> None:
        loop, heard = asyncio.get_running_loop(), asyncio.Queue[Any]()

        def send(item: Any) -> None:
            loop.call_soon_threadsafe(heard.put_nowait, item)

        self._heard, self._model = heard, TurnModel(self.scaffold, send)
        self._thread = threading.Thread(target=self._run, args=(self._model, send), daemon=True)
        self._thread.start()

    async def _next(self) -> Any:
        assert self._heard is not None
        return await self._heard.get()

    def _taken(self) -> list[dict[str, Any]]:
        assert self._model is not None
        calls, self._model.invalid = self._model.invalid, []
        if self._environment is not None:
            calls, self._environment.calls = [*calls, *self._environment.calls], []
        return calls

    def _run(self, model: TurnModel, send: Any) -> None:
        from minisweagent.agents.default import DefaultAgent

        workspace = None
        try:
            workspace = self.make_workspace()
            environment: Any = WorkspaceEnvironment(workspace, self.limits, self.scaffold.environment)
            self._environment = environment
            send(dict(DefaultAgent(model, environment, **self.scaffold.agent).run(self.task)))
        except (_Stopped, asyncio.CancelledError):
            pass
        except BaseException as error:
            traceback.print_exc()
            send(error)
        finally:
            if workspace is not None:
                workspace.close()
