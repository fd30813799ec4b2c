"""Dynamic batching: requests are gathered while the engine is busy, and leave together when it is free.

No fixed wait: an idle engine takes a request at once, so at low load a request is run alone and at high load batches
grow by themselves to what has arrived during one inference.

A request is WAITING in the queue, then TAKEN by a worker, then DONE; every step is made under one lock.

Invariants, each held by a property test (tests/test_batcher.py):

1.  Once and only once: a request that was accepted is delivered exactly one outcome: its answer or one error.
2.  Its own: the rows a request gets are those computed from its images, in their order.
3.  In order: batches are made of the requests that wait longest; nobody is overtaken.
4.  Bounded batch: a batch holds at most ``max_batch`` images, unless it is one request that alone holds more.
5.  Bounded queue: at most ``max_queue`` requests wait; one more is refused at once, without waiting.
6.  No idling: with ``max_delay_s`` = 0, a free worker and a waiting request do not exist at the same time, but between
    a ``submit`` that announces a ``kick`` and that kick, and while ``kick`` or ``now`` runs: no worker is free then.
7.  In time: a request whose deadline has passed is delivered DeadlineError by the next ``expire``, and is not run.
8.  Alone in error: when a batch fails, its requests are run one by one, so that only the guilty one gets the error.
9.  Cancelled is gone: a cancelled request is delivered nothing, and is never run if it was still waiting.
10. Closing loses nothing: what was accepted before ``close`` is answered; afterwards ``submit`` raises Closed.
11. Now is alone: ``now`` runs only while nothing else runs or waits; what comes meanwhile waits its turn, as ``join``
    does and so the engine's end.

No asyncio and no model in here. The answers are views of what ``infer`` returned, which it must not write to again.
``deliver`` is called in a worker's thread (or in the caller's of ``expire``), outside
the lock, and must be quick and not raise.
"""

# B = batch, C = channels, H/W = height/width, N = classes.
from __future__ import annotations

import logging
import threading
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Sequence
from enum import Enum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mcruntime.server.errors import DeadlineError, OverloadedError

Images = NDArray[np.float32]
Logits = NDArray[np.float32]
logger = logging.getLogger("mcruntime.server")
QUICK_S = 0.003  # an event loop may be held up for that long
MAX_QUEUED_BYTES = 512 << 20  # of images that wait, all requests of a model together


class Closed(Exception):
    """The batcher takes no more requests."""


class Answer(NamedTuple):
    """What a request gets, with the times of its way in seconds."""

    logits: Logits  # [B, N]; B as the request's
    queue_s: float  # from submit until a worker took it
    compute_s: float  # of the whole batch
    batch: int  # images in that batch, without filling
    ended: float = 0.0  # the inference, on time.monotonic's clock


Outcome = Answer | Exception


class State(Enum):
    WAITING = "waiting"
    TAKEN = "taken"
    DONE = "done"


class Ticket:
    """One accepted request."""

    __slots__ = ("arrived", "deadline", "deliver", "images", "state")

    def __init__(self, images: Images, deliver: Callable[[Outcome], None], deadline: float) -> None:
        self.images = images
        self.deliver = deliver
        self.deadline = deadline
        self.arrived = time.monotonic()
        self.state = State.WAITING


class Ran(NamedTuple):
    """One inference, for the statistics; times in seconds."""

    images: int  # without filling
    queue_s: Sequence[float]  # of every request that gets its answer; others expired or were cancelled meanwhile
    input_s: float  # putting the batch together
    compute_s: float
    output_s: float  # taking the answers apart
    failed: bool


