"""The child of the `process` placement: `python -m workers.device_child ADDRESS`. It alone holds torch and the device.

It serves a ThreadHost to the process that started it, and ends when that one says so or is gone.
"""

import contextlib
import faulthandler
import logging
import os
import sys
from pathlib import Path

from omnirt_tasks.errors import Internal, OmnirtError
from omnirt_tasks.observability import logs
from omnirt_tasks.settings import load_settings
from workers.thread_host import ThreadHost
from workers.wire import ChildStart, Outbox, StartFailed, connect, receive, serve

logger = logging.getLogger(__name__)

# Where memory runs out, the kernel is to end this process rather than the one that can start it anew.
OOM_SCORE = "500"


def main(address: str) -> int:
    """Serve until told to close; the exit status."""
    faulthandler.enable(file=2)
    with contextlib.suppress(OSError):  # not Linux, or not allowed
        Path("/proc/self/oom_score_adj").write_text(OOM_SCORE, encoding="ascii")
    connection = connect(address)
    start = receive(connection)
    assert isinstance(start, ChildStart)
    logs.configure(load_settings(log_level=start.log_level, log_json=start.log_json))
    try:
        host = ThreadHost.from_config(start.config)
        host.warm_up()
    except Exception as error:
        known = error if isinstance(error, OmnirtError) else Internal(f"The device could not be taken: {error!r}")
        logger.exception("The device could not be taken.")
        outbox = Outbox(connection, "wire-outbox")
        outbox.put(StartFailed(known.info(), configuration=isinstance(error, OmnirtError)))
        outbox.close()
        return 1
    serve(host, connection, pid=os.getpid())
    return 0


if __name__ == "__main__":
    status = main(sys.argv[1])
    logging.shutdown()
    sys.stderr.flush()
    os._exit(status)  # the libraries' own endings take seconds, and nothing is left to save
