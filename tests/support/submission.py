"""A submission with everything around it in memory, and small pictures to submit."""

import base64
import io
from pathlib import Path
from typing import Any

from PIL import Image

from omnirt_tasks.contract import (
    Artifact,
    ArtifactKind,
    ExecutionMode,
    GenerateResult,
    ModelAbility,
    RunReport,
    Task,
    WorkerCapability,
)
from omnirt_tasks.contract.capability import ChunkMeasure
from omnirt_tasks.errors import StoreUnavailable
from omnirt_tasks.jobs.fleet import MemoryFleet
from omnirt_tasks.jobs.memory import MemoryJobStore
from omnirt_tasks.jobs.values import Claim, JobQuery, Succeeded, WakeUp
from omnirt_tasks.registry import discover
from omnirt_tasks.routing import queues_served, worker_tags
from omnirt_tasks.submission import Submission, Submitted
from omnirt_tasks.uploads import UploadStorage
from omnirt_tasks.validation import Door, parse_request

GIB = 2**30
SDXL: dict[str, object] = {"task": "text2image", "model": "sdxl-base-1.0", "inputs": {"prompt": "a cat"}}
SHAPES: dict[str, object] = {"task": "text2image", "model": "shapes", "inputs": {"prompt": "a red circle"}}


class House:
    """A submission with everything around it in memory; `sent` are the messages."""

    def __init__(self, folder: Path, *, queue_limit: int = 10) -> None:
        self.sent: list[WakeUp] = []
        self.broker_away = False
        self.store = MemoryJobStore()
        self.uploads = UploadStorage(folder.as_uri(), ttl_s=60, max_bytes=1_000_000, max_pixels=1_000_000)
        self.folder = folder
        self.fleet = MemoryFleet()
        self.door = Submission(
            store=self.store,
            catalog=discover(),
            fleet=self.fleet,
            uploads=self.uploads,
            send=self.send,
            door=Door(),
            queue_limit=queue_limit,
        )

    def send(self, wake_up: WakeUp) -> None:
        if self.broker_away:
            raise StoreUnavailable("The broker is away.")
        self.sent.append(wake_up)

    def submit(self, owner: str = "anna", model: str = "shapes", **body: Any) -> str:
        request = {"task": "text2image", "model": model, "inputs": {"prompt": "a red circle"}} | body
        return self.door.submit(parse_request(request), owner=owner).record.id

    def once(self, key: str, owner: str = "anna", **body: Any) -> Submitted:
        return self.door.submit_once(parse_request(SHAPES | body), key, owner=owner)

    def edit(self, image: str, owner: str = "anna") -> str:
        inputs = {"prompt": "a cat", "image": image}
        return self.submit(owner, "sdxl-base-1.0", task="image2image", inputs=inputs)

    def enter_worker(self, backend: str, *, budget_bytes: int, seconds_per_unit: float | None = None) -> None:
        """A worker of sdxl lives: its weights take 2 GiB in fp16 and 4 GiB in fp32, and a megapixel 1 GiB in fp16."""
        ability = ModelAbility(
            tasks=(Task.TEXT2IMAGE,),
            execution_mode=ExecutionMode.LEGACY_CALL,
            weights_bytes={"fp16": 2 * GIB, "fp32": 4 * GIB},
            working_bytes_per_pixel=1024,
            seconds_per_unit=seconds_per_unit,
        )
        device = f"{backend}:0"
        record = WorkerCapability(
            worker_id=f"{device}@host",
            backend=backend,
            device=device,
            queues=queues_served([f"{backend}-sdxl"], worker_tags((), device)),
            models=("sdxl-base-1.0",),
            memory_budget_bytes=budget_bytes,
            dtypes=("fp32", "fp16") if backend == "cuda" else ("fp32",),
            abilities={"sdxl-base-1.0": ability},
        )
        self.fleet.publish(record, ttl_ms=60_000)

    def enter_shapes_worker(self, name: str, *chunks: ChunkMeasure) -> None:
        """A worker of shapes lives, which has measured these chunks."""
        ability = ModelAbility(tasks=(Task.TEXT2IMAGE,), execution_mode=ExecutionMode.LEGACY_CALL, chunks=chunks)
        record = WorkerCapability(
            worker_id=name,
            backend="cpu",
            device="cpu:0",
            queues=("cpu-shapes",),
            models=("shapes",),
            dtypes=("fp32",),
            abilities={"shapes": ability},
        )
        self.fleet.publish(record, ttl_ms=60_000)

    def nothing_was_queued(self) -> bool:
        stored = list(self.folder.glob("uploads/*"))
        return not self.sent and not stored and not self.store.page(JobQuery(owner="anna")).jobs

    def succeed(self, job_id: str) -> None:
        claim = self.store.claim(job_id, worker_id="w", lease_ttl_ms=10_000)
        assert isinstance(claim, Claim)
        picture = Artifact(
            kind=ArtifactKind.IMAGE, name="image-0.png", index=0, path="", mime="image/png", size_bytes=1, sha256=""
        )
        report = RunReport(
            run_id="r", task=Task.TEXT2IMAGE, model="shapes", backend="cpu", job_id=job_id,
            execution_mode=ExecutionMode.LEGACY_CALL,
        )  # fmt: skip
        assert self.store.commit(claim.lease, Succeeded(GenerateResult(outputs=(picture,), metadata=report)))


def data_url(data: bytes, mime: str = "image/png") -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def png(side: int = 8) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (side, side)).save(out, "PNG")
    return out.getvalue()
