"""How one argument of a module's call is treated when calls are made as one: what they must agree in, join, cut.

Rows         a tensor with the call's rows in dim 0              concatenated
NamedRows    a dict of such tensors                              each of them concatenated
Numbers      one number for each row, or one for all of them     one for each row, of a dtype that loses nothing
Padded       rows that differ in length, with a mask of what is  padded to the longest
Mask         that mask; None where nothing is padded             made where it is missing
ListOfEqual  a list with an entry for each row, all the same     appended
Shared       a plain value or a tensor, equal in all calls       the first one's
Unread       what the module takes and does not look at          left out
Absent       what nobody has said how to treat                   must be None
"""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.utils.weak import WeakTensorKeyDictionary

# Where numbers take four bytes at most.
WITHOUT_FLOAT64 = frozenset({"mps", "npu"})


class RunsAlone(Exception):
    """A call cannot be made with others; the message says why, and names the argument."""


class Digests:
    """What tensors hold, in short, so that it is read from the device once and not at every step.

    Forgets a tensor with its last reference, and what was changed in place.
    """

    def __init__(self) -> None:
        self._known = WeakTensorKeyDictionary()

    def of(self, tensor: torch.Tensor) -> str:
        """A digest of the tensor's bytes; waits for the device unless it is known."""
        if tensor.is_inference():  # keeps no count of its changes
            return _digest(tensor)
        version, known = self._known.get(tensor, (None, ""))
        changes = tensor._version  # noqa: SLF001 - torch has no other count of them
        if version != changes:
            version, known = changes, _digest(tensor)
            self._known[tensor] = version, known
        return str(known)


@dataclass(frozen=True)
class Arguments:
    """One call's arguments by name, defaults among them; `rows` and `device` are those of its main one."""

    values: Mapping[str, Any]
    rows: int
    device: torch.device

    def __getitem__(self, name: str) -> Any:
        return self.values[name]


class Treatment(Protocol):
    """What becomes of an argument."""

    def key(self, name: str, call: Arguments, digests: Digests) -> str:
        """What calls must agree in as far as this argument goes; "" for nothing. Raises RunsAlone."""
        ...

    def together(self, name: str, calls: Sequence[Arguments]) -> Any:
        """The argument of the call that calls of equal keys become."""
        ...

    def cut(self, value: Any, call: Arguments, begin: int, end: int) -> Any:
        """The argument of a call of the rows from `begin` to `end` alone."""
        ...


class Rows:
    """A tensor with the call's rows in dim 0, or None in all calls."""

    def key(self, name: str, call: Arguments, digests: Digests) -> str:
        del digests
        value = call[name]
        return "" if value is None else _form(_rows_of(value, name, call), value.shape[1:])

    def together(self, name: str, calls: Sequence[Arguments]) -> Any:
        values = [call[name] for call in calls]
        return None if values[0] is None else torch.cat(values)

    def cut(self, value: Any, call: Arguments, begin: int, end: int) -> Any:
        del call
        return None if value is None else value[begin:end]


@dataclass(frozen=True)
class NamedRows:
    """A dict of tensors with the call's rows in dim 0: these names have one, others None; or None in all calls."""

    names: frozenset[str]

    def key(self, name: str, call: Arguments, digests: Digests) -> str:
        del digests
        value = call[name]
        if value is None:
            return ""
        if type(value) is not dict or not _given(value).keys() <= self.names:
            raise RunsAlone(f"its {name} holds more than {_listed(self.names)}")
        forms = (
            f"{part} {_form(_rows_of(rows, f'{name}[{part!r}]', call), rows.shape[1:])}"
            for part, rows in sorted(_given(value).items())
        )
        return f"{{{', '.join(forms)}}}"

    def together(self, name: str, calls: Sequence[Arguments]) -> Any:
        if calls[0][name] is None:
            return None
        values = [_given(call[name]) for call in calls]
        return {part: torch.cat([value[part] for value in values]) for part in values[0]}

    def cut(self, value: Any, call: Arguments, begin: int, end: int) -> Any:
        del call
        return None if value is None else {part: rows[begin:end] for part, rows in _given(value).items()}


