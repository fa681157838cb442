"""The engine: one thread owns the device, and conversations take turns on it.

A turn is a chunk of a prompt or a round; between any two of them a conversation may come, leave,
be given up or cut off, and its caches are whole. Nothing here knows of HTTP.

Notable:
- While several take part, each turn ends with the device idle, so that its seconds are its own:
  for the shares, and for what `auto` learns.
- A conversation is let in when the bound of the caches has room for the most it may come to hold
  (`mlx_drift.serve.footprint`); until then it waits in the queue, in the order of coming.
- One that shares a prefix with a prompt being read waits until that is read, then forks it.
"""

import logging
import queue
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

import mlx.core as mx
from mlx_lm.generate import wired_limit

from mlx_drift.errors import DriftError
from mlx_drift.serve.conversation import Conversation, Sink, Ticket
from mlx_drift.serve.metrics import Metrics
from mlx_drift.serve.model import LoadedModel
from mlx_drift.serve.request import Busy, Ended, Event, Failed, Request
from mlx_drift.serve.store import Store, as_tokens, common
from mlx_drift.serve.turns import Turns

log = logging.getLogger(__name__)

T = TypeVar("T")

IDLE = 0.5
"""Seconds after which the thread looks around though nobody called."""

WORTH_WAITING = 16
"""Tokens of a common prefix for which to wait until another has read them."""

READING_COSTS = 1.5
"""What a second of reading a prompt counts while answers are under way, where someone watches."""


@dataclass(frozen=True)
class Limits:
    """What the engine takes on.

    Attributes:
        running: Conversations that take turns.
        waiting: Conversations that wait to be let in.
        seconds: What one may take in all.
    """

    running: int = 8
    waiting: int = 64
    seconds: float = 600.0


