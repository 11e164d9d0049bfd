"""Live events of a store in memory."""

from collections.abc import Callable
from threading import RLock

from omnirt_tasks.jobs.mailbox import Mailbox
from omnirt_tasks.jobs.memory import MemoryJobStore


class MemoryFeed:
    """EventFeed of a MemoryJobStore."""

    def __init__(self, store: MemoryJobStore) -> None:
        self._store = store
        self._lock = RLock()
        self._open: dict[Mailbox, str] = {}
        self._closed = False

    def subscribe(self, job_id: str) -> Mailbox:
        """See EventFeed."""
        mailbox = Mailbox(self._leave)
        with self._lock:
            self._open[mailbox] = job_id
            if self._closed:
                mailbox.cut_off()
        self._store.listen(job_id, mailbox.offer)
        return mailbox

    def on_cancel(self, callback: Callable[[str], None]) -> None:
        """See EventFeed."""
        self._store.on_cancel(callback)

    def close(self) -> None:
        """See EventFeed."""
        with self._lock:
            self._closed = True
            mailboxes = tuple(self._open)
        for mailbox in mailboxes:
            mailbox.cut_off()

    def _leave(self, mailbox: Mailbox) -> None:
        with self._lock:
            job_id = self._open.pop(mailbox, None)
        if job_id is not None:
            self._store.unlisten(job_id, mailbox.offer)
