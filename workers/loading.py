"""Which model a run needs, in which form, whether its files are sound, and what it can do here."""

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from omnirt_tasks.contract import ExecutionMode, ModelAbility
from omnirt_tasks.contract.base import JsonObject
from omnirt_tasks.contract.capability import ChunkMeasure
from omnirt_tasks.errors import ModelFailed
from omnirt_tasks.registry import LoadRequest, ModelSpec, TaskSpec
from omnirt_tasks.registry.footprint import FALLBACK_DTYPE, default_dtype, nearest_dtype, weights_bytes_by_dtype
from omnirt_tasks.registry.weight_files import UnsoundWeights, count_tensors
from workers.backends import DeviceInfo

FOLDERS_SETTING = "OMNIRT_MODEL_FOLDERS"

# How the models run that share no device call, since each job of theirs holds the device.
HOLDS_THE_DEVICE = {ExecutionMode.SUBPROCESS, ExecutionMode.PERSISTENT_WORKER}


@dataclass(frozen=True)
class ModelKey:
    """What tells loaded models apart: whatever changes the weights in memory, and nothing of a job's.

    Two models may name one folder and load it as different things. `folder` is "." where a model has none, and
    `quantisation` is "" until there is one.
    """

    model: str
    folder: Path
    revision: str
    dtype: str
    quantisation: str
    placement: str
    devices: int
    compile: bool


@dataclass(frozen=True)
class Sharing:
    """Whether jobs share a model's device calls: the `classes` of modules whose calls they do, and why not if not."""

    classes: tuple[str, ...] = ()
    unchunked: str | None = None


def _nothing_measured(_model: str) -> tuple[ChunkMeasure, ...]:
    return ()


