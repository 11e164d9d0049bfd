"""How the ranks of a group keep in step: what rank 0 says to all, and what all say at the end of a job."""

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

from omnirt_tasks.contract import ErrorInfo

FAILED_WITHIN_S = 5.0
"""How long the others have to come to the end of a job too, once it failed in one rank."""
ENDED_WITHIN_S = 3600.0
"""How long rank 0 may take over the outputs, when the others are done."""
COLLECTIVE_TIMEOUT_S = 1800.0
# The backend of collectives on a device; those on the CPU are gloo's everywhere.
_COLLECTIVES = {"cuda": "cpu:gloo,cuda:nccl", "npu": "cpu:gloo,npu:hccl"}


class OutOfStep(Exception):
    """The ranks no longer do the same, and cannot find together again: the group must end.

    `failure` is what a rank that left before had failed with, if one did.
    """

    def __init__(self, detail: str, failure: ErrorInfo | None = None) -> None:
        super().__init__(detail)
        self.failure = failure


class Circle(Protocol):
    """What one rank sees of its group."""

    @property
    def rank(self) -> int: ...

    @property
    def ranks(self) -> int: ...

    def share(self, value: Any) -> Any:
        """The value that rank 0 gave, in every rank."""
        ...

    def settle(self, failure: ErrorInfo | None) -> ErrorInfo | None:
        """The first rank's failure, once every rank is at the end of the job. Raises OutOfStep when one is not."""
        ...

    def leave(self) -> None:
        """Let go of the others."""
        ...


@dataclass(frozen=True)
class Alone:
    """A group of one."""

    rank: int = 0
    ranks: int = 1

    def share(self, value: Any) -> Any:
        return value

    def settle(self, failure: ErrorInfo | None) -> ErrorInfo | None:
        return failure

    def leave(self) -> None:
        pass


@dataclass(frozen=True)
class _End:
    """How a job ended in one rank; `left` if it waited for the others in vain."""

    failure: ErrorInfo | None
    left: bool = False

    def as_text(self) -> str:
        return json.dumps([self.left, None if self.failure is None else self.failure.model_dump(mode="json")])

    @classmethod
    def of_text(cls, text: bytes) -> "_End":
        left, failure = json.loads(text)
        return cls(None if failure is None else ErrorInfo.model_validate(failure), left)


class Distributed:
    """The ranks that a launcher of torch started, from its environment. Used by one thread."""

    def __init__(self, device: str) -> None:
        """Meet the others. Raises what torch raises when they do not come."""
        import torch.distributed as dist
        from torch.distributed.rendezvous import rendezvous

        backend = _COLLECTIVES.get(device.partition(":")[0], "gloo")
        # Its own place to meet, so that the end of a job is told beside the collectives of a model that failed.
        self._store, self.rank, self.ranks = next(iter(rendezvous("env://")))
        dist.init_process_group(
            backend,
            store=self._store,
            rank=self.rank,
            world_size=self.ranks,
            timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S),
        )
        self._settled = 0

    def share(self, value: Any) -> Any:
        import torch.distributed as dist

        box = [value if self.rank == 0 else None]
        dist.broadcast_object_list(box, src=0, device=_cpu())
        return box[0]

    def settle(self, failure: ErrorInfo | None) -> ErrorInfo | None:
        self._settled += 1
        keys = [f"ended/{self._settled}/{rank}" for rank in range(self.ranks)]
        self._store.set(keys[self.rank], _End(failure).as_text())
        within_s = ENDED_WITHIN_S if failure is None else FAILED_WITHIN_S
        try:
            self._store.wait(keys, timedelta(seconds=within_s))
            ends = [_End.of_text(self._store.get(key)) for key in keys]
        except Exception as error:
            with suppress(Exception):  # the others are told, if they can be
                self._store.set(keys[self.rank], _End(failure, left=True).as_text())
            raise OutOfStep(f"rank {self.rank} waited {within_s:g} s for the end of the others") from error
        for rank, end in enumerate(ends):
            if end.left:
                raise OutOfStep(f"rank {rank} had left", end.failure)
        with suppress(Exception):  # only tidiness; those before are read by all
            self._store.delete_key(f"ended/{self._settled - 1}/{self.rank}")
        return next((end.failure for end in ends if end.failure is not None), None)

    def leave(self) -> None:
        import torch.distributed as dist

        dist.destroy_process_group()


def _cpu() -> Any:
    import torch

    return torch.device("cpu")


def circle_of(device: str) -> Circle:
    """The group that this process was started in."""
    return Distributed(device) if "WORLD_SIZE" in os.environ else Alone()
