"""What a run needs before the device has it: its folder, its inputs, where it goes on; together, its order."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from omnirt_tasks.artifacts import ArtifactStorage
from omnirt_tasks.contract import MEDIA_INPUTS
from omnirt_tasks.errors import ArtifactNotFound, JobNotFound
from omnirt_tasks.jobs.store import JobStore
from omnirt_tasks.jobs.values import Lease
from omnirt_tasks.uploads import UploadStorage
from workers.attempts.checkpoint_keeper import CheckpointKeeper
from workers.attempts.patience import Patience
from workers.attempts.runs import Run
from workers.host import RunOrder

OUTPUTS, INPUTS, CHECKPOINTS, RESUME = "outputs", "inputs", "checkpoints", "resume"


class Orders:
    """Makes the orders of runs, in folders below `scratch_dir`, which is this process's own."""

    def __init__(
        self,
        *,
        store: JobStore,
        artifacts: ArtifactStorage,
        uploads: UploadStorage,
        checkpoints: CheckpointKeeper,
        patiently: Patience,
        scratch_dir: Path,
        preview_every_steps: int,
    ) -> None:
        self._store = store
        self._artifacts = artifacts
        self._uploads = uploads
        self._checkpoints = checkpoints
        self._patiently = patiently
        self._scratch_dir = scratch_dir
        self._preview_every_steps = preview_every_steps
        scratch_dir.mkdir(parents=True, exist_ok=True)

    @contextlib.contextmanager
    def folder(self, lease: Lease) -> Iterator[Path]:
        """A folder of the attempt's own, which goes with it. Raises OSError."""
        folder = self._scratch_dir / f"{lease.job_id}.{lease.attempt}"
        folder.mkdir(parents=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)  # a run that was abandoned may still write here

    def make(self, run: Run, folder: Path) -> RunOrder:
        """The run's order, with its inputs fetched; one that was claimed alone shares no device call either.

        Raises what an input that is gone, or a storage that is away, raises; and OSError for the folder.
        """
        for name in (OUTPUTS, INPUTS, CHECKPOINTS):
            (folder / name).mkdir()
        given = {name: getattr(run.job.resolved.inputs, name) for name in MEDIA_INPUTS}
        files: dict[str, Path] = {}
        for name, reference in given.items():
            if reference is not None:
                files[name] = folder / INPUTS / name
                self._fetch(reference, files[name])
        return RunOrder(
            job_id=run.lease.job_id,
            attempt=run.lease.attempt,
            request=run.job.resolved,
            output_dir=folder / OUTPUTS,
            files=files,
            preview_every_steps=self._preview_every_steps,
            checkpoint_dir=folder / CHECKPOINTS,
            resume_from=self._checkpoints.fetch(run.job, folder / RESUME),
            alone=run.place.alone,
            first_output=0 if run.job.part is None else run.job.part.first_output,
        )

    def _fetch(self, reference: str, target: Path) -> None:
        kind, _, rest = reference.partition(":")
        if kind == "upload":
            self._uploads.fetch(rest, target)
            return
        job_id, _, name = rest.partition("/")
        try:
            source = self._patiently(lambda: self._store.get(job_id), "read")
        except JobNotFound:
            raise ArtifactNotFound(f"The job of the artifact {name!r} is gone.") from None
        origin = source.origins.get(name)
        if origin is None:
            raise ArtifactNotFound(f"The job of the artifact {name!r} has none of that name.")
        self._artifacts.fetch(origin.job_id, origin.attempt, name, target)
