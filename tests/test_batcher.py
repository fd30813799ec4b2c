"""The batcher keeps its invariants: against a reference model in random schedules, under threads, and one by one."""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass, field
from itertools import count

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from live_server import until
from mcruntime.server.batcher import Answer, Batcher, Closed
from mcruntime.server.errors import DeadlineError, OverloadedError

POISON = 0.5  # added to the number of a request whose images no batch survives
LATER = time.monotonic() + 1e6  # deadlines are set around it, and expire() is told a time: no test waits for a clock


class BadImage(Exception):
    pass


class Engine:
    """Answers when it is let go; knows what it was given."""

    def __init__(self, free_running=False):
        self.lock = threading.Lock()
        self.at_gate: list[tuple[tuple[float, ...], threading.Event]] = []
        self.seen: list[tuple[float, ...]] = []
        self.free_running = free_running
        self.most_at_once = 0

    def infer(self, images):
        rows, gate = tuple(float(value) for value in images[:, 0, 0, 0]), threading.Event()
        with self.lock:
            self.seen.append(rows)
            if not self.free_running:
                self.at_gate.append((rows, gate))
        if not self.free_running:
            assert gate.wait(30)
        if any(row % 1 == POISON for row in rows):
            raise BadImage
        return answer_to(images)

    def let_go(self, place=0):
        """The batch that may go on."""
        until(lambda: len(self.at_gate) > place)
        with self.lock:
            rows, gate = self.at_gate.pop(place)
        gate.set()
        return rows

    def open(self):
        with self.lock:
            self.free_running = True
            gates, self.at_gate = self.at_gate, []
        for _, gate in gates:
            gate.set()


def answer_to(images):
    return images.reshape(len(images), -1)[:, :2] * np.float32(2)


def images_of(number, size=1, poison=False):
    """``size`` images that say whose they are, and which."""
    images = np.zeros((size, 1, 1, 2), np.float32)
    images[:, 0, 0, 0] = number + (POISON if poison else 0)
    images[:, 0, 0, 1] = np.arange(size)
    return images


class Client:
    """One request and all that was delivered for it."""

    def __init__(self, batcher, number, size=1, poison=False, deadline=float("inf"), **options):
        self.images, self.outcomes = images_of(number, size, poison), []
        self.row = float(self.images[0, 0, 0, 0])
        self.done = threading.Event()
        self.ticket = batcher.submit(self.images, self.deliver, deadline, **options)

    def deliver(self, outcome):
        self.outcomes.append(outcome)
        self.done.set()

    def outcome(self):
        assert self.done.wait(10), "nothing was delivered"
        (outcome,) = self.outcomes
        return outcome

    def check_own(self):
        answer = self.outcome()
        assert isinstance(answer, Answer)
        np.testing.assert_array_equal(answer.logits, answer_to(self.images))
        return answer


class Caller:
    """A thread that calls ``now``."""

    def __init__(self, batcher, images):
        self.images, self.rows = images, tuple(float(value) for value in images[:, 0, 0, 0])
        self.found = []
        self.thread = threading.Thread(target=self.call, args=(batcher,), daemon=True)
        self.thread.start()

    def call(self, batcher):
        try:
            self.found.append(batcher.now(self.images))
        except BadImage as error:
            self.found.append(error)

    def outcome(self):
        self.thread.join(10)
        (found,) = self.found
        return found

    def check_own(self):
        found = self.outcome()
        if self.rows[0] % 1 == POISON:
            assert isinstance(found, BadImage)
        else:
            assert (found.batch, found.queue_s) == (len(self.images), 0.0)
            np.testing.assert_array_equal(found.logits, answer_to(self.images))


@pytest.fixture
def make():
    """A batcher behind a gate; whatever the test left waiting is answered at its end."""
    made = []

    def one(engine=None, **options):
        engine = engine or Engine()
        batcher = Batcher(engine.infer, **options)
        made.append((engine, batcher))
        return engine, batcher

    yield one
    for engine, batcher in made:
        engine.open()
        batcher.close()
        assert batcher.join(10)


