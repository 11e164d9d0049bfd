"""What device calls must agree in to be made as one, and how they become one."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self

if TYPE_CHECKING:
    from workers.device import DeviceCall

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


class Joint(Protocol):
    """How the calls of one key become one, and one becomes smaller ones. Called in the device thread alone."""

    def together(self, calls: "Sequence[DeviceCall]") -> Sequence[Any]:
        """Make the calls as one; a result for each, in order, which shares no memory with another's.

        Raises what the module raises.
        """
        ...

    def halves(self, call: "DeviceCall") -> "tuple[DeviceCall, DeviceCall] | None":
        """The call as two of fewer rows each, for a device that is too small; None for one that has a single row."""
        ...

    def whole(self, first: Any, second: Any) -> Any:
        """The result of a call from those of its halves."""
        ...
