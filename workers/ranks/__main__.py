"""The main of every rank: make the model, and work until rank 0 says to leave, or whoever started it is gone."""

import ctypes
import importlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence

from omnirt_tasks.contract import ErrorInfo
from omnirt_tasks.registry import RankModel, RankStart
from workers.ranks import RankArguments
from workers.ranks.circle import Circle, OutOfStep, circle_of
from workers.ranks.host import RankHost
from workers.ranks.work import device_of, explained, work
from workers.wire import Outbox, StartFailed, connect, receive, serve

log = logging.getLogger(__name__)

PR_SET_PDEATHSIG = 1
PARENT_POLL_S = 0.5
LAST_WORDS_WITHIN_S = 10.0
"""How long rank 0 has to tell of its last job; it takes a second."""


class _NoModel(Exception):
    """The model could not be made, in one rank at least."""

    def __init__(self, failure: ErrorInfo) -> None:
        super().__init__(failure.message)
        self.failure = failure


def main(words: Sequence[str]) -> int:
    """Work to the end; the exit status."""
    _end_with_parent()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    *arguments, address = words
    asked = RankArguments.of_words(arguments)
    circle = circle_of(asked.device)
    try:
        if circle.rank == 0:
            _lead(asked, circle, address)
        else:
            work(_model(asked, circle), circle, None)
    except (OutOfStep, _NoModel) as error:
        log.error("rank %s: the group ends: %s", circle.rank, error)  # noqa: TRY400 - its cause was told
        return 1
    circle.leave()
    return 0


def _lead(asked: RankArguments, circle: Circle, address: str) -> None:
    """Rank 0: as the others, and spoken to by the executor meanwhile."""
    connection = connect(address)
    receive(connection)  # it begins the conversation; all that there is to say stands on the command line
    try:
        model = _model(asked, circle)
    except _NoModel as error:
        outbox = Outbox(connection, "rank-outbox")
        outbox.put(StartFailed(error.failure, configuration=False))
        outbox.close()
        raise
    host = RankHost(asked.device, asked.dtype)
    serving = threading.Thread(
        target=serve, args=(host, connection), kwargs={"pid": os.getpid()}, name="rank-serving", daemon=True
    )
    serving.start()
    try:
        work(model, circle, host)
    finally:
        host.left()
        serving.join(LAST_WORDS_WITHIN_S)


def _model(asked: RankArguments, circle: Circle) -> RankModel:
    """This rank's model, once every rank has its own. Raises _NoModel with the first failure, in every rank."""
    failure: ErrorInfo | None = None
    try:
        module, _, name = asked.entry.partition(":")
        made: type[RankModel] = getattr(importlib.import_module(module), name)
        device = device_of(asked.device, circle.rank)
        model = made(RankStart(asked.folder, device, asked.dtype, circle.rank, circle.ranks))
    except Exception as error:
        log.exception("rank %s: the model could not be made", circle.rank)
        failure = explained(error)
    try:
        failure = circle.settle(failure)
    except OutOfStep:
        if failure is None:
            raise
    if failure is not None:
        raise _NoModel(failure)
    return model


def _end_with_parent() -> None:
    """See that this process dies with the one that started it.

    A launcher puts its ranks into sessions of their own, where the guard's signal to its group does not reach them.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        threading.Thread(target=_watch, args=(os.getppid(),), name="rank-parent", daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(PARENT_POLL_S)
    os._exit(1)


if __name__ == "__main__":
    status = main(sys.argv[1:])
    logging.shutdown()
    sys.stderr.flush()
    os._exit(status)  # the libraries' own endings take seconds, and nothing is left to save
