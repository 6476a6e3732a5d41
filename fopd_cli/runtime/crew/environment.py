"""The environment worker: one event loop runs the tools of all episodes, so a slow tool delays no other."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
import traceback
from collections.abc import Callable, Coroutine
from typing import Any, assert_never

import numpy as np

from fopd_cli.engines.models import hf
from fopd_cli.engines.text.templates import Frame, encode_observation
from fopd_cli.errors import UserError
from fopd_cli.runtime.crew import messages as m
from fopd_cli.samples import Prompt
from fopd_cli.tasks.base import Episode, EpisodicTask, Observation
from fopd_cli.tasks.privileged import told
from fopd_cli.tasks.replay import judged_context, realigned, replay, same

Answer = m.Observed | m.Reexecuted | m.Failed


class Environments:
    """Running episodes by their number. `answer` is called with an `m.Observed` for every turn, unless the
    episode was cancelled.
    """

    def __init__(self, task: EpisodicTask, frame: Frame, answer: Callable[[Answer], None]) -> None:
        self.task, self.frame, self.answer = task, frame, answer
        self.tokenizer = frame.tokenizer
        self._episodes: dict[int, tuple[int, Episode]] = {}  # number -> key, episode
        self._turns: dict[int, asyncio.Task[None]] = {}
        self._reexecutions: set[asyncio.Task[None]] = set()

    async def do(self, command: m.EnvironmentCommand) -> None:
        """Start the command; must be called from within the event loop."""
        match command:
            case m.TurnCommand():
                self._turn(command)
            case m.ReexecuteCommand():
                running = asyncio.ensure_future(self._guarded(self._reexecute(command)))
                self._reexecutions.add(running)
                running.add_done_callback(self._reexecutions.discard)
            case m.CancelCommand(keys):
                await self._cancel(keys)
            case _:
                assert_never(command)

    def _turn(self, command: m.TurnCommand) -> None:
        if command.episode not in self._episodes:
            self._episodes[command.episode] = (command.key, self.task.episode(command.prompt, command.now))
        self._turns[command.episode] = asyncio.ensure_future(self._guarded(self._observe(command)))

    async def _cancel(self, keys: list[int]) -> None:
        """Give up these episodes."""
        for number in [number for number, (key, _) in self._episodes.items() if key in keys]:
            if (running := self._turns.pop(number, None)) is not None:
                running.cancel()
                await asyncio.gather(running, return_exceptions=True)
            await self._close(number)

    async def close(self) -> None:
        for running in self._reexecutions:
            running.cancel()
        await asyncio.gather(*self._reexecutions, return_exceptions=True)
        await self._cancel([key for key, _ in self._episodes.values()])

    async def _guarded(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except Exception as error:  # from the task's own code; it ends the run
            traceback.print_exc()
            user = isinstance(error, UserError)
            said = str(error) if user else f"{type(error).__name__}: {error}"
            self.answer(m.Failed("user" if user else "worker", said))

    async def _observe(self, command: m.TurnCommand) -> None:
        start = time.time()
        seen: Observation = await self._episodes[command.episode][1].observe(command.text)
        ids = self._encoded(seen, command.prompt, command.ended)
        if ids is None:
            await self._close(command.episode)
        self._turns.pop(command.episode, None)
        span = m.Span("tools", start, time.time(), {"calls": len(seen.calls)})
        self.answer(m.Observed(command.key, command.episode, ids, seen.calls, seen.answer, span))

    async def _reexecute(self, command: m.ReexecuteCommand) -> None:
        start, rollout = time.time(), command.rollout
        texts = [hf.decode_turn(self.tokenizer, rollout.response_ids[a:b]) for a, b in rollout.turns]
        found = await replay(self.task, command.prompt, texts, command.now)
        ids = rollout.token_ids[: rollout.prompt_length] if command.told is None else command.told
        if found.prompt != command.prompt:
            prompt = found.prompt if command.template is None else told(found.prompt, command.template)
            ids = self.frame.prompt(prompt)
        ends = [int(rollout.response_ids[b - 1]) for _, b in rollout.turns]
        pairs = zip(found.observations, ends, strict=False)
        seen = [e for o, ended in pairs if (e := self._encoded(o, command.prompt, ended)) is not None]
        context = realigned(rollout, ids, seen)
        unchanged = same(context, judged_context(rollout, command.told))
        span = m.Span("replay", start, time.time(), {"turns": len(seen)})
        self.answer(m.Reexecuted(rollout.key, None if unchanged else context, span))

    def _encoded(self, seen: Observation, prompt: Prompt, ended: int) -> np.ndarray | None:
        if seen.text is None:
            return None
        chat = prompt.messages is not None
        return encode_observation(self.tokenizer, seen.text, seen.role, chat, ended, self.frame.variables)

    async def _close(self, number: int) -> None:
        await self._episodes.pop(number)[1].close()


class LocalEnvironments:
    """The same within this process, its loop in a thread. Use as a context manager."""

    def __init__(self, task: EpisodicTask, frame: Frame) -> None:
        self.answers: queue.Queue[Answer] = queue.Queue()
        self._loop = asyncio.new_event_loop()
        self._environments = Environments(task, frame, self.answers.put)
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> LocalEnvironments:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        asyncio.run_coroutine_threadsafe(self._environments.close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def send(self, command: m.EnvironmentCommand) -> None:
        asyncio.run_coroutine_threadsafe(self._environments.do(command), self._loop)

    def receive(self, block: bool) -> list[m.Observed | m.Reexecuted]:
        """All answers so far; if there are none and `block`, waits for one. Raises `UserError` if a task
        failed.
        """
        found: list[m.Observed | m.Reexecuted] = []
        while True:
            try:
                answer = self.answers.get(block and not found)
            except queue.Empty:
                return found
            if isinstance(answer, m.Failed):
                raise UserError(f"task: {answer.message}")
            found.append(answer)