class Numbers:
    """A number for each row, or one for all rows of a call, or None in all calls; dtypes may differ.

    For modules that round it themselves, so that what they round is the same alone and together.
    """

    def key(self, name: str, call: Arguments, digests: Digests) -> str:
        del digests
        value = call[name]
        if value is None:
            return ""
        if not _is_number(value) and not (
            isinstance(value, torch.Tensor)
            and value.ndim <= 1
            and value.numel() in (1, call.rows)
            and not value.is_complex()
            and value.dtype is not torch.bool
        ):
            raise RunsAlone(f"its {name} is not one number for each row")
        return "one per row"

    def together(self, name: str, calls: Sequence[Arguments]) -> Any:
        return None if calls[0][name] is None else torch.cat([_each(call[name], call) for call in calls])

    def cut(self, value: Any, call: Arguments, begin: int, end: int) -> Any:
        for_all = not isinstance(value, torch.Tensor) or value.numel() != call.rows
        return value if for_all else value.reshape(-1)[begin:end]


@dataclass(frozen=True)
class Padded:
    """Rows of (length, size), whose lengths differ between calls; `mask` is the argument that tells what is no padding.

    None in all calls, or in none. Only for modules on which what the mask leaves out has no effect.
    """

    mask: str

    def key(self, name: str, call: Arguments, digests: Digests) -> str:
        del digests
        value = call[name]
        if value is None:
            return ""
        if _rows_of(value, name, call).ndim != 3:
            raise RunsAlone(f"its {name} is no tensor of rows, length and size")
        return f"any length x {_form(value, value.shape[2:])}"

    def together(self, name: str, calls: Sequence[Arguments]) -> Any:
        values = [call[name] for call in calls]
        if values[0] is None:
            return None
        longest = max(value.shape[1] for value in values)
        return torch.cat([_with_zeros(value, (0, 0, 0, longest - value.shape[1])) for value in values])

    def cut(self, value: Any, call: Arguments, begin: int, end: int) -> Any:
        del call
        return None if value is None else value[begin:end]


@dataclass(frozen=True)
class Mask:
    """True, or not zero, where the argument `of` is no padding; None where it has none."""

    of: str

    def key(self, name: str, call: Arguments, digests: Digests) -> str:
        del digests
        value = call[name]
        padded = call[self.of]
        if value is not None and (padded is None or _rows_of(value, name, call).shape != padded.shape[:2]):
            raise RunsAlone(f"its {name} is not a mask of its {self.of}")
        return ""

    def together(self, name: str, calls: Sequence[Arguments]) -> Any:
        if calls[0][self.of] is None:
            return None
        lengths = [call[self.of].shape[1] for call in calls]
        longest = max(lengths)
        if all(call[name] is None for call in calls) and min(lengths) == longest:
            return None
        masks = []
        for call in calls:
            mask = call[name]
            if mask is None:
                mask = torch.ones(call[self.of].shape[:2], dtype=torch.bool, device=call.device)
            masks.append(_with_zeros(mask.to(torch.bool), (0, longest - mask.shape[1])))
        return torch.cat(masks)

    def cut(self, value: Any, call: Arguments, begin: int, end: int) -> Any:
        del call
        return None if value is None else value[begin:end]


class ListOfEqual:
    """A list with a plain entry for each row, the same in all rows of all calls; or None in all calls."""

    def key(self, name: str, call: Arguments, digests: Digests) -> str:
        del digests
        value = call[name]
        if value is None:
            return ""
        if type(value) is not list or len(value) != call.rows:
            raise RunsAlone(f"its {name} is not a list with an entry for each row")
        first, *others = (plain(each, name) for each in value)
        if any(each != first for each in others):
            raise RunsAlone(f"its {name} differs from row to row")
        return f"{first} per row"

    def together(self, name: str, calls: Sequence[Arguments]) -> Any:
        return None if calls[0][name] is None else [each for call in calls for each in call[name]]

    def cut(self, value: Any, call: Arguments, begin: int, end: int) -> Any:
        del call
        return None if value is None else value[begin:end]


