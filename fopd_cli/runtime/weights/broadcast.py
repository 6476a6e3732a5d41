"""Weights by packed broadcast, from learner rank 0 to the processes of a sampler.

    sampler's processes             learner rank 0
      connect, say who they are  ->   all of a replica are there: a new group with them        (once)
      "version t"                ->   a thread sends the slot, in buckets of some 256 MB       (each load)

The two slots are one buffer in the learner's memory, on its device: the weights are packed when they are
written. Buckets end between tensors. A receiver unpacks one while the next is under way, and never holds the
whole version.

Every replica has its own group and its own thread of the learner. Replicas load at different times, and the
learner is at its next step by then, so one group of all would make everybody wait for the slowest; and a
replica that dies breaks no group but its own. Its connection closes, which ends its thread. The process that
replaces it connects as any other, and gets a group of its own.
"""

from __future__ import annotations

import atexit
import itertools
import secrets
import sys
import tempfile
import threading
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fopd_cli.runtime.crew.fleet import WorkerSpec
from fopd_cli.runtime.memory.weights import Layout, SharedWeights, WeightChannel, layout_bytes
from fopd_cli.runtime.weights.groups import Gone, Group, hang_up
from fopd_cli.runtime.weights.transport import Inlet, Outlet

BUCKET = 256 << 20  # bytes; one tensor may be larger
AHEAD = 2  # buckets under way at once
CLOSING_S = 5.0


@dataclass(frozen=True)
class Bucket:
    """Consecutive tensors of a version: their layout, and where they begin in the slot."""

    start: int
    layout: Layout

    @property
    def nbytes(self) -> int:
        return layout_bytes(self.layout)


def buckets(layout: Layout, size: int) -> list[Bucket]:
    """A version, cut between tensors into buckets of at least `size` bytes; the last one may be smaller."""
    found, end = list[Bucket](), 0
    for tensor in layout:
        if not found or end - found[-1].start >= size:
            found.append(Bucket(end, []))
        found[-1].layout.append(tensor)
        end += layout_bytes([tensor])
    return found


@dataclass(frozen=True)
class Meeting:
    """Where the learner listens, and what its callers must know. `rendezvous` begins the names of the files
    at which groups meet.
    """

    rendezvous: Path
    timeout_s: float
    address: str
    key: bytes = field(repr=False)
    bucket: int  # bytes of a bucket, at least

    @classmethod
    def at(cls, rendezvous: Path, timeout_s: float, bucket: int) -> Meeting:
        token = secrets.token_hex(8)
        # On Linux in no file system: nothing is left behind, and no path is too long for a socket.
        address = "\0fopd-" + token if sys.platform == "linux" else f"{tempfile.gettempdir()}/fopd-{token}"
        return cls(rendezvous, timeout_s, address, secrets.token_bytes(32), bucket)


@dataclass(frozen=True)
class Hello:
    """A sampler's process, one of `world` of this replica; `restarts` tells it from the one before."""

    replica: str
    restarts: int
    rank: int
    world: int


# ---- the learner's end -------------------------------------------------------------------------------------


