"""The models that are served: names, versions, loading, and which version answers.

A name is looked up in a dict that was filled from the command line and from the folders of ``--repository``; nothing
from a request is joined into a path, fetched or unpickled. Changes are made on the event loop's thread, by putting a
new dict in the old one's place; ``find`` may be called from any thread. What takes long (reading, proving, draining)
has threads of its own.
"""

# B = batch, C = channels, H/W = height/width, N = classes.
from __future__ import annotations

import asyncio
import logging
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import numpy as np

from mcruntime.errors import McdeployError, ParityError
from mcruntime.preprocess import Preprocessing
from mcruntime.server.batcher import Answer, Batcher, Closed, Outcome, Ran, Ticket
from mcruntime.server.errors import NotFoundError, OverloadedError, RequestError, UnavailableError
from mcruntime.server.statistics import Statistics
from mcruntime.server.tensors import Images, Logits, ModelSpec, all_finite

UNLOADED = "unloaded"  # why a version is not there: a client said so
LARGEST_PIXEL = 1e4  # of a normalised image, by far; a model that overflows below it is at fault itself
TICK_S = 0.02  # how often deadlines are looked at, while there are requests
logger = logging.getLogger("mcruntime.server")
T = TypeVar("T")


class Model:
    """One version of a model that is loaded and has passed its self-test.

    Args:
        spec: its tensors.
        infer: logits [B, N] of images [B, C, H, W]; called in a thread of the batcher.
        release: lets go of what ``infer`` needs.
        about: the page's and the index's facts: ``bundle`` (id), ``provider``, ``threads``, ...
        batching: arguments of ``Batcher``.
    """

    def __init__(
        self,
        spec: ModelSpec,
        infer: Callable[[Images], Logits],
        preprocessing: Preprocessing,
        *,
        release: Callable[[], None] = lambda: None,
        about: Mapping[str, Any] | None = None,
        folder: Any = None,
        **batching: Any,
    ) -> None:
        self.spec = spec
        self.preprocessing = preprocessing
        self.about = dict(about or {})
        self.folder = folder  # of the bundle, for its reports; None: a model without one
        self.statistics = Statistics()  # replaced when it takes the place of another of its name and version
        self.batcher = Batcher(infer, on_run=lambda ran: self.statistics.ran(ran), **batching)
        self._release = release
        self._watched_by: asyncio.AbstractEventLoop | None = None
        self._is_kicking = False

    async def infer(self, images: Images, timeout_s: float) -> Answer:
        """The answer of the engine, in the batch that the moment makes.

        Args:
            images: [B, C, H, W], checked.
            timeout_s: from now.

        Raises:
            OverloadedError, DeadlineError: the queue is full; not done in time.
            Closed: the model was unloaded meanwhile; another version may be there.
            McdeployError: the engine failed, or its answer to numbers as images have them is NaN or infinite. To
                numbers far beyond them it may be; that is then the answer, as in Triton.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Answer] = loop.create_future()
        ticket = self.start(images, timeout_s, partial(_settle, future), loop)
        try:
            answer = await future
        except asyncio.CancelledError:
            self.cancel(ticket)
            raise
        self.check(images, answer)
        return answer

    def start(
        self, images: Images, timeout_s: float, told: Callable[[Outcome], None], loop: asyncio.AbstractEventLoop
    ) -> Ticket:
        """``infer`` without waiting: ``told`` gets the outcome, not checked, on the thread of ``loop``, the caller's.

        Raises:
            OverloadedError, Closed: as ``infer``.
        """
        thread = threading.get_ident()

        def deliver(outcome: Outcome) -> None:
            if threading.get_ident() == thread:
                try:
                    told(outcome)
                except Exception:  # would take the answers of the others in its batch along
                    logger.exception("an answer was not handed on")
                return
            try:
                loop.call_soon_threadsafe(told, outcome)
            except RuntimeError:  # the loop is closed: nobody is left to be told
                logger.debug("an answer came after the end")

        ticket = self.batcher.submit(images, deliver, time.monotonic() + timeout_s, kick_follows=True)
        if not self._is_kicking:
            self._is_kicking = True
            loop.call_soon(self._kick)  # after all requests that are there now
        if self._watched_by is not loop:
            self._watched_by = loop
            loop.call_later(TICK_S, self._tick, loop)
        return ticket

    def now(self, images: Images) -> Answer | None:
        """``infer`` at once, on the event loop, where the way to a thread and back would take as long; else None, and
        ``start`` is the way. For a request beside which there is no other.

        Raises:
            as ``infer``.
        """
        answer = self.batcher.now(images)
        if answer is not None:
            self.check(images, answer)
        return answer

    def cancel(self, ticket: Ticket) -> None:
        """Forget a request whose client is gone."""
        if self.batcher.cancel(ticket):
            self.statistics.failed("canceled", time.monotonic() - ticket.arrived)

    def check(self, images: Images, answer: Answer) -> None:
        """Refuse an answer that no sound model gives.

        Raises:
            ParityError: NaN or infinite, to numbers as images have them.
        """
        if not all_finite(answer.logits) and float(np.abs(images).max()) <= LARGEST_PIXEL:
            raise ParityError(f"{self.spec.name}: an answer is NaN or infinite; export the model again")

    def close(self) -> None:
        """Answer what was accepted, then let the engine go. Blocks; not for the event loop."""
        self.batcher.close()
        self.batcher.join()
        self._release()

    def _kick(self) -> None:
        self._is_kicking = False
        self.batcher.kick()

    def _tick(self, loop: asyncio.AbstractEventLoop) -> None:
        if self.batcher.expire():
            loop.call_later(TICK_S, self._tick, loop)
        else:
            self._watched_by = None


def _settle(future: asyncio.Future[Answer], outcome: Outcome) -> None:
    if future.done():
        return
    if isinstance(outcome, Exception):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)


@dataclass
class Entry:
    """A name that may be served, and what is served under it."""

    name: str
    loaded: dict[str, Model] = field(default_factory=dict)  # by version
    reasons: dict[str, str] = field(default_factory=dict)  # why a version is not there, in words without paths
    state: str = ""  # LOADING, UNLOADING while it lasts
    shares: dict[str, float] = field(default_factory=dict)  # of requests that name no version; empty: all to the newest


@dataclass(frozen=True)
class Source:
    """Where a version of a model is loaded from."""

    name: str
    version: str
    load: Callable[[], Model]  # blocking; McdeployError: it cannot be served
    stamp: Callable[[], str]  # changes when there is something new to load


class Models:
    """All of them.

    Args:
        sources: what may be loaded, looked at anew at every ``load`` and ``index``.
        split: by name and version, shares of the requests that name no version.
        pick: a random number in [0, 1).
    """

    def __init__(
        self,
        sources: Callable[[], Sequence[Source]] = lambda: (),
        *,
        split: Mapping[str, Mapping[str, float]] | None = None,
        pick: Callable[[], float] = random.random,
    ) -> None:
        self._sources = sources
        self._split = {name: dict(shares) for name, shares in (split or {}).items()}
        self._pick = pick
        self._entries: dict[str, Entry] = {}
        self._stamps: dict[tuple[str, str], str] = {}
        self._statistics: dict[tuple[str, str], Statistics] = {}
        self._control = asyncio.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="load")
        self._drains = ThreadPoolExecutor(4, thread_name_prefix="drain")

    # ------------------------------------------------------------------------------------------------------- lookup

    def find(self, name: str, version: str = "") -> Model:
        """The model that answers a request.

        Raises:
            NotFoundError: no such name or version, or not loaded.
        """
        entry = self._entries.get(name)
        if entry is None:
            raise NotFoundError(f"Request for unknown model: '{name[:100]}' is not found")
        loaded = entry.loaded  # once: gRPC asks from threads of its own, while the loop may put another dict there
        if not loaded:
            raise NotFoundError(f"Request for unknown model: '{name}' has no available versions")
        if version:
            model = loaded.get(version)
            if model is None:
                raise NotFoundError(f"Request for unknown model: '{name}' version {version[:20]} is not found")
            return model
        if len(loaded) == 1:
            return next(iter(loaded.values()))
        return loaded[self._choose(loaded, entry.shares)]

    @property
    def statistics(self) -> Mapping[tuple[str, str], Statistics]:
        """By name and version, of everything that was ever served: counters that never go back."""
        return self._statistics

    def only(self) -> Model:
        """The model that is meant when a request names none.

        Raises:
            NotFoundError: none or several are served.
        """
        names = [name for name, entry in self._entries.items() if entry.loaded]
        if len(names) != 1:
            raise NotFoundError(
                "several models are served here; POST to /v2/models/{name}/predict" if names else "no model is loaded"
            )
        return self.find(names[0])

    def versions(self, name: str) -> list[str]:
        """Those that are loaded, oldest first."""
        return sorted(self._entries[name].loaded, key=int) if name in self._entries else []

    def chosen(self, name: str = "", version: str = "") -> list[Model]:
        """Those whose statistics are asked for: all of them, all versions of a name, or one.

        Raises:
            NotFoundError: no such name or version, or not loaded.
        """
        if not name:
            return list(self)
        if version:
            return [self.find(name, version)]
        self.find(name)
        loaded = self._entries[name].loaded
        return [loaded[number] for number in sorted(loaded, key=int)]

    def __iter__(self) -> Any:
        """Every loaded version of every model."""
        for _, entry in sorted(self._entries.copy().items()):
            loaded = entry.loaded
            for version in sorted(loaded, key=int):
                yield loaded[version]

    def is_ready(self) -> bool:
        """Whether any model can answer; one that is being replaced or was unloaded is told by its own readiness."""
        return any(entry.loaded for entry in self._entries.values())

    def _choose(self, loaded: Mapping[str, Model], split: Mapping[str, float]) -> str:
        shares = {version: share for version, share in split.items() if version in loaded and share > 0}
        if not shares:
            return max(loaded, key=int)
        left = self._pick() * sum(shares.values())
        for version, share in shares.items():
            left -= share
            if left < 0:
                return version
        return next(reversed(shares))

    async def infer(
        self, name: str, version: str, images: Images, timeout_s: float, first: Model | None = None
    ) -> tuple[Model, Answer]:
        """``Model.infer`` of the version that is there now: one that is being replaced hands over to the next.

        Args:
            version: as the client asked; "": any.
            first: the model that ``images`` were checked and prepared for, by an earlier ``find``. Without it a split
                would choose again, perhaps another version.

        Raises:
            UnavailableError: the next version does not take the same images.
            as ``find`` and ``Model.infer``.
        """
        model = first or self.find(name, version)
        while True:
            try:
                return model, await model.infer(images, timeout_s)
            except Closed:
                model = self.successor(model, version)

    def successor(self, before: Model, version: str) -> Model:
        """The model that takes the requests of one that was closed.

        Args:
            version: as the client asked; "": any.

        Raises:
            NotFoundError: there is none.
            UnavailableError: it does not take the same images.
        """
        model = self.find(before.spec.name, version)
        if model is before:
            raise UnavailableError("the model is being unloaded; try again")
        if model.spec.shape != before.spec.shape or model.preprocessing != before.preprocessing:
            raise UnavailableError("the model was replaced by one with other inputs; try again")
        return model

    # ------------------------------------------------------------------------------------------------------ control

    def add(self, model: Model) -> Model | None:
        """Serve a version from now on; returns the one it replaces, which the caller closes."""
        entry = self._entries.setdefault(model.spec.name, Entry(model.spec.name))
        entry.shares = self._split.get(model.spec.name, {})
        before = entry.loaded.get(model.spec.version)
        model.statistics = self._statistics.setdefault((entry.name, model.spec.version), model.statistics)
        entry.loaded = {**entry.loaded, model.spec.version: model}
        entry.reasons.pop(model.spec.version, None)
        return before

    def index(self, only_ready: bool = False) -> list[dict[str, str]]:
        """Every name and version that is known, as the repository extension lists them.

        Args:
            only_ready: leave out what does not answer.

        Raises:
            RequestError: 500; the repository cannot be read.
        """
        entries = list(self._entries.items())  # not on the loop's thread: they may change meanwhile
        known: dict[str, set[str]] = {name: set(entry.loaded) | set(entry.reasons) for name, entry in entries}
        for source in self._look():
            known.setdefault(source.name, set()).add(source.version)
        rows = []
        for name in sorted(known):
            entry = self._entries.get(name, Entry(name))
            for version in sorted(known[name], key=int):
                if version in entry.loaded:
                    rows.append({"name": name, "version": version, "state": entry.state or "READY"})
                else:
                    reason = entry.reasons.get(version, "not loaded")
                    rows.append(
                        {"name": name, "version": version, "state": entry.state or "UNAVAILABLE", "reason": reason}
                    )
        return [row for row in rows if row["state"] == "READY" or not only_ready]

    async def load(self, name: str, *, changed_only: bool = False) -> None:
        """Load all versions of a name, or load them again; the old ones answer until all the new ones have proved
        themselves, and for ever if one of them does not.

        Args:
            changed_only: leave a version alone whose files are as they were, or that a client has unloaded.

        Raises:
            RequestError: 400; the name is not known, or a version does not load. What was there before still is.
        """
        async with self._control:
            mine = [source for source in await self._in_thread(self._look) if source.name == name]
            if not mine:
                raise RequestError(f"failed to load '{name[:100]}', failed to poll from model repository")
            entry = self._entries.setdefault(name, Entry(name))
            entry.state = "LOADING" if not entry.loaded else ""
            fresh: list[tuple[Source, str, Model]] = []
            try:
                for source in mine:
                    stamp, model = await self._open(source, entry, changed_only)
                    if model is not None:
                        fresh.append((source, stamp, model))
            except BaseException:
                for _, _, model in fresh:
                    self._close_later(model)
                raise
            finally:
                entry.state = ""
            for source, stamp, model in fresh:
                before = self.add(model)
                self._stamps[name, source.version] = stamp
                logger.info("%s version %s was loaded", name, source.version)
                if before is not None:
                    self._close_later(before)
            for version in set(entry.loaded) - {source.version for source in mine}:
                self._drop(entry, version, "its files are gone")

    async def _open(self, source: Source, entry: Entry, changed_only: bool) -> tuple[str, Model | None]:
        """A version that has proved itself, with the stamp of its files; None: it need not be loaded."""
        try:
            stamp = await self._in_thread(source.stamp)
            if changed_only and entry.reasons.get(source.version) == UNLOADED:
                return stamp, None
            is_there = source.version in entry.loaded
            if changed_only and is_there and self._stamps.get((source.name, source.version)) == stamp:
                return stamp, None
            return stamp, await self._in_thread(source.load)
        except Exception as error:  # also one that is our bug or the disk's: what was there must stay
            known = isinstance(error, McdeployError)
            logger.error("%s version %s was not loaded: %s", source.name, source.version, error, exc_info=not known)
        # One that is loaded keeps its place; its reason is asked for only when it has none.
        entry.reasons[source.version] = "failed its checks; see the server's log"
        still = "; what was there before still answers" if entry.loaded else ""
        raise RequestError(f"failed to load '{source.name}', version {source.version} did not pass its checks{still}")

    async def unload(self, name: str) -> None:
        """Take a name out of service; what was accepted is still answered. An unknown name is none, as in Triton."""
        async with self._control:
            self._drop_all(name, UNLOADED)

    async def reload(self) -> None:
        """Load what has changed or is new, by name, and drop what is gone; what a client has unloaded stays unloaded.
        A failure is logged, and the old versions stay."""
        try:
            names = {source.name for source in await self._in_thread(self._look)}
        except RequestError:  # is in the log
            return
        for name in sorted(names):
            try:
                await self.load(name, changed_only=True)
            except RequestError as error:
                logger.error("%s", error)
        async with self._control:
            for name in set(self._entries) - names:
                self._drop_all(name, "its files are gone")
        logger.info("reloaded what has changed")

    def _look(self) -> list[Source]:
        """What may be loaded now. Blocks.

        Raises:
            RequestError: 500; the repository cannot be read, which says nothing about the models that are loaded.
        """
        try:
            return list(self._sources())
        except (McdeployError, OSError) as error:
            logger.error("the repository cannot be read: %s", error)
            raise RequestError("the model repository cannot be read", 500) from None

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def load_first(self, source: Source) -> Model:
        """Load and serve a version before there is a loop. Blocks.

        Raises:
            BundleError, BackendError, ParityError, InputError: it cannot be served.
        """
        stamp = source.stamp()  # before: what changes meanwhile is loaded again
        model = source.load()
        self.add(model)
        self._stamps[source.name, source.version] = stamp
        return model

    def close(self) -> None:
        """Stop all models, answering what they accepted. Blocks."""
        for model in self:
            model.batcher.close()
        for model in self:
            model.close()
        self._thread.shutdown(cancel_futures=True)
        self._drains.shutdown()

    def _drop_all(self, name: str, reason: str) -> None:
        entry = self._entries.get(name)
        for version in list(entry.loaded) if entry else []:
            assert entry is not None
            self._drop(entry, version, reason)

    def _drop(self, entry: Entry, version: str, reason: str) -> None:
        model = entry.loaded[version]
        entry.loaded = {key: value for key, value in entry.loaded.items() if key != version}
        entry.reasons[version] = reason
        self._stamps.pop((entry.name, version), None)
        logger.info("%s version %s was taken out of service", entry.name, version)
        self._close_later(model)

    def _close_later(self, model: Model) -> None:
        self._drains.submit(model.close)


__all__ = ["Closed", "Model", "Models", "OverloadedError", "Ran", "Source"]
