"""The swe task: a coding agent fixes a repository with bash, until it submits a patch."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from fopd_cli.errors import UserError
from fopd_cli.recipe import SweTask
from fopd_cli.samples import Prompt
from fopd_cli.sandbox import bubblewrap
from fopd_cli.sandbox.limits import Limits
from fopd_cli.tasks import held_out
from fopd_cli.tasks.base import Grade
from fopd_cli.tasks.sections import takes
from fopd_cli.tasks.swe import generated
from fopd_cli.tasks.swe.agent import AgentEpisode, Scaffold, require
from fopd_cli.tasks.swe.grading import harness, judge
from fopd_cli.tasks.swe.instances import Instance, load_instances
from fopd_cli.tasks.swe.workspaces import ContainerWorkspace, LocalWorkspace, Workspace


class Swe:
    """`train` and `eval` are jsonl files or hub datasets with SWE-bench's columns; without them, small
    generated repositories.
    """

    @takes("swe", SweTask)
    def __init__(self, options: SweTask) -> None:
        train, own = options.train, options.eval
        if train is None and own is not None:
            raise UserError(
                "task.train: is missing; give it together with task.eval, or leave out both for generated "
                "repositories"
            )
        known = [held.source.startswith("hf:") for held in held_out.sources(own)]
        if options.grader == "swebench" and not (known and all(known)):
            raise UserError(
                "task.grader: swebench judges instances of a dataset that it knows; set task.eval: "
                "hf:owner/name:split"
            )
        require()
        if options.sandbox == "bubblewrap":
            bubblewrap.check()
        self.options = options
        self.scaffold = Scaffold(options.scaffold, options.notation, options.max_turns)
        self.limits = Limits(
            wall_s=options.wall_s,
            cpu_s=int(max(options.wall_s, options.test_wall_s)),
            memory_mb=options.memory_mb,
            processes=256,
            disk_mb=512,
            workspace_mb=2048,
        )
        self.notices: list[str] = []
        self._slots: threading.Semaphore | None = None

    def prompts(self, split: Literal["train", "eval"]) -> Sequence[Prompt]:
        if split == "train" or self.options.train is None:
            return [self._prompt(i, made) for i, made in enumerate(self.instances(split))]
        named = self._sets(self.options.train)
        return [replace(self._prompt(i, made), held_out=name) for i, (name, made) in enumerate(named)]

    def instances(self, split: Literal["train", "eval"]) -> list[Instance]:
        """Instances of a split; held-out ones are not trained on."""
        options = self.options
        train = options.train
        if train is None:
            return generated.instances(
                split, options.train_prompts, options.seed, options.eval_prompts or held_out.DEFAULT
            )
        ours = [made for _, made in self._sets(train)]
        if split == "eval":
            return ours
        known = {made.id for made in ours}
        rest = [made for made in load_instances(train, "task.train") if made.id not in known]
        if not rest:
            raise UserError(
                "task.train: all its instances are held out; give another file or lower task.eval_prompts"
            )
        return rest

    def _sets(self, train: str) -> list[tuple[str | None, Instance]]:
        """Held-out instances, with the name of their set."""
        found = []
        for name, key, source in held_out.sources(self.options.eval):
            there = load_instances(source, key)
            count = held_out.size(self.options.eval_prompts, len(there), shared=source == train)
            found += [(name, made) for made in there[:count]]
        return found or [(None, made) for made in self._split_off(train)]

    def _split_off(self, source: str) -> list[Instance]:
        found = load_instances(source, "task.train")
        chosen = held_out.drawn(
            [made.id for made in found], held_out.size(self.options.eval_prompts, len(found), shared=True)
        )
        self.notices = [
            (
                f"task.eval: not given; {len(chosen)} of the {len(found)} instances of task.train are held "
                "out, drawn by their ids"
            )
        ]
        return [found[i] for i in chosen]

    def grade(self, prompt: Prompt, response: str) -> Grade:
        """Grade the submitted patch. An agent that never submitted has none."""
        instance: Instance = prompt.payload["instance"]
        if self.options.grader == "swebench":
            sets = held_out.sources(self.options.eval)
            own = next((held for held in sets if held.name == prompt.held_out), sets[0])
            name, _, split = own.source.removeprefix("hf:").partition(":")
            return harness(instance, response, name.partition("@")[0], split or "test")
        if not response.lstrip().startswith("diff "):
            return Grade(0.0, {"submitted": 0.0})
        workspace = self.workspace(instance)
        try:
            return judge(instance, workspace, response, self.options.test_wall_s)
        finally:
            workspace.close()

    def episode(self, prompt: Prompt, now: int) -> AgentEpisode:
        instance: Instance = prompt.payload["instance"]
        return AgentEpisode(self.scaffold, instance.problem, lambda: self.workspace(instance), self.limits)

    def workspace(self, instance: Instance) -> Workspace:
        """A fresh checkout."""
        if self.options.sandbox in ("docker", "podman"):
            return ContainerWorkspace(instance, self.limits, self.options.sandbox)
        if self._slots is None:  # one per process: tasks are built in several, and a semaphore cannot be sent
            self._slots = threading.Semaphore(max(4, os.cpu_count() or 1))
        return LocalWorkspace(instance, self.limits, self._slots, self.options.sandbox == "bubblewrap")

    def _prompt(self, index: int, instance: Instance) -> Prompt:
        messages = self.scaffold.messages(instance.problem)
        tools: list[dict[str, Any]] = []
        if self.options.notation == "native":
            from minisweagent.models.utils.actions_toolcall import BASH_TOOL

            tools = [BASH_TOOL]
        payload = {"instance": instance, "problem": instance.problem}
        if self.options.chat:
            return Prompt(index, messages=messages, payload=payload, tools=tools, place=instance.place)
        return Prompt(
            index,
            text="".join(m["content"] for m in messages),
            payload=payload,
            tools=tools,
            place=instance.place,
        )