# ---------------------------------------------------------------------------------- against a model, in any schedule


@dataclass
class Expected:
    """What the model knows of a request."""

    client: Client
    size: int
    poison: bool
    deadline: float
    is_open: bool = True  # no outcome yet, and not cancelled
    wants: type | None = None  # the outcome it must have


@dataclass
class Worker:
    running: list[Expected] = field(default_factory=list)
    alone: deque = field(default_factory=deque)  # of a batch that failed, still to be run one by one


class Schedules(RuleBasedStateMachine):
    """Requests come, are cancelled and expire, batches end, in any order; the model says what must be the case."""

    @initialize(
        workers=st.integers(1, 2),
        max_batch=st.integers(1, 5),
        max_queue=st.integers(0, 5),
        buckets=st.sampled_from([(), (4,), (2, 6)]),
    )
    def start(self, workers, max_batch, max_queue, buckets):
        self.engine = Engine()
        self.runs = []
        self.max_batch, self.max_queue, self.buckets = max_batch, max_queue, sorted(buckets)
        self.batcher = Batcher(
            self.engine.infer,
            max_batch=max_batch,
            max_queue=max_queue,
            buckets=buckets,
            workers=workers,
            on_run=self.runs.append,
        )
        self.batcher._expected_s = {1: 0.0, 2: 0.0, 6: 0.0}  # known to be quick, and not learned otherwise at the gate
        self.batcher._expect = lambda images, seconds: None
        self.caller: Caller | None = None  # runs ``now``
        self.numbers = count(1)
        self.waiting: deque[Expected] = deque()
        self.workers = [Worker() for _ in range(workers)]
        self.all: list[Expected] = []
        self.settle()

    @rule(size=st.integers(1, 6), poison=st.sampled_from([False] * 4 + [True]), deadline=st.sampled_from([1, 2, 3]))
    def submit(self, size, poison, deadline):
        free = [worker for worker in self.workers if not worker.running and self.caller is None]
        try:
            client = Client(self.batcher, next(self.numbers), size, poison, LATER + deadline)
        except OverloadedError:
            assert not free, "refused although a worker was free"
            assert len(self.waiting) == self.max_queue, "refused although there was room"
            return
        assert free or len(self.waiting) < self.max_queue, "accepted although there was no room"
        request = Expected(client, size, poison, LATER + deadline)
        self.all.append(request)
        if free:
            free[0].running = [request]
        else:
            self.waiting.append(request)
        self.settle()

    @rule(size=st.integers(1, 2))
    @precondition(lambda self: any(not worker.running for worker in self.workers) and self.caller is None)
    def submit_too_late(self, size):
        """Its deadline has passed when a worker takes it."""
        client = Client(self.batcher, next(self.numbers), size, deadline=0.0)
        self.all.append(Expected(client, size, False, 0.0, is_open=False, wants=DeadlineError))
        assert isinstance(client.outcome(), DeadlineError)
        self.settle()

    @rule(size=st.integers(1, 6), poison=st.sampled_from([False] * 3 + [True]))
    def now(self, size, poison):
        """Only beside nothing else, only what is known to be quick, and only a size that is run."""
        may_run = self.caller is None and not self.waiting and not any(worker.running for worker in self.workers)
        may_run = may_run and size in (1, 2, 6) and (not self.buckets or size in self.buckets)
        caller = Caller(self.batcher, images_of(next(self.numbers), size, poison))
        if may_run:
            until(lambda: self.engine.at_gate)
            self.caller = caller
        else:
            assert caller.outcome() is None
        self.settle()

    @rule()
    @precondition(lambda self: self.caller is not None)
    def now_ends(self):
        self.engine.let_go()
        self.caller.check_own()
        self.caller = None
        for worker in self.workers:
            self.next_of(worker)
        self.settle()

    @rule(data=st.data())
    @precondition(lambda self: any(worker.running for worker in self.workers))
    def batch_ends(self, data):
        worker = data.draw(st.sampled_from([worker for worker in self.workers if worker.running]), label="worker")
        rows = self.rows_of(worker.running)
        place = [running for running, _ in self.engine.at_gate].index(rows)
        self.engine.let_go(place)
        failed = any(request.poison for request in worker.running)
        if failed and len(worker.running) > 1:
            worker.alone = deque(worker.running)
        else:
            for request in worker.running:
                if request.is_open:
                    request.is_open, request.wants = False, BadImage if failed else Answer
        self.next_of(worker)
        self.settle()

    def next_of(self, worker):
        worker.running = []
        while worker.alone and not worker.running:
            request = worker.alone.popleft()
            if request.is_open:
                worker.running = [request]
        images = 0
        while not worker.alone and self.waiting and (not images or images + self.waiting[0].size <= self.max_batch):
            if worker.running and not images:  # the last one of a batch that failed
                break
            request = self.waiting.popleft()
            worker.running.append(request)
            images += request.size

    @rule(data=st.data())
    @precondition(lambda self: any(request.is_open for request in self.all))
    def cancel(self, data):
        request = data.draw(st.sampled_from([request for request in self.all if request.is_open]), label="cancelled")
        assert self.batcher.cancel(request.client.ticket)
        request.is_open = False
        if request in self.waiting:
            self.waiting.remove(request)
        self.settle()

    @rule(data=st.data())
    @precondition(lambda self: any(not request.is_open for request in self.all))
    def cancel_what_is_over(self, data):
        request = data.draw(st.sampled_from([request for request in self.all if not request.is_open]), label="over")
        assert not self.batcher.cancel(request.client.ticket)

    @rule(after=st.sampled_from([1, 2, 3]))
    def time_passes(self, after):
        self.batcher.expire(LATER + after)
        for request in self.all:
            if request.is_open and request.deadline <= LATER + after:
                request.is_open, request.wants = False, DeadlineError
                if request in self.waiting:
                    self.waiting.remove(request)
        self.settle()

    @invariant()
    def all_is_as_expected(self):
        if not hasattr(self, "all"):
            return
        called = [] if self.caller is None else [self.caller.rows]
        assert sorted(rows for rows, _ in self.engine.at_gate) == sorted(
            called + [self.rows_of(worker.running) for worker in self.workers if worker.running]
        )
        assert self.batcher.num_waiting == len(self.waiting)
        for request in self.all:
            if request.wants is None:
                assert request.client.outcomes == []
            else:
                assert isinstance(request.client.outcome(), request.wants)
                if request.wants is Answer:
                    request.client.check_own()

    def rows_of(self, requests):
        """What the engine sees of a batch, filled up to a bucket."""
        rows = [request.client.row for request in requests for _ in range(request.size)]
        size = next((size for size in self.buckets if size >= len(rows)), len(rows))
        return tuple(rows + rows[-1:] * (size - len(rows)))

    def settle(self):
        """Until every worker is where the model says: at the gate, or waiting for work."""
        busy = sum(bool(worker.running) for worker in self.workers)
        running = busy + (self.caller is not None)
        until(lambda: len(self.engine.at_gate) == running and self.batcher._idle == len(self.workers) - busy)

    def teardown(self):
        if not hasattr(self, "batcher"):
            return
        self.batcher.close()
        with pytest.raises(Closed):
            self.batcher.submit(images_of(0), lambda outcome: None)
        assert self.batcher.now(images_of(0)) is None
        if self.caller is not None:
            assert not self.batcher.join(0.01), "the engine is in use"
        self.engine.open()
        assert self.batcher.join(10)
        if self.caller is not None:
            self.caller.check_own()
        for request in self.all:
            if request.is_open:
                assert isinstance(request.client.outcome(), BadImage if request.poison else Answer)
        assert self.batcher.expire() == 0, "something is still counted as running"
        assert not self.batcher._running


