"""The stub executor: small pictures from a hash, with costs and failures on order. No torch."""

import ctypes
import hashlib
import logging
import os
import signal
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace

from PIL import Image, ImageDraw

from omnirt_tasks.contract.base import JsonObject
from omnirt_tasks.errors import NonFiniteOutput
from omnirt_tasks.registry import LoadRequest, ModelSpec
from omnirt_tasks.registry.spec import Checkpointing
from omnirt_tasks.registry.work import count_pictures, picture_prompt
from workers.backends.cpu import process_peak_bytes
from workers.checkpoints import CheckpointUnusable, CheckpointWriter, read_checkpoint
from workers.chunks.calls import ChunkKey, DeviceCall
from workers.context import DENOISE, JobContext
from workers.executors import LoadedModel
from workers.executors.pictures import PNG, picture_seed, png_bytes, save_pictures
from workers.host import OutputFile, RunOrder
from workers.loading import Sharing

log = logging.getLogger(__name__)

DEFAULT_SIZE_PX = 64
DEFAULT_STEPS = 8
PREVIEW_SIDE_PX = 16
EATEN_BYTES = 512 * 1024 * 1024
EATEN_AT_ONCE_BYTES = 16 * 1024 * 1024


class StubExecutor:
    """Goes through a diffusion job's stages, steps and device calls, computing nothing."""

    def load(self, spec: ModelSpec, request: LoadRequest) -> LoadedModel:
        return LoadedModel(content=spec.id, placement={"stub": request.device}, sharing=Sharing(("Stub",)))

    def run(self, model: LoadedModel, order: RunOrder, job: JobContext) -> tuple[OutputFile, ...]:
        config = order.request.config
        count = count_pictures(order.request)
        total = _integer(config, "num_inference_steps") or DEFAULT_STEPS
        size = (_integer(config, "width") or DEFAULT_SIZE_PX, _integer(config, "height") or DEFAULT_SIZE_PX)
        forward = _Forward(config, count, job.device.closing, order.attempt)
        key = ChunkKey(f"{model.content} at {id(model):x}: {size[0]}x{size[1]}")

        job.on_device(DeviceCall(model, _nothing), "encode_prompt")
        checkpoints = CheckpointWriter(job, Checkpointing(every_steps=_integer(config, "checkpoint_every_steps")))
        before = _steps_before(order, total)
        if before:
            job.resumed(before, total)
        for step in range(before + 1, total + 1):
            if step == _integer(config, "stall_at_step"):
                job.device.closing.wait(_milliseconds(config, "stall_ms", default=1000.0) / 1000)
            job.on_device(DeviceCall(model, forward, (step,), key=key, joint=_JOINT, rows=count, part=DENOISE), DENOISE)
            job.step(step, total, float(total - step))
            if job.wants_preview(step, total):
                preview = _picture(order, index=0, size=(PREVIEW_SIDE_PX, PREVIEW_SIDE_PX))
                job.preview(step, PNG, png_bytes(preview))
            checkpoints.after(step, total, str(step).encode)
        job.on_device(DeviceCall(model, _nothing), "decode")
        if config.get("non_finite") is True:
            raise NonFiniteOutput("The model's output holds NaN or infinity.", "The stub was told to (non_finite).")
        job.stage("export")
        return save_pictures([_picture(order, index, size) for index in range(count)], order)


def _nothing() -> None:
    """What encoding and decoding take here."""


@dataclass(frozen=True)
class _Forward:
    """The stub's heavy module for one run, with what it is told to do: one call is a forward pass of its pictures."""

    config: JsonObject
    pictures: int
    closing: threading.Event
    attempt: int

    def __call__(self, step: int) -> None:
        _pass([(self, step)])

    @property
    def crashes(self) -> bool:
        return self.attempt <= (_integer(self.config, "crash_attempts") or 1)


class _StubJoint:
    """One wait for all: the longest step of any member, and what each of their pictures adds."""

    def together(self, calls: Sequence[DeviceCall]) -> Sequence[None]:
        _pass([(_forward_of(call), call.args[0]) for call in calls])
        return [None] * len(calls)

    def halves(self, call: DeviceCall) -> tuple[DeviceCall, DeviceCall] | None:
        forward = _forward_of(call)
        first = forward.pictures // 2
        if not first:
            return None
        smaller, larger = (
            replace(call, function=replace(forward, pictures=pictures), rows=pictures)
            for pictures in (first, forward.pictures - first)
        )
        return smaller, larger

    def whole(self, first: None, second: None) -> None:
        return None


_JOINT = _StubJoint()


def _forward_of(call: DeviceCall) -> _Forward:
    assert isinstance(call.function, _Forward), "calls of this key are the stub's own"
    return call.function


def _pass(members: Sequence[tuple[_Forward, int]]) -> None:
    """One forward pass of all members at their steps; what one of them is told to do befalls all that are in it."""
    closing = members[0][0].closing
    pictures = sum(forward.pictures for forward, _ in members)
    cost_ms = max(_milliseconds(forward.config, "step_ms") for forward, _ in members)
    cost_ms += sum(forward.pictures * _milliseconds(forward.config, "item_ms") for forward, _ in members)
    if cost_ms:
        closing.wait(cost_ms / 1000)  # a sleep that ends with the device
    for forward, step in members:
        config = forward.config
        fits = _integer(config, "oom_above_chunk")
        if fits is not None and pictures > fits:
            raise MemoryError(f"a chunk of {pictures} pictures; {fits} fit")
        if step == _integer(config, "fail_at_step"):
            raise RuntimeError(f"told to fail at step {step}")
        if step == _integer(config, "crash_at_step") and forward.crashes:
            _crash(str(config.get("crash", "kill")))
        if step == _integer(config, "hang_at_step"):
            closing.wait()


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
    prompt = picture_prompt(order.request, index) or ""
    words = "\0".join((prompt, inputs.negative_prompt or "", str(picture_seed(order, index))))
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
