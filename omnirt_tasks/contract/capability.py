"""What a worker says of itself; routing decides from these records alone."""

from pydantic import Field

from omnirt_tasks.contract.base import Answer


class WorkerCapability(Answer):
    """One worker's capability record, renewed with every heartbeat.

    `queues` are full queue names, `models` the ids it can run, `loaded` those in device memory now;
    `memory_bytes` is the device's, `concurrency` the most jobs it holds at once.
    """

    worker_id: str
    backend: str
    device: str
    device_name: str = ""
    memory_bytes: int | None = None
    queues: tuple[str, ...]
    models: tuple[str, ...] = ()
    loaded: tuple[str, ...] = ()
    concurrency: int = 1
    running: int = 0
    tags: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = Field(default=())
    pid: int = 0
    host: str = ""
    started_at_ms: int = 0