class Shared:
    """A plain value, or a tensor of the same content, equal in all calls."""

    def key(self, name: str, call: Arguments, digests: Digests) -> str:
        value = call[name]
        if value is None:
            return ""
        if isinstance(value, torch.Tensor):
            return f"{_form(_dense(value, name), value.shape)} {digests.of(value)}"
        return plain(value, name)

    def together(self, name: str, calls: Sequence[Arguments]) -> Any:
        return calls[0][name]

    def cut(self, value: Any, call: Arguments, begin: int, end: int) -> Any:
        del call, begin, end
        return value


class Unread:
    """What the module takes and does not look at."""

    def key(self, name: str, call: Arguments, digests: Digests) -> str:
        del name, call, digests
        return ""

    def together(self, name: str, calls: Sequence[Arguments]) -> Any:
        del name, calls

    def cut(self, value: Any, call: Arguments, begin: int, end: int) -> Any:
        del call, begin, end
        return value


class Absent:
    """What nobody has said how to treat: with it, a call runs alone."""

    def key(self, name: str, call: Arguments, digests: Digests) -> str:
        del digests
        if call[name] is not None:
            raise RunsAlone(f"it is given {name}")
        return ""

    def together(self, name: str, calls: Sequence[Arguments]) -> Any:
        del name, calls

    def cut(self, value: Any, call: Arguments, begin: int, end: int) -> Any:
        del value, call, begin, end


def plain(value: object, name: str) -> str:
    """A plain value in words that no other value has. Raises RunsAlone for one that is not plain."""
    return "".join(_words(value, name))


def _with_zeros(tensor: torch.Tensor, widths: tuple[int, ...]) -> torch.Tensor:
    """The tensor with zeros added; itself where there are none to add."""
    return torch.nn.functional.pad(tensor, widths) if any(widths) else tensor


def _words(value: object, name: str) -> Iterator[str]:
    kind = type(value)
    if value is None or kind in (bool, int, float, str):
        yield repr(value)
    elif isinstance(value, list | tuple) and kind in (list, tuple):
        yield "[" if kind is list else "("
        for each in value:
            yield from _words(each, name)
            yield ","
        yield "]" if kind is list else ")"
    elif isinstance(value, dict) and kind is dict and all(type(key) is str for key in value):
        yield "{"
        for key in sorted(value):
            yield f"{key!r}:"
            yield from _words(value[key], name)
            yield ","
        yield "}"
    else:
        raise RunsAlone(f"its {name} holds a {kind.__name__}")


def _given(named: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in named.items() if value is not None}


def _is_number(value: object) -> bool:
    return type(value) is int or (type(value) is float and math.isfinite(value))


def _each(value: Any, call: Arguments) -> torch.Tensor:
    dtype = torch.float32 if call.device.type in WITHOUT_FLOAT64 else torch.float64
    if not isinstance(value, torch.Tensor):
        return torch.full((call.rows,), value, dtype=dtype, device=call.device)
    return value.reshape(-1).to(call.device, dtype).expand(call.rows)


def _rows_of(value: Any, name: str, call: Arguments) -> torch.Tensor:
    """The value, if it is a tensor with the call's rows. Raises RunsAlone."""
    if not isinstance(value, torch.Tensor) or value.ndim == 0 or value.shape[0] != call.rows:
        raise RunsAlone(f"its {name} is no tensor with the call's rows")
    return _dense(value, name)


def _dense(value: torch.Tensor, name: str) -> torch.Tensor:
    if value.layout is not torch.strided or value.is_nested:
        raise RunsAlone(f"its {name} is no dense tensor")
    return value


def _form(value: torch.Tensor, shape: torch.Size) -> str:
    return f"{'x'.join(map(str, shape)) or '1'} {str(value.dtype).removeprefix('torch.')} {value.device}"


def _digest(tensor: torch.Tensor) -> str:
    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(content.tobytes()).hexdigest()


def _listed(names: frozenset[str]) -> str:
    return " and ".join(sorted(names))
