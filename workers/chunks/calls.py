"""Device calls, what they must agree in to be made as one, and how they become one."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

_alone = itertools.count(1)


@dataclass(frozen=True)
class ChunkKey:
    """Calls of equal keys may share a forward pass; readable, and never empty.

    It names all that they must agree in: the very module, and every argument's shape, dtype and shared value.
    """

    text: str

    def __post_init__(self) -> None:
        if not self.text:
            raise ValueError("An empty chunk key would make strangers equal.")

    @classmethod
    def alone(cls, why: str) -> Self:
        """A key that no other call has."""
        return cls(f"alone #{next(_alone)}: {why}")

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, eq=False)
class DeviceCall:
    """One call of a heavy module: `function(*args, **kwargs)`, a method of `module`.

    Calls of an equal `key` may be made as one, by their `joint`; `rows` is how many samples this one brings. `part`
    names what is called ("unet", "vae.decode"), for what is measured.
    """

    module: object
    function: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    key: ChunkKey = field(default_factory=lambda: ChunkKey.alone("it shares with nobody"))
    joint: "Joint | None" = None
    rows: int = 1
    part: str = ""

    def __call__(self) -> Any:
        """Make the call, in the thread at hand."""
        return self.function(*self.args, **self.kwargs)


class Joint(Protocol):
    """How the calls of one key become one, and one becomes smaller ones. Called in the device thread alone."""

    def together(self, calls: Sequence[DeviceCall]) -> Sequence[Any]:
        """Make the calls as one; a result for each, in order, which shares no memory with another's.

        Raises what the module raises.
        """
        ...

    def halves(self, call: DeviceCall) -> tuple[DeviceCall, DeviceCall] | None:
        """The call as two of fewer rows each, for a device that is too small; None for one that has a single row."""
        ...

    def whole(self, first: Any, second: Any) -> Any:
        """The result of a call from those of its halves."""
        ...