class Engine:
    """Runs conversations.

    Args:
        store: Where caches are kept.
        limits: What it takes on.
        metrics: What is counted.
        when_idle: Called on its thread while nothing is to be done; true if it did something.
    """

    def __init__(
        self,
        store: Store,
        limits: Limits,
        metrics: Metrics,
        when_idle: Callable[[], bool] = lambda: False,
    ):
        self.store = store
        self.limits = limits
        self.metrics = metrics
        self.when_idle = when_idle
        self._orders: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._waiting: deque[Ticket] = deque()
        self._turns: Turns[Conversation] = Turns()
        self._reserved: dict[Conversation, int] = {}
        self._ahead: dict[Conversation, tuple[Conversation, int]] = {}
        self._marks: dict[Conversation, set[int]] = {}
        self._taken_on = 0  # waiting or running; guarded, as callers ask on their own threads
        self._lock = threading.Lock()
        self._answer_seconds = 1.0
        self._closing: float | None = None
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="device", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def call(self, function: Callable[[], T]) -> "Future[T]":
        """Runs a function on the device's thread, between two turns."""
        future: Future[T] = Future()

        def order() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except BaseException as error:  # whatever it is, it is the caller's
                    future.set_exception(error)

        self._orders.put(order)
        return future

    def submit(
        self, model: LoadedModel, requests: Sequence[Request], sinks: Sequence[Sink]
    ) -> list[Ticket]:
        """Takes on requests, all or none.

        Args:
            model: Who answers.
            requests: What is asked.
            sinks: Who hears of each, on the device's thread.

        Raises:
            Busy: If the queue is full, or the engine is closing.
        """
        with self._lock:
            most = self.limits.running + self.limits.waiting
            if self._closing is not None:
                raise Busy("the server is shutting down", 30, is_closing=True)
            if self._taken_on + len(requests) > most:
                seconds = self._answer_seconds * self._taken_on / self.limits.running
                raise Busy(
                    f"{self._taken_on} requests are being answered or waiting, and no more than "
                    f"{most} are taken on; try again later",
                    max(1, min(600, round(seconds))),
                )
            deadline = time.monotonic() + self.limits.seconds
            tickets = [
                Ticket(request, sink, model, deadline)
                for request, sink in zip(requests, sinks, strict=True)
            ]
            self._taken_on += len(requests)
            self._orders.put(lambda: self._waiting.extend(tickets))
        return tickets

    def cancel(self, tickets: Sequence[Ticket]) -> None:
        """Lets the callers of tickets leave."""
        for ticket in tickets:
            ticket.cancelled = True
        self._orders.put(lambda: None)  # wakes the thread

    def close(self, seconds: float) -> None:
        """Takes on nothing more; answers under way are cut off after some seconds."""
        with self._lock:
            self._closing = time.monotonic() + seconds
        self._orders.put(lambda: None)

    def join(self, seconds: float) -> bool:
        """Waits until all that was under way has ended; tells whether it has."""
        self._orders.put(self._stop)
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def models_in_use(self) -> set[LoadedModel]:
        """Returns who answers or is to; on the device's thread."""
        return {one.model for one in (*self._turns, *self._waiting)}

    def _stop(self) -> None:
        self._stopped = True

    @property
    def is_alive(self) -> bool:
        """Whether its thread runs."""
        return self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._take_turns()
        except BaseException as error:  # a fault of this program: nobody is left waiting for it
            _log_failure("the device's thread", error)
            with self._lock:
                self._closing = time.monotonic()
            while not self._orders.empty():  # who was taken on, and not heard of yet
                self._orders.get()()
            failed = Failed("error", f"the server failed ({type(error).__name__}); restart it")
            for ticket in (*self._waiting, *(one.ticket for one in self._turns)):
                self._tell(ticket, failed)
        finally:
            mx.clear_streams()  # MLX aborts a process that ends while it does this for a thread

    def _take_turns(self) -> None:
        with wired_limit([]):  # once, for all models and conversations
            while not self._stopped or self._waiting or len(self._turns):
                self._take_orders()
                self._dismiss()
                self._let_in()
                self._follow_up()
                conversation = self._turns.next(lambda one: one.cache is not None)
                if conversation is not None:
                    self._turn(conversation)
                self._count()

    def _take_orders(self) -> None:
        """Does what callers want of the thread; waits for it while there is nothing to do."""
        is_idle = not (self._waiting or len(self._turns) or self._stopped)
        if is_idle and self._orders.empty() and self.when_idle():
            is_idle = False
        try:
            while True:
                self._orders.get(block=is_idle, timeout=IDLE)()
                is_idle = False
        except queue.Empty:
            pass

    def _dismiss(self) -> None:
        """Lets go of those that left, took too long, or are cut off by the end of all."""
        now = time.monotonic()
        is_over = self._closing is not None and now > self._closing
        for ticket in [*self._waiting]:
            if (failed := self._failed(ticket, now, self._closing is not None)) is not None:
                self._waiting.remove(ticket)
                self._tell(ticket, failed)
                self._release(ticket)
        for conversation in self._turns:
            if (failed := self._failed(conversation.ticket, now, is_over)) is not None:
                self._end(conversation, failed)

    def _failed(self, ticket: Ticket, now: float, is_over: bool) -> Failed | None:
        if ticket.cancelled:
            return Failed("cancelled", "the client left")
        if is_over:
            return Failed("shutdown", "the server is shutting down")
        if now > ticket.deadline:
            return Failed("timeout", f"the answer took longer than {self.limits.seconds:g} seconds")
        return None

    def _let_in(self) -> None:
        """Lets those in front of the queue take part, as long as there is room."""
        while self._waiting and len(self._turns) < self.limits.running:
            ticket = self._waiting[0]
            request = ticket.request
            need = ticket.model.footprint.bytes(len(request.tokens) + request.max_tokens)
            room = self.store.bound - sum(self._reserved.values()) - need
            if room < 0 and self._reserved:
                return
            self._waiting.popleft()
            conversation = Conversation(ticket, self._is_answering)
            if room < 0:
                self._tell(ticket, Failed("refused", self._too_large(need)))
                self._release(ticket)
                continue
            self._turns.add(conversation)
            self._reserved[conversation] = need
            self._marks[conversation] = set(request.marks)
            if not self._wait_for_another(conversation):
                self._begin(conversation)
            self.store.shrink(room)

    def _too_large(self, need: int) -> str:
        return (
            f"the prompt and its answer may take {need} bytes of caches, and the bound of all is "
            f"{self.store.bound}; ask for fewer max_tokens, or serve with a larger --cache-bytes"
        )

    def _is_answering(self) -> bool:
        return any(not one.is_reading for one in self._turns)

    def _others(self, conversation: Conversation) -> list[Conversation]:
        return [
            one
            for one in self._turns
            if one is not conversation and one.model is conversation.model and one.cache is not None
        ]

    def _wait_for_another(self, conversation: Conversation) -> bool:
        """Tells whether it should wait until another has read the prefix that they share."""
        tokens = as_tokens(conversation.request.tokens)
        ahead, most = None, 0
        for other in self._others(conversation):
            if other.is_reading and other.cache is not None:
                shared = common(as_tokens(other.request.tokens), tokens)
                if shared > max(most, len(other.cache.tokens)):
                    ahead, most = other, shared
        if ahead is None or most < WORTH_WAITING:
            return False
        self._ahead[conversation] = ahead, most
        self._marks[ahead].add(most)  # where they part
        return True

    def _follow_up(self) -> None:
        """Begins those for whom another has read what they share."""
        for conversation, (ahead, shared) in [*self._ahead.items()]:
            cache = ahead.cache
            if cache is None or not ahead.is_reading or len(cache.tokens) >= shared:
                del self._ahead[conversation]
                if not self._wait_for_another(conversation):
                    self._begin(conversation)

    def _begin(self, conversation: Conversation) -> None:
        """Gives a conversation its caches."""
        others = [one.cache for one in self._others(conversation) if one.cache is not None]
        model, tokens = conversation.model, conversation.request.tokens
        try:
            found = self.store.find(model, tokens, others)
            marks = self._marks[conversation]
            if found.reach < found.branch < len(tokens):
                marks.add(found.branch)  # others may part there as well
            conversation.begin(found.cache, marks)
        except Exception as error:
            self._fail(conversation, error)

    def _turn(self, conversation: Conversation) -> None:
        """Gives a conversation its turn."""
        start = time.perf_counter()
        was_reading = conversation.is_reading
        try:
            events = conversation.step()
            if len(self._turns) > 1:
                conversation.wait()
        except Exception as error:
            self._fail(conversation, error)
            return
        seconds = time.perf_counter() - start
        holds_up = was_reading and self._is_answering()
        self._turns.charge(conversation, seconds * (READING_COSTS if holds_up else 1.0))
        self.metrics.turn(conversation, was_reading, seconds)
        if was_reading and conversation.rows:
            conversation.model.note_chunk(conversation.rows, seconds)
        elif not was_reading:
            conversation.model.note_round(seconds)
        for event in events:
            if isinstance(event, Ended):
                self._end(conversation, event)
            else:
                self._tell(conversation.ticket, event)

    def _fail(self, conversation: Conversation, error: Exception) -> None:
        """Ends a conversation that cannot go on; what it was asked stays out of the log."""
        if isinstance(error, DriftError):
            self._end(conversation, Failed("refused", str(error)))
            return
        _log_failure("a conversation", error)
        conversation.cache = None  # nobody knows what is in it
        self.store.shrink(self.store.bound // 2)  # it may have been memory
        mx.clear_cache()
        self._end(conversation, Failed("error", f"the answer failed ({type(error).__name__})"))

    def _end(self, conversation: Conversation, event: Ended | Failed) -> None:
        """Ends a conversation, keeps its caches, and tells."""
        try:
            conversation.close()
        except Exception as error:  # no fault of the others
            _log_failure("the end of a conversation", error)
            conversation.cache = None
        self._turns.remove(conversation)
        self._reserved.pop(conversation, None)
        self._ahead.pop(conversation, None)
        self._marks.pop(conversation, None)
        if conversation.cache is not None:
            self.store.put(conversation.model, conversation.cache)
        self.store.shrink(self.store.bound - sum(self._reserved.values()))
        self.metrics.answer(conversation, event)
        self._count()
        self._release(conversation.ticket)
        self._tell(conversation.ticket, event)
        conversation.cache = None

    def _release(self, ticket: Ticket) -> None:
        seconds = time.monotonic() - ticket.asked_at
        self._answer_seconds = 0.9 * self._answer_seconds + 0.1 * seconds
        with self._lock:
            self._taken_on -= 1

    def _tell(self, ticket: Ticket, event: Event) -> None:
        try:
            ticket.sink(event)
        except Exception:  # whoever listened is gone
            ticket.cancelled = True

    def _count(self) -> None:
        """Notes how much there is."""
        in_use = sum(one.cache.nbytes for one in self._turns if one.cache is not None)
        self.metrics.sizes(
            running=len(self._turns),
            waiting=len(self._waiting),
            caches=self.store.nbytes + in_use,
            idle_caches=len(self.store),
            evicted=self.store.evicted,
        )


def _log_failure(what: str, error: BaseException) -> None:
    """Logs code, no values: they may be of prompts."""
    trace = "".join(traceback.format_tb(error.__traceback__))
    log.error("%s failed: %s\n%s", what, type(error).__name__, trace)
