"""What a worker says of itself; routing decides from these records alone."""

from pydantic import Field

from omnirt_tasks.contract.base import Answer
from omnirt_tasks.contract.request import Task
from omnirt_tasks.contract.result import ExecutionMode


class ChunkMeasure(Answer):
    """What sharing a device call brings here, as measured: for one module of a model, at one `shape` ("512x512 fp16").

    `step_ms` is the median time of a call by its number of rows (a picture is a row, or two with guidance), `limit` the
    most rows that are put into one call (another member would bring less than 5 %), `gain` how much more is done per
    second at the limit than with the smallest calls, and `fill` how much of the limit the newest calls used (null until
    there are some).
    """

    module: str
    shape: str
    limit: int
    gain: float
    fill: float | None = None
    step_ms: dict[str, float] = Field(default_factory=dict)


class ModelAbility(Answer):
    """What a worker can do with one of its models.

    `limits` has the largest value of each number that it takes, by task and field; `options` are the names of all that
    it takes, over all tasks; empty where it is not told. `weights_bytes` is what the weights take in each dtype that
    the device computes in, by dtype; empty where it is not known. From `working_bytes_per_pixel` to `tile_px` is what a
    run takes beside them, as the model's spec has it. `chunk_classes` name the classes of modules
    whose calls jobs share, once the model was loaded; `unchunked` says why its denoiser runs alone, where it does, and
    `chunks` what sharing brought. `seconds_per_unit` is the time of a unit of work as measured here (a megapixel
    denoised by one step; a second of audio), None until something ran.
    """

    tasks: tuple[Task, ...]
    execution_mode: ExecutionMode
    dtypes: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    limits: dict[str, dict[str, float]] = Field(default_factory=dict)
    weights_bytes: dict[str, int] = Field(default_factory=dict)
    working_bytes_per_pixel: int = 0
    working_bytes_per_film_pixel: int | None = None
    working_bytes_per_frame_pixel: int = 0
    working_dtype: str | None = None
    tile_px: int | None = None
    chunk_classes: tuple[str, ...] = ()
    unchunked: str | None = None
    chunks: tuple[ChunkMeasure, ...] = ()
    seconds_per_unit: float | None = None


class WorkerCapability(Answer):
    """One worker's capability record, renewed with every heartbeat.

    `queues` are full queue names, `models` the ids it can run, `loaded` those in device memory now;
    `memory_bytes` is the device's, `memory_budget_bytes` what models and runs may take of it together, `concurrency`
    the most jobs it holds at once. `features` are what the backend can do beside its dtypes ("compile"), `ranks_max` is
    the most ranks that a group of processes may have on the device, `abilities` is what each model can do, by id.
    """

    worker_id: str
    backend: str
    device: str
    device_name: str = ""
    memory_bytes: int | None = None
    memory_budget_bytes: int | None = None
    queues: tuple[str, ...]
    models: tuple[str, ...] = ()
    loaded: tuple[str, ...] = ()
    concurrency: int = 1
    running: int = 0
    tags: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = Field(default=())
    features: tuple[str, ...] = ()
    ranks_max: int = 1
    abilities: dict[str, ModelAbility] = Field(default_factory=dict)
    pid: int = 0
    host: str = ""
    started_at_ms: int = 0