class Batcher:
    """The queue of one model and the threads that run it.

    Args:
        infer: logits [B, N] of images [B, C, H, W]; called from ``workers`` threads.
        max_batch: images put together for one inference.
        max_queue: requests that may wait while all workers are busy.
        max_delay_s: how long a free worker waits for a fuller batch, counted from the oldest request's arrival.
        buckets: sizes that are run; a batch in between is filled up with copies of its last image. Empty: any size.
        workers: inferences at the same time.
        on_run: told of every inference, in the worker's thread.
    """

    def __init__(
        self,
        infer: Callable[[Images], Logits],
        *,
        max_batch: int = 32,
        max_queue: int = 256,
        max_delay_s: float = 0.0,
        buckets: Sequence[int] = (),
        workers: int = 1,
        on_run: Callable[[Ran], None] = lambda ran: None,
    ) -> None:
        self.max_batch = max_batch
        self.max_queue = max_queue
        self._infer = infer
        self.max_delay_s = max_delay_s
        self.num_workers = workers
        self._buckets = sorted(buckets)
        self._on_run = on_run
        self._queue: deque[Ticket] = deque()
        self._queued_bytes = 0
        self._running: set[Ticket] = set()
        self._idle = 0
        self._closed = False
        self._is_held = False  # a run in ``kick``'s thread counts as a worker's
        self._expected_s: dict[int, float] = {}  # of a batch of that many images
        self._local = threading.local()  # one buffer a worker
        self._changed = threading.Condition(threading.Lock())
        self._threads = [threading.Thread(target=self._work, name=f"infer-{i}", daemon=True) for i in range(workers)]
        for thread in self._threads:
            thread.start()

    @property
    def num_waiting(self) -> int:
        return len(self._queue)

    def submit(
        self,
        images: Images,
        deliver: Callable[[Outcome], None],
        deadline: float = float("inf"),
        *,
        kick_follows: bool = False,
    ) -> Ticket:
        """Accept a request.

        Args:
            images: [B, C, H, W], checked already; not to be changed until the outcome is there.
            deliver: called once with the outcome.
            deadline: on ``time.monotonic``'s clock.
            kick_follows: wake no worker; the caller will call ``kick`` in a moment, maybe for several requests.

        Raises:
            OverloadedError: ``max_queue`` requests wait already.
            Closed: after ``close``.
        """
        ticket = Ticket(images, deliver, deadline)
        with self._changed:
            if self._closed:
                raise Closed
            # An idle worker will take it at once, so it need not fit into the queue; unless a caller's thread runs.
            if len(self._queue) >= self.max_queue + (0 if self._is_held else self._idle):
                raise OverloadedError
            if self._queue and self._queued_bytes + images.nbytes > MAX_QUEUED_BYTES:
                raise OverloadedError
            self._queue.append(ticket)
            self._queued_bytes += images.nbytes
            if self._idle and not kick_follows:
                self._changed.notify()
        return ticket

    def kick(self) -> None:
        """Start what was submitted with ``kick_follows``: here and now if nothing else runs and it takes no longer than
        ``QUICK_S``, as earlier runs of that size say; else in a worker. Two changes of thread cost as much as a small
        model takes."""
        with self._changed:
            if not self._queue or not self._idle:
                return
            images = sum(len(ticket.images) for ticket in self._queue)
            is_alone = self._idle == self.num_workers and self.max_delay_s == 0 and not self._closed
            if not is_alone or self._is_held or self._expected_s.get(images, QUICK_S * 2) > QUICK_S:
                self._changed.notify(min(self._idle, len(self._queue)))
                return
            batch, late = self._take_waiting()
            self._is_held = True
        try:
            for ticket in late:
                ticket.deliver(DeadlineError())
            if batch:
                self._run(batch)
        finally:
            self._let_go()

    def now(self, images: Images) -> Answer | None:
        """The answer at once, computed in the caller's thread; None: ``submit`` the images, since there is something to
        wait for or to wait with, or since it may take longer than ``QUICK_S``. While it runs, what is submitted waits.

        Raises:
            Exception: what ``infer`` raised.
        """
        size = len(images)
        with self._changed:
            is_free = self._idle == self.num_workers and not self._queue and not self._is_held and not self._closed
            is_quick = self._expected_s.get(size, QUICK_S * 2) <= QUICK_S
            if not (is_free and is_quick) or self.max_delay_s or (self._buckets and size not in self._buckets):
                return None
            self._is_held = True
        started = time.monotonic()
        failed = True
        try:
            logits_BN = self._infer(images)
            failed = len(logits_BN) != size
            if failed:
                raise RuntimeError(f"{len(logits_BN)} answers to {size} images")
        finally:
            ended = time.monotonic()
            self._tell(Ran(size, (0.0,), 0.0, ended - started, 0.0, failed))
            self._let_go()
        self._expect(size, ended - started)
        return Answer(logits_BN, 0.0, ended - started, size, ended)

    def cancel(self, ticket: Ticket) -> bool:
        """Forget a request. False: its outcome was delivered already, or is being delivered."""
        with self._changed:
            if ticket.state is State.DONE:
                return False
            if ticket.state is State.WAITING:
                self._queue.remove(ticket)
                self._queued_bytes -= ticket.images.nbytes
            ticket.state = State.DONE
            return True

    def expire(self, now: float | None = None) -> int:
        """Deliver DeadlineError to all whose deadline has passed, waiting or running; returns how many are left."""
        now = time.monotonic() if now is None else now
        with self._changed:
            late = [ticket for ticket in (*self._queue, *self._running) if ticket.deadline <= now]
            late = [ticket for ticket in late if ticket.state is not State.DONE]
            for ticket in late:
                if ticket.state is State.WAITING:
                    self._queue.remove(ticket)
                    self._queued_bytes -= ticket.images.nbytes
                ticket.state = State.DONE
            left = len(self._queue) + len(self._running)
        for ticket in late:
            ticket.deliver(DeadlineError())
        return left

    def close(self) -> None:
        """Take no more; what was accepted is still answered. Returns at once; ``join`` waits."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def join(self, timeout_s: float | None = None) -> bool:
        """Wait until the workers are gone; False: one still runs."""
        end = None if timeout_s is None else time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(None if end is None else max(0.0, end - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _work(self) -> None:
        while True:
            batch, late, more = self._take()
            for ticket in late:
                ticket.deliver(DeadlineError())
            if batch:
                self._run(batch)
            elif not more:
                return
            del batch, late  # an idle worker holds nobody's images

    def _take(self) -> tuple[list[Ticket], list[Ticket], bool]:
        """The next batch, oldest first; those found too late on the way; False: closed, and nothing is left."""
        with self._changed:
            while True:
                wait_s: float | None = None
                if self._queue and not self._is_held:
                    wait_s = self._still_to_wait()
                    if wait_s <= 0:
                        return *self._take_waiting(), True
                elif self._closed and not self._is_held:
                    return [], [], False
                self._idle += 1
                self._changed.wait(wait_s)
                self._idle -= 1

    def _still_to_wait(self) -> float:
        if self.max_delay_s == 0 or self._closed:
            return 0.0
        if sum(len(ticket.images) for ticket in self._queue) >= self.max_batch:
            return 0.0
        return self._queue[0].arrived + self.max_delay_s - time.monotonic()

    def _take_waiting(self) -> tuple[list[Ticket], list[Ticket]]:
        now, images = time.monotonic(), 0
        batch: list[Ticket] = []
        late: list[Ticket] = []
        while self._queue and not (batch and images + len(self._queue[0].images) > self.max_batch):
            ticket = self._queue.popleft()
            self._queued_bytes -= ticket.images.nbytes
            if ticket.deadline <= now:
                ticket.state = State.DONE
                late.append(ticket)
                continue
            ticket.state = State.TAKEN
            batch.append(ticket)
            images += len(ticket.images)
        self._running.update(batch)
        return batch, late

    def _run(self, batch: list[Ticket]) -> None:
        """Run a batch and deliver. Whatever goes wrong is its requests' outcome: a worker that dies would lose all that
        wait."""
        taken = started = time.monotonic()
        sizes = [len(ticket.images) for ticket in batch]
        logits_BN: Logits | None = None
        failure: Exception | None = None
        try:
            images_BCHW = self._filled(batch, sum(sizes))
            started = time.monotonic()
            logits_BN = self._infer(images_BCHW)
            if len(logits_BN) != len(images_BCHW):
                raise RuntimeError(f"{len(logits_BN)} answers to {len(images_BCHW)} images")
        except Exception as error:
            failure = error
        ended = time.monotonic()
        if failure is None and sum(sizes) <= self.max_batch:
            self._expect(sum(sizes), ended - started)
        if failure is not None and len(batch) > 1:
            for ticket in batch:
                if ticket.state is State.TAKEN:
                    self._run([ticket])
            with self._changed:  # those that were cancelled or expired meanwhile
                self._running.difference_update(batch)
            return
        queue_s = [taken - ticket.arrived for ticket in batch]
        outcomes: list[Outcome] = []
        first = 0
        for size, waited in zip(sizes, queue_s, strict=True):
            if failure is not None or logits_BN is None:
                outcomes.append(failure or RuntimeError("no answer"))
            else:
                outcomes.append(Answer(logits_BN[first : first + size], waited, ended - started, sum(sizes), ended))
            first += size
        answered = self._finish(batch, outcomes)
        waits = [taken - ticket.arrived for ticket, _ in answered]
        output_s = time.monotonic() - ended
        # Before anyone is answered: who then asks for the statistics finds itself in them.
        self._tell(Ran(sum(sizes), waits, started - taken, ended - started, output_s, failure is not None))
        for ticket, outcome in answered:
            ticket.deliver(outcome)

    def _let_go(self) -> None:
        """The caller's thread is done; workers may take again."""
        with self._changed:
            self._is_held = False
            if self._queue or self._closed:
                self._changed.notify_all()

    def _expect(self, images: int, seconds: float) -> None:
        before = self._expected_s.get(images, seconds)
        self._expected_s[images] = before + (seconds - before) / 4

    def _tell(self, ran: Ran) -> None:
        try:
            self._on_run(ran)
        except Exception:
            logger.exception("an inference was not counted")

    def _filled(self, batch: list[Ticket], images: int) -> Images:
        """One array for the batch: the request's own if it is alone and of a size that is run, else this worker's
        buffer."""
        place = bisect_left(self._buckets, images)
        size = self._buckets[place] if place < len(self._buckets) else images
        if len(batch) == 1 and size == images:
            return batch[0].images
        buffer: Images | None = getattr(self._local, "buffer", None)
        if buffer is None or size > len(buffer):
            largest = max([size, self.max_batch, *self._buckets])
            self._local.buffer = buffer = np.empty((largest, *batch[0].images.shape[1:]), np.float32)
        first = 0
        for ticket in batch:
            buffer[first : first + len(ticket.images)] = ticket.images
            first += len(ticket.images)
        buffer[first:size] = buffer[first - 1]
        return buffer[:size]

    def _finish(self, batch: list[Ticket], outcomes: list[Outcome]) -> list[tuple[Ticket, Outcome]]:
        """Those that are still to be told: who expired or was cancelled meanwhile has its outcome."""
        with self._changed:
            self._running.difference_update(batch)
            open_ones = [
                (ticket, outcome)
                for ticket, outcome in zip(batch, outcomes, strict=True)
                if ticket.state is State.TAKEN
            ]
            for ticket, _ in open_ones:
                ticket.state = State.DONE
        return open_ones
