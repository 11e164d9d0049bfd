"""Live events from Redis, over one subscriber connection per process.

    watchers ──subscribe──► topics ──(control channel)──► the feed's thread ──► PubSub
       ▲                                                        │
       └────────────── mailboxes ◄──────────────────────────────┘

The thread alone touches the PubSub object. Another thread that wants a channel notes it as a topic, wakes the feed's
thread through a channel of this process alone, and waits until Redis has confirmed the subscription.
"""

import logging
from collections import Counter
from collections.abc import Callable
from threading import Event as Signal
from threading import Lock, Thread
from time import monotonic
from typing import Any
from uuid import uuid4

import redis

from omnirt_tasks.contract import Event
from omnirt_tasks.errors import StoreUnavailable
from omnirt_tasks.jobs.connection import reaching_store, subscriber_of
from omnirt_tasks.jobs.mailbox import Mailbox

log = logging.getLogger(__name__)

SUBSCRIBE_TIMEOUT_S = 5.0
SILENCE_S = 5.0
"""After this long without a word the server is pinged; after twice as long the connection counts as lost."""
LOOK_EVERY_S = 1.0
"""How often the thread looks by itself for channels that nobody wants any more."""
BACKOFF_S = (0.05, 0.1, 0.2, 0.5, 1.0)


class _Topic:
    """One channel that somebody in this process wants."""

    def __init__(self) -> None:
        self.confirmed = Signal()
        self.confirmed_before = False
        self.mailboxes: list[Mailbox] = []
        self.callbacks: list[Callable[[str], None]] = []

    def deliver(self, text: str) -> None:
        if self.mailboxes:
            event = Event.model_validate_json(text)
            for mailbox in tuple(self.mailboxes):
                mailbox.offer(event)
        for callback in tuple(self.callbacks):
            callback(text)

    def confirm(self) -> None:
        """Redis sends the channel from here on. If it did so before, what came in between is lost."""
        self.confirmed.set()
        if self.confirmed_before:
            self.miss()
        self.confirmed_before = True

    def miss(self) -> None:
        for mailbox in tuple(self.mailboxes):
            mailbox.miss()


class RedisFeed:
    """EventFeed in Redis. Its thread starts with the first subscription, so it may be made before a fork."""

    def __init__(self, client: redis.Redis, *, prefix: str) -> None:
        self._client = client
        self._subscriber: Any = subscriber_of(client)
        self._prefix = prefix
        self._control = f"{prefix}:control:{uuid4().hex}"
        self._lock = Lock()
        self._topics: dict[str, _Topic] = {}
        self._thread: Thread | None = None
        self._closing = Signal()

    def subscribe(self, job_id: str) -> Mailbox:
        """See EventFeed."""
        channel = f"{self._prefix}:events:{job_id}"
        mailbox = Mailbox(lambda closed: self._leave(channel, closed))
        self._join(channel, lambda topic: topic.mailboxes.append(mailbox), mailbox.close)
        return mailbox

    def on_cancel(self, callback: Callable[[str], None]) -> None:
        """See EventFeed."""
        channel = f"{self._prefix}:cancel"
        self._join(
            channel,
            lambda topic: topic.callbacks.append(callback),
            lambda: self._leave(channel, callback),
        )

    def close(self) -> None:
        """See EventFeed."""
        self._closing.set()
        with self._lock:
            thread, topics = self._thread, tuple(self._topics.values())
        for topic in topics:
            for mailbox in tuple(topic.mailboxes):
                mailbox.cut_off()
        if thread is not None and thread.is_alive():
            try:
                self._wake()
            except StoreUnavailable:
                log.debug("the feed's thread ends by itself: the store is away")
            thread.join(2 * SUBSCRIBE_TIMEOUT_S)

    def _join(self, channel: str, enter: Callable[[_Topic], None], undo: Callable[[], None]) -> None:
        """Enter a topic and return once Redis has confirmed its channel; on failure `undo` it."""
        if self._closing.is_set():
            raise StoreUnavailable("This process is closing its event feed.", "Watch the job again.")
        with self._lock:
            topic = self._topics.setdefault(channel, _Topic())
            enter(topic)
            if self._thread is None or not self._thread.is_alive():
                self._thread = Thread(target=self._run, name="omnirt-feed", daemon=True)
                self._thread.start()
        try:
            if not topic.confirmed.is_set():
                self._wake()
                if not topic.confirmed.wait(SUBSCRIBE_TIMEOUT_S):
                    with reaching_store():
                        raise redis.TimeoutError(f"no confirmation of a subscription in {SUBSCRIBE_TIMEOUT_S} s")
        except StoreUnavailable:
            undo()
            raise

    def _leave(self, channel: str, receiver: Mailbox | Callable[[str], None]) -> None:
        """Leave a topic. Idempotent. The thread drops an unwanted channel when it next looks."""
        with self._lock:
            topic = self._topics.get(channel)
            if topic is None:
                return
            topic.mailboxes = [mailbox for mailbox in topic.mailboxes if mailbox is not receiver]
            topic.callbacks = [callback for callback in topic.callbacks if callback is not receiver]
            if not topic.mailboxes and not topic.callbacks:
                del self._topics[channel]

    def _wake(self) -> None:
        with reaching_store():
            self._client.publish(self._control, "")

    def _run(self) -> None:
        failures = 0
        while not self._closing.is_set():
            try:
                with self._subscriber.pubsub() as pubsub:
                    session = _Session(pubsub, self._control, self._wanted)
                    while not self._closing.is_set():
                        session.step()
                        if failures and session.live:
                            log.info("the event feed is connected again")
                            failures = 0
            except Exception as error:  # the boundary of this thread: watchers must not be left alone
                if not failures:
                    known = isinstance(error, redis.RedisError)
                    log.warning("the event feed lost its connection, and tries again: %s", error, exc_info=not known)
                for topic in self._wanted().values():
                    topic.confirmed.clear()
                self._closing.wait(BACKOFF_S[min(failures, len(BACKOFF_S) - 1)])
                failures += 1
        self._subscriber.close()

    def _wanted(self) -> dict[str, _Topic]:
        with self._lock:
            return dict(self._topics)


