"""The runs as the device's line sees them: what bounds their sharing, and with whom they shared."""

import itertools
from dataclasses import dataclass
from typing import Self
from uuid import uuid4

from omnirt_tasks.contract.base import JsonObject
from workers.chunks.calls import ChunkKey
from workers.host import RunOrder

# A forward pass waits for a member a quarter of itself at most, and for one that did not come so often no more: what
# it made the others wait in vain adds up to one step.
MISSES_MAX = 4

_groups = itertools.count(1)


@dataclass(frozen=True)
class TooLarge:
    """A call for which the device's memory was too small, though nothing else was in it."""

    part: str
    rows: int


class Group:
    """The runs that ever shared a device call, or did with one that did, and so on. Of two that meet one stays."""

    def __init__(self) -> None:
        self.number = next(_groups)
        self.id = str(uuid4())
        self.joined: Group | None = None
        """The older group that it has met, and become."""

    def meet(self, other: "Group") -> None:
        """Be one group from now on."""
        older, younger = sorted((self.now(), other.now()), key=lambda group: group.number)
        if younger is not older:
            younger.joined = older

    def now(self) -> "Group":
        """The group that it has become: itself, as long as it has met none that is older."""
        group = self
        while group.joined is not None:
            group = group.joined
        return group


class Member:
    """A run as the line sees it: `model` and `shape` say what its calls are measured as.

    `alone` shares with nobody. `size_max` is the most runs of a call that it takes part in (None: as many as pays), and
    `window_s` how long its first denoising call waits for others. Its run sets them before it makes a call; the
    device's thread sets `alone` too, where making its calls with others fails. The rest is written by the device's
    line and thread, and read by the run once its calls have been made.
    """

    def __init__(
        self,
        model: str,
        shape: str,
        *,
        alone: bool = False,
        size_max: int | None = None,
        window_s: float = 0.0,
    ) -> None:
        self.model = model
        self.shape = shape
        self.alone = alone
        self.size_max = size_max
        self.window_s = window_s
        self.key: ChunkKey | None = None
        """The key of its newest denoising call."""
        self.misses = 0
        """How often others waited for it in vain."""
        self.largest = 1
        """The most runs of a denoising call that it took part in."""
        self.too_large: TooLarge | None = None
        """The newest of its calls that had too little memory."""
        self.group: Group | None = None
        """Those it shared with; None as long as there is nobody."""
        self._calls = 0
        self._sizes = 0

    @classmethod
    def of(cls, order: RunOrder) -> Self:
        """The member that an order's run is, without bounds."""
        return cls(order.request.model, shape_of(order.request.config), alone=order.alone)

    @property
    def begun(self) -> bool:
        """Whether a denoising call of it was made."""
        return self._calls > 0

    @property
    def mean(self) -> float:
        """The mean number of runs of its denoising calls; 1.0 as long as there are none."""
        return self._sizes / self._calls if self._calls else 1.0

    @property
    def group_id(self) -> str | None:
        """The id of its group as of now."""
        return None if self.group is None else self.group.now().id

    def count(self, size: int) -> None:
        """Note that a denoising call of it was made, with those of `size` runs in all."""
        self.largest = max(self.largest, size)
        self._calls += 1
        self._sizes += size

    def meet(self, other: "Member") -> None:
        """Note that a call was made of both."""
        if self.group is None:
            self.group = other.group or Group()
        if other.group is None:
            other.group = self.group
        self.group.meet(other.group)


def shape_of(config: JsonObject) -> str:
    """What a run's calls differ in by its options, as words: "512x512 fp16"; without what it has not."""
    width, height, dtype = config.get("width"), config.get("height"), config.get("dtype")
    size = f"{width}x{height}" if width and height else ""
    return f"{size} {dtype or ''}".strip()
