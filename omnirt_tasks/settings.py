"""Typed settings, the only reader of the environment and of the settings file.

default < file (`OMNIRT_CONFIG`, TOML) < secrets (`OMNIRT_SECRETS_DIR`) < environment (`OMNIRT_…`) < argument.
Unknown names are refused. A secrets folder has a file for each setting (`omnirt_redis_url`), as Docker and Kubernetes
mount them, so that no password stands in an environment.
"""

import os
import tempfile
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SecretsSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from omnirt_tasks.contract import Tier
from omnirt_tasks.contract.request import TAGS_MAX, Tag
from omnirt_tasks.errors import ConfigurationError

PREFIX = "OMNIRT_"
CONFIG_VARIABLE = "OMNIRT_CONFIG"
SECRETS_VARIABLE = "OMNIRT_SECRETS_DIR"

Seconds = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


class Placement(StrEnum):
    """Where the device side of a worker lives."""

    AUTO = "auto"  # a process for every real backend, a thread for the stub
    PROCESS = "process"
    THREAD = "thread"


class Fsync(StrEnum):
    """When what a Redis has written reaches the disk, in Redis' own words (appendfsync)."""

    ALWAYS = "always"
    EVERYSEC = "everysec"
    NO = "no"


def _default_data_dir() -> Path:
    return Path.home() / ".local" / "share" / "omnirt"


def _default_run_dir() -> Path:
    return Path(tempfile.gettempdir()) / f"omnirt-{os.getuid()}"