class Server:
    """Serves what is in `slots`, in threads that end with the process."""

    def __init__(self, meeting: Meeting, slots: WeightChannel) -> None:
        self.meeting, self.slots = meeting, slots
        self._groups = itertools.count()
        self._serving: dict[threading.Thread, list[Connection]] = {}
        atexit.register(self.close)
        self._listener = Listener(meeting.address, "AF_UNIX", backlog=64, authkey=meeting.key)
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        arrived: dict[tuple[str, int], dict[int, Connection]] = defaultdict(dict)
        while True:
            try:
                caller = self._listener.accept()
                hello: Hello = caller.recv()
            except (AuthenticationError, EOFError, OSError):
                continue  # it died, or is none of ours
            ranks = arrived[hello.replica, hello.restarts]
            ranks[hello.rank] = caller
            if len(ranks) == hello.world:
                del arrived[hello.replica, hello.restarts]
                callers = [ranks[rank] for rank in range(hello.world)]
                thread = threading.Thread(target=self._serve, args=(hello.replica, callers), daemon=True)
                self._serving[thread] = callers
                thread.start()

    def _serve(self, replica: str, callers: list[Connection]) -> None:
        """One replica, as long as it lives."""
        group = None
        try:
            path = self.meeting.rendezvous.with_name(
                f"{self.meeting.rendezvous.name}-weights-{next(self._groups)}"
            )
            for caller in callers:
                caller.send(path)
            world, device = 1 + len(callers), self.slots.memory.device
            group = Group(path, 0, world, device, callers, self.meeting.timeout_s)
            while True:
                (version,) = {caller.recv() for caller in callers}
                self._send(version, callers, group)
        except (EOFError, OSError):
            pass  # it has ended; if it should not have, the conductor replaces it
        except Exception as error:
            print(f"weights for {replica}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        finally:
            if group is not None:
                group.close()
            for caller in callers:
                caller.close()
            self._serving.pop(threading.current_thread(), None)

    def close(self) -> None:
        """Serve nobody any more."""
        serving = dict(self._serving)
        for callers in serving.values():
            for caller in callers:
                hang_up(caller)
        for thread in serving:
            thread.join(CLOSING_S)

    def _send(self, version: int, callers: list[Connection], group: Group) -> None:
        slot = self.slots.slot(version)
        try:
            self.slots.check(version)
            refusal = None
        except RuntimeError as error:
            refusal = str(error)
        for caller in callers:
            caller.send(refusal)
        if refusal is not None:
            return
        works: deque[Any] = deque()
        with _own_stream(slot.device):
            for bucket in buckets(self.slots.layout, self.meeting.bucket):
                works.append(group.broadcast(slot[bucket.start : bucket.start + bucket.nbytes]))
                if len(works) == AHEAD:
                    group.finish(works.popleft())
            while works:
                group.finish(works.popleft())


def _own_stream(device: torch.device) -> Any:
    """Operations of this block wait for none that this process has queued so far: the slot was complete when
    it was stamped.
    """
    return torch.cuda.stream(torch.cuda.Stream(device) if device.type == "cuda" else None)


# ---- a sampler's end ---------------------------------------------------------------------------------------


class Link:
    """One process's connection to the learner, and its group with it. Used for all versions."""

    def __init__(self, meeting: Meeting, hello: Hello, device: torch.device) -> None:
        self._meeting, self._device = meeting, device
        self._learner = Client(meeting.address, "AF_UNIX", authkey=meeting.key)
        path: Path = self._asked(hello)
        self._group = Group(path, 1 + hello.rank, 1 + hello.world, device, [self._learner], meeting.timeout_s)
        atexit.register(self.close)

    def receive(self, version: int, layout: Layout) -> Iterator[tuple[str, Tensor]]:
        """Each tensor on this process's device, in memory of its own bucket."""
        if (refusal := self._asked(version)) is not None:
            raise RuntimeError(refusal)
        coming: deque[tuple[Bucket, Tensor, Any]] = deque()
        left = deque(buckets(layout, self._meeting.bucket))
        complete = False
        try:
            while left or coming:
                while left and len(coming) < AHEAD:
                    bucket = left.popleft()
                    # Not one buffer for all: an engine may hold on to a tensor until its layer is complete.
                    buffer = torch.empty(bucket.nbytes, dtype=torch.uint8, device=self._device)
                    coming.append((bucket, buffer, self._group.broadcast(buffer)))
                bucket, buffer, work = coming.popleft()
                self._group.finish(work)
                yield from SharedWeights(buffer, 0, bucket.layout)
            complete = True
        except Gone as error:
            raise RuntimeError(f"version {version} did not arrive from the learner: {error}") from None
        finally:
            if not complete:  # the learner must not wait for us
                self.close()

    def close(self) -> None:
        self._learner.close()
        self._group.close()

    def _asked(self, message: Hello | int) -> Any:
        """The learner's answer."""
        try:
            self._learner.send(message)
            if self._learner.poll(self._meeting.timeout_s):
                return self._learner.recv()
        except (EOFError, OSError):
            raise RuntimeError("the learner sends no more weights; its log says why") from None
        raise RuntimeError(f"the learner has not answered for {self._meeting.timeout_s:.0f} s")


_links: dict[tuple[str, Hello], Link] = {}  # of this process


@dataclass(frozen=True)
class Arriving:
    """One version's weights, received by whoever iterates: a sampler's process, or each of those that its
    engine has split the model over.
    """

    meeting: Meeting
    layout: Layout
    replica: str
    restarts: int
    version: int
    device: torch.device

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self.within(0, 1, self.device))

    def within(self, rank: int, world: int, device: torch.device) -> Iterator[tuple[str, Tensor]]:
        """For one of `world` processes that all call this."""
        hello = Hello(self.replica, self.restarts, rank, world)
        link = _links.get((self.meeting.address, hello))
        if link is None:
            link = _links[self.meeting.address, hello] = Link(self.meeting, hello, device)
        return link.receive(self.version, self.layout)


@dataclass
class BroadcastInlet:
    """Implements `transport.Inlet`."""

    slots: WeightChannel  # their layout and stamps
    arriving: Arriving

    @property
    def slot_bytes(self) -> int:
        return self.slots.slot_bytes

    def read(self, version: int) -> Arriving:
        self.check(version)
        return replace(self.arriving, version=version)

    def check(self, version: int) -> None:
        self.slots.check(version)


@dataclass
class Broadcast:
    """Implements `transport.Transport`. `mirrored`: the conductor reads weights, too."""

    host: WeightChannel
    slots: WeightChannel  # their layout and stamps; the memory is the learner's
    meeting: Meeting
    mirrored: bool

    @classmethod
    def create(
        cls, layout: Layout, rendezvous: Path, timeout_s: float, mirrored: bool, bucket: int = BUCKET
    ) -> Broadcast:
        return cls(
            WeightChannel.create(layout, memory=mirrored),
            WeightChannel.create(layout, memory=False),
            Meeting.at(rendezvous, timeout_s, bucket),
            mirrored,
        )

    def outlet(self, spec: WorkerSpec) -> Outlet:
        if spec.rank != 0:
            return Outlet(self.slots, keep=False)
        memory = torch.zeros(2 * self.slots.slot_bytes, dtype=torch.uint8, device=_device(spec))
        slots = replace(self.slots, memory=memory)
        outlet = Outlet(slots, True, self.host if self.mirrored else None, pieces=spec.world == 1)
        Server(self.meeting, slots)
        return outlet

    def inlet(self, spec: WorkerSpec, copies: bool) -> Inlet:
        layout, device = self.slots.layout, _device(spec)
        arriving = Arriving(self.meeting, layout, spec.name, spec.restarts, -1, device)
        return BroadcastInlet(self.slots, arriving)


def _device(spec: WorkerSpec) -> torch.device:
    return torch.device("cuda", 0) if spec.devices else torch.device("cpu")
