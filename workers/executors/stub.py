"""The stub executor: small pictures from a hash, with costs and failures on order. No torch."""

import ctypes
import hashlib
import logging
import os
import signal
import threading

from PIL import Image, ImageDraw

from omnirt_tasks.contract.base import JsonObject
from omnirt_tasks.errors import NonFiniteOutput
from omnirt_tasks.registry import LoadRequest, ModelSpec
from omnirt_tasks.registry.spec import Checkpointing
from workers.backends.cpu import process_peak_bytes
from workers.checkpoints import CheckpointUnusable, CheckpointWriter, read_checkpoint
from workers.context import JobContext
from workers.device import DeviceCall
from workers.executors import LoadedModel
from workers.executors.pictures import PNG, picture_seed, png_bytes, save_pictures
from workers.host import OutputFile, RunOrder

log = logging.getLogger(__name__)

DEFAULT_SIZE_PX = 64
DEFAULT_STEPS = 8
PREVIEW_SIDE_PX = 16
EATEN_BYTES = 512 * 1024 * 1024
EATEN_AT_ONCE_BYTES = 16 * 1024 * 1024


class StubExecutor:
    """Goes through a diffusion job's stages, steps and device calls, computing nothing."""

    def load(self, spec: ModelSpec, request: LoadRequest) -> LoadedModel:
        return LoadedModel(content=spec.id, placement={"stub": request.device})

    def run(self, model: LoadedModel, order: RunOrder, job: JobContext) -> tuple[OutputFile, ...]:
        config = order.request.config
        count = _integer(config, "num_images_per_prompt") or 1
        total = _integer(config, "num_inference_steps") or DEFAULT_STEPS
        forward = _Forward(config, count, job.device.closing, order.attempt)

        def on_device(stage: str, step: int | None = None) -> None:
            job.on_device(DeviceCall(model, forward, (step,)), stage)

        on_device("encode_prompt")
        checkpoints = CheckpointWriter(job, Checkpointing(every_steps=_integer(config, "checkpoint_every_steps")))
        before = _steps_before(order, total)
        if before:
            job.resumed(before, total)
        for step in range(before + 1, total + 1):
            if step == _integer(config, "stall_at_step"):
                job.device.closing.wait(_milliseconds(config, "stall_ms", default=1000.0) / 1000)
            on_device("denoise", step)
            job.step(step, total, float(total - step))
            if job.wants_preview(step, total):
                preview = _picture(order, index=0, size=(PREVIEW_SIDE_PX, PREVIEW_SIDE_PX))
                job.preview(step, PNG, png_bytes(preview))
            checkpoints.after(step, total, str(step).encode)
        on_device("decode")
        if config.get("non_finite") is True:
            raise NonFiniteOutput("The model's output holds NaN or infinity.", "The stub was told to (non_finite).")
        job.stage("export")
        size = (_integer(config, "width") or DEFAULT_SIZE_PX, _integer(config, "height") or DEFAULT_SIZE_PX)
        return save_pictures([_picture(order, index, size) for index in range(count)], order)


class _Forward:
    """The stub's heavy module: one call is one forward pass over `count` pictures."""

    def __init__(self, config: JsonObject, count: int, closing: threading.Event, attempt: int) -> None:
        self._config = config
        self._count = count
        self._closing = closing
        self._crashes = attempt <= (_integer(config, "crash_attempts") or 1)

    def __call__(self, step: int | None) -> None:
        if step is None:
            return
        config = self._config
        cost_ms = _milliseconds(config, "step_ms") + self._count * _milliseconds(config, "item_ms")
        if cost_ms:
            self._closing.wait(cost_ms / 1000)  # a sleep that ends with the device
        fits = _integer(config, "oom_above_chunk")
        if fits is not None and self._count > fits:
            raise MemoryError(f"a chunk of {self._count} pictures; {fits} fit")
        if step == _integer(config, "fail_at_step"):
            raise RuntimeError(f"told to fail at step {step}")
        if step == _integer(config, "crash_at_step") and self._crashes:
            _crash(str(config.get("crash", "kill")))
        if step == _integer(config, "hang_at_step"):
            self._closing.wait()


def _crash(how: str) -> None:
    """End this process, or hold it for ever, as device code might."""
    match how:
        case "segv":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "exit":
            os._exit(3)
        case "abort":
            os.abort()
        case "memory":
            _eat_memory()
        case "hold-gil":
            ctypes.PyDLL(None).pause()  # a PyDLL's functions are called with the interpreter's lock
        case _:
            os.kill(os.getpid(), signal.SIGKILL)


def _eat_memory() -> None:
    """Take memory, to a bound so that the host is not harmed, and end as the kernel ends who has taken too much."""
    limit_bytes = process_peak_bytes() + EATEN_BYTES
    eaten = []
    while process_peak_bytes() < limit_bytes:
        eaten.append(bytearray(EATEN_AT_ONCE_BYTES))
        eaten[-1][::4096] = b"x" * (EATEN_AT_ONCE_BYTES // 4096)  # resident, page by page
    os.kill(os.getpid(), signal.SIGKILL)


def _picture(order: RunOrder, index: int, size: tuple[int, int]) -> Image.Image:
    """Three bars on a background, all taken from the hash of the prompts and the picture's own seed."""
    inputs = order.request.inputs
    words = "\0".join((inputs.prompt or "", inputs.negative_prompt or "", str(picture_seed(order, index))))
    digest = hashlib.sha256(words.encode()).digest()
    width, height = size
    picture = Image.new("RGB", size, tuple(digest[:3]))
    draw = ImageDraw.Draw(picture)
    for bar in range(3):
        red, green, blue, left, top = digest[3 + 5 * bar : 8 + 5 * bar]
        x, y = left * width // 256, top * height // 256
        draw.rectangle((x, y, x + width // 4, y + height // 4), fill=(red, green, blue))
    return picture


def _steps_before(order: RunOrder, total: int) -> int:
    """How many steps an earlier attempt has made: all that there is to know of one."""
    if order.resume_from is None:
        return 0
    try:
        steps = int(read_checkpoint(order.resume_from))
    except (CheckpointUnusable, ValueError):
        log.warning("the run begins anew, its checkpoint is of no use", exc_info=True)
        return 0
    return steps if 0 < steps < total else 0


def _integer(config: JsonObject, name: str) -> int | None:
    value = config.get(name)
    return value if isinstance(value, int) else None


def _milliseconds(config: JsonObject, name: str, default: float = 0.0) -> float:
    value = config.get(name)
    return float(value) if isinstance(value, int | float) else default