class Settings(BaseSettings):
    """Every setting, with its unit in its name. Each is also an environment variable: OMNIRT_REDIS_URL."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="forbid", frozen=True)

    # Where things are
    redis_url: SecretStr = SecretStr("redis://127.0.0.1:6379/0")
    """Redis or Valkey (redis://, rediss://, unix://): the job store, and the broker unless `broker_url` is set."""
    broker_url: SecretStr | None = None
    """The Celery broker and result backend, where the broker is to have a Redis database of its own."""
    broker_fsync: Fsync = Fsync.ALWAYS
    """When the embedded broker's data reach the disk: before each answer, each second, or as the system likes."""
    key_prefix: str = "omnirt"
    """Begins every key and channel in Redis."""
    data_dir: Path = Field(default_factory=_default_data_dir)
    """Artifacts and uploads of a local installation; gateways and workers share it."""
    artifact_url: str | None = None
    """An fsspec URL for artifacts and uploads (`s3://bucket/path`) in place of `data_dir`."""
    run_dir: Path = Field(default_factory=_default_run_dir)
    """Locks and scratch files of this host."""
    model_folders: dict[str, Path] = Field(default_factory=dict)
    """Model id → local folder of safetensors weights. As a variable: a JSON object."""

    # The gateway
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    api_keys_file: Path | None = None
    """One key a line, `name:key`. Without it, the gateway serves loopback only."""
    allowed_origins: tuple[str, ...] = ()
    gateway_processes: Count = 1
    max_body_bytes: Count = 32 * 1024 * 1024
    max_upload_bytes: Count = 64 * 1024 * 1024
    max_image_pixels: Count = 4096 * 4096
    max_streams: Count = 2_000
    max_streams_per_key: Count = 200
    queue_limit: Count = 10_000
    """The most jobs that may wait in one queue; beyond it a submit is refused (queue_full)."""
    sync_timeout_s: Seconds = 600
    sse_keepalive_s: Seconds = 15
    allow_stub: bool = False
    """Whether jobs may name the backend cpu-stub over HTTP."""
    disabled_tiers: tuple[Tier, ...] = ()

    # A job's life
    job_ttl_s: Seconds = 7 * 24 * 3600
    """How long a finished job, its events and its artifacts are kept."""
    upload_ttl_s: Seconds = 24 * 3600
    job_timeout_s: Seconds = 3600
    """The longest one attempt may run."""
    lease_ttl_s: Seconds = 6
    deaths_max: Count = 3
    """A job whose worker or device died so often while it ran alone has failed (worker_lost), and is a dead letter."""
    retries_max: Annotated[int, Field(ge=0)] = 2
    """How often a job is tried again after an error that another attempt may not meet (storage_error, internal)."""
    retry_backoff_s: Seconds = 1
    """How long the first such retry waits; each further one waits four times as long."""
    idempotency_ttl_s: Seconds = 24 * 3600
    """How long an Idempotency-Key stands for the job that it came with."""
    promote_after_s: Seconds = 600
    """A job that has waited for so long is counted among those of the next higher priority, after those there."""
    orphan_sweep_every_s: Seconds = 3600
    """How often the storage is searched for files that belong to no attempt that counts."""
    reconcile_every_s: Seconds = 1.5
    unclaimed_after_s: Seconds = 5

    # The worker
    worker_name: str | None = None
    """The Celery node name's first part; the backend and device by default."""
    tags: Annotated[tuple[Tag, ...], Field(max_length=TAGS_MAX)] = ()
    """Routing tags of this worker, few since it serves a queue for each set of them. As a variable: a JSON list."""
    device: str | None = None
    """The device to take ("cuda:1"); by default the first free one."""
    concurrency: Count = 8
    """The most jobs a worker holds at once."""
    cpu_devices: Count = 1
    """How many workers the CPU of this host may serve."""
    torch_threads: Count | None = None
    """Threads of torch on a CPU; by default one less than the host has cores."""
    placement: Placement = Placement.AUTO
    """Where the device side lives: in a child process, in a thread of the worker, or as the backend is best served."""
    max_batch_size: Count | None = None
    """The most jobs that share a forward pass: as many as pays, as measured, by default; 1 turns sharing off."""
    batch_window_ms: Annotated[float, Field(ge=0, le=60_000)] = 0
    """How long a job waits for others to share its first forward pass with; others join later in any case."""
    pipeline_cache_size: Count = 2
    """Loaded models that a worker keeps, where its memory holds them."""
    memory_budget_bytes: Count | None = None
    """What models and runs may take of the device's memory together; by default nine tenths, shared by CPU workers."""
    warm_up: tuple[str, ...] = ()
    """Models that a worker loads before it takes jobs. As a variable: a JSON list."""
    recycle_after_jobs: Annotated[int, Field(ge=0)] = 0
    """The device's process is replaced after so many jobs, once none runs; 0 is never."""
    recycle_above_bytes: Annotated[int, Field(ge=0)] = 0
    """The device's process is replaced, once none of its jobs runs, when it holds more host memory; 0 is never."""
    stop_patience_s: Seconds = 60
    """How long a cancelled job may take to end its device call before the device's process is ended by force."""
    stall_after_s: Seconds = 5
    """A worker with room that leaves a message waiting for so long takes up its connection to the broker anew."""
    preview_every_steps: Annotated[int, Field(ge=0)] = 5
    heartbeat_s: Seconds = 2
    grace_s: Seconds = 30
    """How long a leaving worker lets its jobs finish before it gives them back."""
    metrics_port: Annotated[int, Field(ge=0, le=65535)] | None = None
    """Where a worker serves its Prometheus metrics; none by default."""
    metrics_host: str = "127.0.0.1"
    """The address that `metrics_port` listens on."""

    # The client
    url: str | None = None
    """The gateway that the `omnirt` command speaks to; None runs `omnirt generate` in this process."""
    api_key: SecretStr | None = None
    """The key that the client and the command send."""

    # What is told
    log_level: str = "INFO"
    log_json: bool = False
    otlp_endpoint: str | None = None
    """Where traces are sent (OTLP over HTTP); none by default."""

    @field_validator("tags")
    @classmethod
    def _each_once(cls, tags: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(sorted(set(tags)))

    @model_validator(mode="after")
    def _loopback_without_keys(self) -> Self:
        if self.api_keys_file is None and self.host not in {"127.0.0.1", "localhost", "::1"}:
            raise ValueError(
                f"host {self.host!r} is not loopback and there are no API keys; "
                "set OMNIRT_API_KEYS_FILE, or host 127.0.0.1"
            )
        return self

    @property
    def celery_url(self) -> str:
        """The broker's URL, with its secret."""
        return (self.broker_url or self.redis_url).get_secret_value()

    @property
    def chunk_dir(self) -> Path:
        """Where this host keeps what was measured of sharing forward passes."""
        return self.data_dir.expanduser().absolute() / "chunks"

    @property
    def storage_url(self) -> str:
        """The fsspec URL below which artifacts and uploads live."""
        return self.artifact_url or self.data_dir.expanduser().absolute().as_uri()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Argument, then environment, then secrets, then file."""
        sources: tuple[PydanticBaseSettingsSource, ...] = (init_settings, env_settings)
        if folder := os.environ.get(SECRETS_VARIABLE):
            sources += (SecretsSettingsSource(settings_cls, folder),)
        if path := os.environ.get(CONFIG_VARIABLE):
            sources += (TomlConfigSettingsSource(settings_cls, Path(path)),)
        return sources


def environment_without_settings() -> dict[str, str]:
    """This process's environment but for the project's settings: for a child that is to have its own, or none."""
    return {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}


def load_settings(**overrides: object) -> Settings:
    """The settings of this process; `overrides` win.

    Raises ConfigurationError for an unknown or wrong setting, naming each variable and what is wrong with it.
    """
    known = {PREFIX + name.upper() for name in Settings.model_fields} | {CONFIG_VARIABLE, SECRETS_VARIABLE}
    unknown = sorted(name for name in os.environ if name.startswith(PREFIX) and name not in known)
    if unknown:
        raise ConfigurationError(f"Unknown settings in the environment: {', '.join(unknown)}.", "Unset or rename them.")
    if (path := os.environ.get(CONFIG_VARIABLE)) and not Path(path).is_file():
        raise ConfigurationError(
            f"{CONFIG_VARIABLE} names {path!r}, which is no file.", "Unset it, or name a TOML file."
        )
    if (path := os.environ.get(SECRETS_VARIABLE)) and not Path(path).is_dir():
        raise ConfigurationError(
            f"{SECRETS_VARIABLE} names {path!r}, which is no folder.", "Unset it, or name a folder."
        )
    try:
        return Settings(**overrides)  # type: ignore[arg-type]  # pydantic checks every value
    except ValidationError as error:
        told = "; ".join(
            f"{PREFIX}{'.'.join(str(part) for part in problem['loc']).upper()}: {problem['msg']}"
            for problem in error.errors()
        )
        raise ConfigurationError(f"Wrong settings: {told}.", "See config/omnirt.toml for each setting.") from None