TestSchedules = Schedules.TestCase
TestSchedules.settings = settings(
    max_examples=150, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)


# ------------------------------------------------------------------------------------------------ under real threads


@pytest.mark.parametrize("kicks", [False, True])
@pytest.mark.parametrize("workers", [1, 3])
def test_under_many_threads_everyone_gets_their_own_answer_once_and_nobody_is_forgotten(workers, kicks):
    engine = Engine(free_running=True)
    batcher = Batcher(engine.infer, max_batch=5, max_queue=20, buckets=(2, 5), workers=workers)
    clients, refused, lock, numbers = [], [], threading.Lock(), count(1)

    def send(seed):
        random = np.random.default_rng(seed)
        for _ in range(150):
            number, size, poison = next(numbers), int(random.integers(1, 5)), random.random() < 0.1
            if random.random() < 0.2:
                caller = Caller(batcher, images_of(number + 10_000, size, poison))
                if caller.outcome() is not None:
                    caller.check_own()
            deadline = time.monotonic() + 0.0005 if random.random() < 0.1 else float("inf")
            try:
                client = Client(batcher, number, size, poison, deadline, kick_follows=kicks)
            except OverloadedError:
                refused.append(number)
                client = None
            if client is not None and random.random() < 0.2:
                client.cancelled = batcher.cancel(client.ticket)
            if kicks:
                batcher.kick()
            with lock:
                clients.append(client)
            if random.random() < 0.5:
                time.sleep(0.0005)
                batcher.expire()

    threads = [threading.Thread(target=send, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    batcher.close()
    assert batcher.join(20)
    batcher.expire()
    accepted = [client for client in clients if client is not None]
    assert len(accepted) + len(refused) == 6 * 150
    assert len(accepted) > 100
    for client in accepted:
        if getattr(client, "cancelled", False):
            assert client.outcomes == []
            continue
        outcome = client.outcome()
        if isinstance(outcome, Answer):
            client.check_own()
        else:
            assert isinstance(outcome, DeadlineError if client.row % 1 != POISON else DeadlineError | BadImage)


# ------------------------------------------------------------------------------------------------- one for each promise


def test_1_an_outcome_is_delivered_once_even_when_the_deadline_passes_during_the_run(make):
    engine, batcher = make()
    client = Client(batcher, 1, deadline=LATER)
    until(lambda: engine.at_gate)
    batcher.expire(LATER + 1)
    assert isinstance(client.outcome(), DeadlineError)
    engine.let_go()
    until(lambda: batcher._idle == 1)
    assert len(client.outcomes) == 1


def test_2_rows_go_to_whom_they_belong_also_from_a_filled_batch(make):
    engine, batcher = make(max_batch=8, buckets=(8,))
    first = Client(batcher, 1)
    until(lambda: engine.at_gate)
    others = [Client(batcher, number, size) for number, size in ((2, 3), (3, 1), (4, 2))]
    engine.let_go()
    assert engine.let_go() == (2, 2, 2, 3, 4, 4, 4, 4), "filled up with the last image"
    first.check_own()
    for client in others:
        assert client.check_own().batch == 6, "without the filling"


def test_3_a_small_request_does_not_overtake_a_large_one_that_does_not_fit(make):
    engine, batcher = make(max_batch=4)
    Client(batcher, 1)
    until(lambda: engine.at_gate)
    for number, size in ((2, 2), (3, 3), (4, 1)):
        Client(batcher, number, size)
    assert [engine.let_go() for _ in range(3)] == [(1,), (2, 2), (3, 3, 3, 4)]


def test_4_a_batch_is_no_larger_than_allowed_unless_one_request_is(make):
    engine, batcher = make(max_batch=3)
    Client(batcher, 1)
    until(lambda: engine.at_gate)
    big = Client(batcher, 2, 7)
    for number in (3, 4, 5, 6):
        Client(batcher, number)
    assert [engine.let_go() for _ in range(4)] == [(1,), (2,) * 7, (3, 4, 5), (6,)]
    big.check_own()


def test_5_one_more_than_the_queue_holds_is_refused_at_once(make):
    engine, batcher = make(max_queue=2)
    Client(batcher, 1)
    until(lambda: engine.at_gate)
    waiting = [Client(batcher, 2), Client(batcher, 3)]
    with pytest.raises(OverloadedError):
        Client(batcher, 4)
    assert batcher.cancel(waiting[0].ticket)
    Client(batcher, 5)  # its place is free again
    with pytest.raises(OverloadedError):
        Client(batcher, 6)


def test_5_what_waits_is_bounded_in_bytes_too(make, monkeypatch):
    monkeypatch.setattr("mcruntime.server.batcher.MAX_QUEUED_BYTES", 3 * images_of(1).nbytes)
    engine, batcher = make()
    Client(batcher, 1)
    until(lambda: engine.at_gate)
    Client(batcher, 2, 9)  # alone it may be of any size
    with pytest.raises(OverloadedError):
        Client(batcher, 3)
    engine.let_go()
    until(lambda: batcher.num_waiting == 0)
    for number in (4, 5, 6):
        Client(batcher, number)
    with pytest.raises(OverloadedError):
        Client(batcher, 7)


def test_6_an_idle_worker_takes_a_request_at_once_and_every_worker_works(make):
    engine, batcher = make(workers=3, max_batch=8)
    for number in (1, 2, 3):
        Client(batcher, number)
        until(lambda number=number: len(engine.at_gate) == number)
    assert engine.seen == [(1,), (2,), (3,)]


def test_6_with_a_delay_a_batch_leaves_when_it_is_full_or_the_delay_is_over(make):
    engine, batcher = make(max_batch=3, max_delay_s=30)
    clients = [Client(batcher, number) for number in (1, 2, 3)]
    assert engine.let_go() == (1, 2, 3)
    assert all(client.check_own().batch == 3 for client in clients)
    engine, batcher = make(max_batch=3, max_delay_s=0.01)
    Client(batcher, 4)
    assert engine.let_go() == (4,)


def test_7_what_is_too_late_is_told_so_and_not_run(make):
    engine, batcher = make()
    Client(batcher, 1)
    until(lambda: engine.at_gate)
    late, in_time = Client(batcher, 2, deadline=LATER), Client(batcher, 3, deadline=LATER + 2)
    assert batcher.expire(LATER + 1) == 2, "one that runs and one that waits are left"
    assert isinstance(late.outcome(), DeadlineError)
    engine.open()
    in_time.check_own()
    assert engine.seen == [(1,), (3,)]


def test_8_only_the_guilty_one_gets_the_error(make):
    engine, batcher = make(max_batch=8)
    Client(batcher, 1)
    until(lambda: engine.at_gate)
    good, bad, also_good = Client(batcher, 2, 2), Client(batcher, 3, poison=True), Client(batcher, 4)
    engine.open()
    good.check_own()
    also_good.check_own()
    assert isinstance(bad.outcome(), BadImage)


def test_8_who_is_cancelled_while_a_failed_batch_is_run_again_is_forgotten(make):
    engine, batcher = make(max_batch=8)
    Client(batcher, 1)
    until(lambda: engine.at_gate)
    bad, gone = Client(batcher, 2, poison=True), Client(batcher, 3, deadline=LATER)
    engine.let_go()
    engine.let_go()  # both together
    until(lambda: engine.at_gate)  # the bad one alone
    assert batcher.cancel(gone.ticket)
    engine.let_go()
    assert isinstance(bad.outcome(), BadImage)
    until(lambda: batcher._idle == 1)
    assert batcher.expire(LATER) == 0, "it is still counted as running"
    assert engine.seen == [(1,), (2.5, 3), (2.5,)]


def test_9_a_cancelled_request_is_not_run_and_hears_nothing(make):
    engine, batcher = make()
    running = Client(batcher, 1)
    until(lambda: engine.at_gate)
    waiting = Client(batcher, 2)
    assert batcher.cancel(running.ticket)
    assert batcher.cancel(waiting.ticket)
    assert not batcher.cancel(waiting.ticket), "once only"
    engine.open()
    Client(batcher, 3).check_own()
    assert running.outcomes == waiting.outcomes == []
    assert engine.seen == [(1,), (3,)]


def test_10_closing_answers_what_was_accepted_and_takes_no_more(make):
    engine, batcher = make(max_batch=2, max_delay_s=0)
    clients = [Client(batcher, number) for number in range(1, 6)]
    batcher.close()
    with pytest.raises(Closed):
        Client(batcher, 6)
    assert not batcher.join(0.01), "the engine is still at work"
    engine.open()
    assert batcher.join(10)
    for client in clients:
        client.check_own()


def test_10_closing_ends_a_delay(make):
    engine, batcher = make(max_batch=8, max_delay_s=60)
    client = Client(batcher, 1)
    batcher.close()
    engine.open()
    client.check_own()


@pytest.mark.parametrize(
    "infer",
    [lambda images: 1 / 0, lambda images: answer_to(images)[1:], lambda images: None, lambda images: np.empty(1 << 60)],
    ids=["raises", "answers too few", "answers nothing", "has no memory"],
)
def test_a_worker_survives_an_engine_that_fails(make, infer):
    engine, batcher = make()
    engine.infer, works = infer, engine.infer
    batcher._infer = lambda images: engine.infer(images)
    for number in (1, 2):
        assert isinstance(Client(batcher, number).outcome(), Exception)
    engine.infer = works
    engine.open()
    Client(batcher, 3).check_own()


def test_a_worker_survives_a_batch_that_cannot_be_put_together_and_an_observer_that_fails(make):
    told = []

    def on_run(ran):
        told.append(ran)
        raise ValueError("an observer of ours")

    engine, batcher = make(max_batch=4, on_run=on_run)
    Client(batcher, 1)
    until(lambda: engine.at_gate)
    odd = Client(batcher, 2)
    odd.ticket.images = np.zeros((1, 1, 3, 3), np.float32)  # never passes the checks; it must not take the others along
    even = Client(batcher, 3)
    engine.open()
    even.check_own()
    Client(batcher, 4).check_own()
    assert told


def test_the_times_and_sizes_of_every_run_are_told_before_its_answers(make):
    runs = []
    engine, batcher = make(max_batch=4, on_run=runs.append)
    client = Client(batcher, 1, 2)
    engine.let_go()
    client.check_own()
    (ran,) = runs
    assert (ran.images, len(ran.queue_s), ran.failed) == (2, 1, False)
    bad = Client(batcher, 2, poison=True)
    engine.let_go()
    bad.outcome()
    assert runs[1].failed


def here_or_there(make):
    """A batcher that notes which thread ran what, and is idle."""
    threads = []

    def infer(images):
        threads.append(threading.get_ident())
        return answer_to(images)

    engine = Engine()
    engine.infer, engine.open = infer, lambda: None
    batcher = make(engine)[1]
    until(lambda: batcher._idle == 1)
    return batcher, threads


def announced(batcher, number, size=1):
    outcomes = []
    batcher.submit(images_of(number, size), outcomes.append, kick_follows=True)
    return outcomes


def test_a_kick_runs_here_what_is_known_to_be_quick_and_all_that_was_announced_together(make, monkeypatch):
    batcher, threads = here_or_there(make)
    first = announced(batcher, 1, size=2)
    batcher.kick()  # nobody knows yet how long two images take
    until(lambda: first and batcher._idle == 1)
    assert threads != [threading.get_ident()]
    several = [announced(batcher, number) for number in (2, 3)]
    assert several == [[], []], "nothing runs before the kick"
    batcher.kick()
    assert threads[1:] == [threading.get_ident()]
    for number, (answer,) in zip((2, 3), several, strict=True):
        assert answer.batch == 2
        np.testing.assert_array_equal(answer.logits, answer_to(images_of(number)))
    monkeypatch.setattr("mcruntime.server.batcher.QUICK_S", 0.0)
    slow = announced(batcher, 4, size=2)
    batcher.kick()
    until(lambda: slow)
    assert threads[-1] != threading.get_ident(), "what takes longer goes to a worker"
    batcher.kick()  # of nothing


def test_a_kick_leaves_the_engine_to_the_worker_that_has_it(make):
    engine, batcher = make()
    first = Client(batcher, 1)
    until(lambda: engine.at_gate)
    batcher._expected_s[1] = 0.0
    second = announced(batcher, 2)
    batcher.kick()
    assert second == []
    engine.let_go()
    engine.let_go()
    first.check_own()
    until(lambda: second)


def test_closing_waits_for_what_a_kick_runs(make):
    engine, batcher = make()
    until(lambda: batcher._idle == 1)
    batcher._expected_s[1] = 0.0
    here = announced(batcher, 1)
    kicker = threading.Thread(target=batcher.kick)
    kicker.start()
    until(lambda: engine.at_gate)
    waiting = Client(batcher, 2)
    batcher.close()
    assert not batcher.join(0.05), "the engine is still in use"
    assert len(engine.at_gate) == 1, "one inference at a time"
    engine.let_go()
    engine.let_go()
    kicker.join(10)
    assert batcher.join(10)
    assert len(here) == 1
    waiting.check_own()


def test_two_kicks_do_not_run_the_engine_at_once(make):
    engine, batcher = make()
    until(lambda: batcher._idle == 1)
    batcher._expected_s[1] = 0.0
    outcomes = announced(batcher, 1)
    kickers = [threading.Thread(target=batcher.kick)]
    kickers[0].start()
    until(lambda: engine.at_gate)
    outcomes += announced(batcher, 2)
    kickers.append(threading.Thread(target=batcher.kick))
    kickers[1].start()
    kickers[1].join(10)
    assert len(engine.at_gate) == 1
    engine.let_go()
    kickers[0].join(10)
    engine.let_go()


def test_who_was_not_answered_is_not_counted_as_answered(make):
    told = []
    engine, batcher = make(on_run=told.append)
    clients = [Client(batcher, 1)]
    until(lambda: engine.at_gate)
    clients += [Client(batcher, number) for number in (2, 3)]
    engine.let_go()
    until(lambda: engine.at_gate)
    assert batcher.cancel(clients[1].ticket)
    engine.let_go()
    clients[2].check_own()
    assert [(run.images, len(run.queue_s)) for run in told] == [(1, 1), (2, 1)]


def test_11_now_is_counted_once_and_its_failure_is_the_callers(make):
    told = []
    engine, batcher = make(on_run=told.append)
    engine.open()
    until(lambda: batcher._idle == 1)
    assert batcher.now(images_of(1)) is None, "nobody knows yet how long it takes"
    batcher._expected_s[1] = 0.0
    answer = batcher.now(images_of(1))
    assert (answer.batch, len(answer.logits)) == (1, 1)
    with pytest.raises(BadImage):
        batcher.now(images_of(2, poison=True))
    batcher._infer = lambda images: answer_to(images)[1:]
    with pytest.raises(RuntimeError):
        batcher.now(images_of(3))
    batcher._infer = engine.infer
    assert [(ran.images, len(ran.queue_s), ran.failed) for ran in told] == [
        (1, 1, False), (1, 1, True), (1, 1, True),
    ]  # fmt: skip
    Client(batcher, 4).check_own()


def test_11_while_now_runs_the_queue_holds_no_more_than_it_may(make):
    engine, batcher = make(max_queue=1)
    until(lambda: batcher._idle == 1)
    batcher._expected_s[1] = 0.0
    caller = Caller(batcher, images_of(1))
    until(lambda: engine.at_gate)
    waits = Client(batcher, 2)
    with pytest.raises(OverloadedError):
        Client(batcher, 3)
    batcher.close()
    assert not batcher.join(0.05), "the engine is in use"
    assert len(engine.at_gate) == 1
    engine.open()
    caller.check_own()
    waits.check_own()
    assert batcher.join(10)


def test_11_now_does_not_overtake_what_was_announced(make):
    batcher, _ = here_or_there(make)
    batcher._expected_s[1] = 0.0
    first = announced(batcher, 1)
    assert batcher.now(images_of(2)) is None
    batcher.kick()
    assert len(first) == 1
    assert batcher.now(images_of(2)) is not None