class _Session:
    """One connection's life: keeps the channels of Redis equal to the wanted topics, and delivers."""

    def __init__(self, pubsub: Any, control: str, wanted: Callable[[], dict[str, _Topic]]) -> None:
        self._pubsub = pubsub
        self._control = control
        self._wanted = wanted
        self._topics: dict[str, _Topic] = {}  # as they were at the last look
        self._asked: set[str] = set()  # channels for which SUBSCRIBE was the last thing sent
        self._unanswered: Counter[str] = Counter()  # SUBSCRIBEs whose confirmation is on its way
        self._heard_at = monotonic()
        self._looked_at = 0.0
        self.live = False
        self._look()

    def step(self) -> None:
        """Take one message, or wait a second for it."""
        message = self._pubsub.get_message(timeout=LOOK_EVERY_S)
        now = monotonic()
        if message is not None:
            self._heard_at = now
            self._take(message["type"], message["channel"], message["data"])
        elif now - self._heard_at > 2 * SILENCE_S:
            raise redis.TimeoutError("the subscriber connection is silent")
        elif now - self._heard_at > SILENCE_S:
            self._pubsub.ping()
        if now - self._looked_at > LOOK_EVERY_S:
            self._look()

    def _take(self, kind: str, channel: str, data: str) -> None:
        if kind == "subscribe":
            self._confirm(channel)
        elif kind == "message" and channel == self._control:
            self._look()
        elif kind == "message" and (topic := self._topics.get(channel)) is not None:
            try:
                topic.deliver(data)
            except Exception:  # a watcher's callback, or an event of a newer version: the others go on
                log.exception("a live event could not be delivered")
                topic.miss()

    def _look(self) -> None:
        """Ask Redis for the channels that are wanted now, and for no others."""
        self._looked_at = monotonic()
        self._topics = self._wanted()
        wanted = {self._control, *self._topics}
        if fresh := wanted - self._asked:
            self._pubsub.subscribe(*fresh)
            self._unanswered.update(fresh)
        if stale := self._asked - wanted:
            self._pubsub.unsubscribe(*stale)
        self._asked = wanted
        for channel, topic in self._topics.items():
            if not self._unanswered[channel] and not topic.confirmed.is_set():
                topic.confirm()  # it was left and entered again meanwhile

    def _confirm(self, channel: str) -> None:
        self._unanswered[channel] -= 1
        if self._unanswered[channel] > 0:
            return
        del self._unanswered[channel]
        if channel == self._control:
            self.live = True
            self._look()  # whoever tried to wake this thread before now was not heard
        elif (topic := self._topics.get(channel)) is not None:
            topic.confirm()
