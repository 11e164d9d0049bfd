"""How long an event takes from the worker's write to an SSE client."""

import time
from collections.abc import Iterator
from threading import Event as Signal
from threading import Thread

from omnirt_tasks import requests
from omnirt_tasks.bench.figures import SPREAD_COLUMNS, Table, spread_ms
from omnirt_tasks.bench.running import running_system
from omnirt_tasks.client import Client
from omnirt_tasks.contract import ErrorInfo, EventName
from omnirt_tasks.jobs.connection import connect
from omnirt_tasks.jobs.redis import RedisJobStore
from omnirt_tasks.jobs.values import Claim, EventDraft, Failed

PAUSE_S = 0.005
LEASE_MS = 600_000


def measure(events: int) -> Iterator[int | Table]:
    """Write `events` events one by one and time each at a client; yields how many are done, then the table."""
    written: dict[int, float] = {}
    seen: dict[int, float] = {}
    connected = Signal()
    with running_system(["cpu-stub-stub"]) as (system, settings), Client(system.url) as client:
        redis = connect(settings.redis_url)
        store = RedisJobStore(redis, prefix=settings.key_prefix, job_ttl_s=settings.job_ttl_s)
        # Nobody serves the tag, so the job waits for this bench to be its worker.
        job = client.submit(requests.text2image(model="stub", prompt="a").model_copy(update={"tags": ["bench"]}))
        claim = store.claim(job.id, worker_id="bench", lease_ttl_ms=LEASE_MS)
        assert isinstance(claim, Claim)

        def follow() -> None:
            for event in client.events(job.id):
                if event.event is EventName.JOB_STARTED:
                    connected.set()
                if event.event is EventName.STAGE_PROGRESS and isinstance(step := event.data["step"], int):
                    seen[step] = time.perf_counter()

        watcher = Thread(target=follow, name="bench-watcher")
        watcher.start()
        connected.wait()
        for step in range(1, events + 1):
            draft = EventDraft(EventName.STAGE_PROGRESS, "denoise", {"step": step, "total": events})
            written[step] = time.perf_counter()
            store.append(claim.lease, [draft])
            time.sleep(PAUSE_S)
            yield step
        store.commit(claim.lease, Failed(ErrorInfo(code="internal", message="The bench is over.")))
        watcher.join()
        redis.close()
    yield Table(
        title="Publish to SSE client",
        columns=SPREAD_COLUMNS,
        rows=(spread_ms("store.append called to event parsed by the client", [seen[i] - written[i] for i in seen]),),
        note=f"{len(seen)} of {events} events, one every {PAUSE_S * 1000:.0f} ms, gateway and broker on the same host.",
    )