class Shelf:
    """The models of a host: what each is loaded from, and as what. Safe to share between threads."""

    def __init__(
        self, models: Sequence[ModelSpec], folders: Mapping[str, Path], device: DeviceInfo, torch_device: str
    ) -> None:
        self._models = {spec.id: spec for spec in models}
        self._folders = {model: folder.resolve() for model, folder in folders.items()}
        self._device = device
        self._torch_device = torch_device
        self._weights_bytes: dict[str, Mapping[str, int]] = {}  # by model and dtype, from the files' headers
        self._lock = threading.Lock()  # guards the sharing
        self._sharing = {spec.id: Sharing(unchunked=_holding(spec)) for spec in models}

    @property
    def ids(self) -> tuple[str, ...]:
        """The models' ids, in order."""
        return tuple(sorted(self._models))

    def spec(self, model: str) -> ModelSpec:
        """The model's spec. Raises ModelFailed for one that is not served here."""
        spec = self._models.get(model)
        if spec is None:
            raise ModelFailed(
                f"This worker does not serve the model {model!r} on {self._device.device}, or has not its weights.",
                f"The operator names their folder in {FOLDERS_SETTING}.",
            )
        return spec

    def load_request(self, spec: ModelSpec, config: JsonObject) -> LoadRequest:
        """What a job with this config has the model loaded as. Raises ModelFailed for a dtype the device cannot do."""
        dtype = str(config.get("dtype", FALLBACK_DTYPE))
        if dtype not in self._device.dtypes:  # another would make the report tell what did not happen
            raise ModelFailed(
                f"The device {self._device.device} does not compute in {dtype}.",
                f"Ask for the dtype {' or '.join(self._device.dtypes)}.",
            )
        return LoadRequest(
            folder=self._folders.get(spec.id, Path()),
            device=self._torch_device,
            dtype=dtype,
            compile=config.get("compile") is True,
            devices=devices if isinstance(devices := config.get("devices"), int) else 1,
        )

    def default_request(self, spec: ModelSpec) -> LoadRequest:
        """What most jobs have the model loaded as: its first task's defaults, in a dtype that the device can do."""
        task = next(iter(spec.tasks.values()))
        config: JsonObject = {name: option.default for name, option in task.options.items()}
        return self.load_request(spec, config | {"dtype": nearest_dtype(default_dtype(task), self._device.dtypes)})

    def key(self, spec: ModelSpec, request: LoadRequest) -> ModelKey:
        """Two jobs with equal keys share the loaded model."""
        return ModelKey(
            model=spec.id,
            folder=request.folder,
            revision=spec.revision,
            dtype=request.dtype,
            quantisation="",
            placement=request.device,
            devices=request.devices,
            compile=request.compile,
        )

    def require_sound(self, spec: ModelSpec) -> None:
        """Raise ModelFailed, with the remedy, unless the model's weights are there and whole."""
        if not _loads_weights(spec):
            return
        folder = self._folders.get(spec.id)
        if folder is None or not folder.is_dir() or not any(folder.iterdir()):
            raise ModelFailed(
                f"The weights of {spec.id} are not on this worker.",
                f"The operator names the folder that holds them in {FOLDERS_SETTING}.",
            )
        try:
            count_tensors(folder)
        except UnsoundWeights as unsound:
            raise ModelFailed(
                str(unsound), f"The operator puts whole safetensors into the folder that {FOLDERS_SETTING} names."
            ) from unsound

    def estimate_bytes(self, spec: ModelSpec, dtype: str) -> int:
        """What the model will take once loaded, as far as its files tell; else 0."""
        return self._weights_bytes_of(spec).get(dtype, 0)

    def ids_loaded(self, keys: Iterable[ModelKey]) -> tuple[str, ...]:
        """The models that the keys are of, in order."""
        return tuple(sorted({key.model for key in keys}))

    def note_sharing(self, spec: ModelSpec, sharing: Sharing) -> None:
        """What loading the model showed of which of its device calls jobs share."""
        with self._lock:
            self._sharing[spec.id] = sharing

    def abilities(
        self,
        seconds_per_unit: Callable[[str], float | None],
        chunks: Callable[[str], tuple[ChunkMeasure, ...]] = _nothing_measured,
    ) -> dict[str, ModelAbility]:
        """What each model can do on this device; `seconds_per_unit` and `chunks` tell what was measured of it."""
        with self._lock:
            sharing = dict(self._sharing)
        return {
            spec.id: ModelAbility(
                tasks=tuple(spec.tasks),
                execution_mode=spec.execution_mode,
                dtypes=self._device.dtypes,
                options=tuple(sorted({name for task in spec.tasks.values() for name in task.options})),
                limits={str(task): _largest(its) for task, its in spec.tasks.items()},
                weights_bytes=dict(self._weights_bytes_of(spec)),
                working_bytes_per_pixel=spec.working_bytes_per_pixel,
                working_bytes_per_film_pixel=spec.working_bytes_per_film_pixel,
                working_bytes_per_frame_pixel=spec.working_bytes_per_frame_pixel,
                working_dtype=spec.working_dtype,
                tile_px=spec.tile_px,
                chunk_classes=sharing[spec.id].classes,
                unchunked=sharing[spec.id].unchunked,
                chunks=chunks(spec.id),
                seconds_per_unit=seconds_per_unit(spec.id),
            )
            for spec in self._models.values()
        }

    def _weights_bytes_of(self, spec: ModelSpec) -> Mapping[str, int]:
        if (known := self._weights_bytes.get(spec.id)) is not None:
            return known
        folder = self._folders.get(spec.id) if _loads_weights(spec) else None
        counted = {} if folder is None else weights_bytes_by_dtype(folder, self._device.dtypes)
        if counted:  # what its files do not tell now they may tell once they are mended
            self._weights_bytes[spec.id] = counted
        return counted


def _holding(spec: ModelSpec) -> str | None:
    return "Each of its jobs has the device for itself." if spec.execution_mode in HOLDS_THE_DEVICE else None


def _largest(task: TaskSpec) -> dict[str, float]:
    fields = {**task.options, **task.numbers}
    return {name: float(option.maximum) for name, option in fields.items() if option.maximum is not None}


def _loads_weights(spec: ModelSpec) -> bool:
    """Whether the model is loaded from a folder; a backend that needs no loader (cpu-stub) needs no weights either."""
    return spec.needs.weights and spec.loader is not None
