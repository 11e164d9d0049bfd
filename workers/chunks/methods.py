"""A module's method whose calls may be made with others: its DeviceCalls, and how those become one."""

import inspect
import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from workers.chunks.arguments import Arguments, Digests, RunsAlone
from workers.chunks.calls import ChunkKey, DeviceCall
from workers.chunks.outputs import join, split
from workers.chunks.tables import Table

log = logging.getLogger(__name__)

_numbers = itertools.count(1)


class SharedMethod:
    """Makes the device calls of one method of one module, and is the Joint of those that follow its table.

    `call` may be used by many threads at once; the rest belongs to the device thread.
    """

    def __init__(self, module: object, function: Callable[..., Any], part: str, table: Table) -> None:
        """`function` is what makes a call; `part` names it ("unet", "vae.decode")."""
        self._module = module
        self._function = function
        self._part = part
        self._table = table
        # No other module has this name, also when one of them is gone and the next lies in its memory.
        self._name = f"{part} #{next(_numbers)}"
        self._signature = inspect.signature(function)
        self._defaults: Mapping[str, Any] = dict.fromkeys(table.arguments) | {
            name: parameter.default
            for name, parameter in self._signature.parameters.items()
            if parameter.default is not parameter.empty
        }
        self._digests = Digests()
        self._told: set[str] = set()  # why calls ran alone; as many as the table's arguments, and a few

    def call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> DeviceCall:
        """The call with these arguments: one that others may be made with, if they are as the table says."""
        try:
            values = self._by_name(args, kwargs)
            given = self._given(values)
            agreed = (
                (name, treatment.key(name, given, self._digests)) for name, treatment in self._table.arguments.items()
            )
            text = " | ".join((self._name, *(f"{name} {form}" for name, form in agreed if form)))
        except RunsAlone as reason:
            self._tell(str(reason))
            alone = ChunkKey.alone(f"{self._name}: {reason}")
            return DeviceCall(self._module, self._function, args, kwargs, key=alone, part=self._part)
        return DeviceCall(
            self._module,
            self._function,
            kwargs=values,
            key=ChunkKey(text),
            joint=self,
            rows=given.rows,
            part=self._part,
        )

    def together(self, calls: Sequence[DeviceCall]) -> Sequence[Any]:
        """Raises Unsplittable for a result that is not all rows, or what the module raises."""
        if len(calls) == 1:
            return [calls[0]()]
        members = [self._given(call.kwargs) for call in calls]
        # Those that no call names as well: padding makes a mask where there was none.
        named = self._signature.parameters.keys() | {name for call in calls for name in call.kwargs}
        merged = {
            name: treatment.together(name, members)
            for name, treatment in self._table.arguments.items()
            if name in named
        }
        return split(self._function(**merged), [member.rows for member in members])

    def halves(self, call: DeviceCall) -> tuple[DeviceCall, DeviceCall] | None:
        given = self._given(call.kwargs)
        if given.rows < 2:
            return None
        middle = (given.rows + 1) // 2
        return self._cut(call, given, 0, middle), self._cut(call, given, middle, given.rows)

    def whole(self, first: Any, second: Any) -> Any:
        return join(first, second)

    def _cut(self, call: DeviceCall, given: Arguments, begin: int, end: int) -> DeviceCall:
        arguments = self._table.arguments
        kwargs = {name: arguments[name].cut(value, given, begin, end) for name, value in call.kwargs.items()}
        return replace(call, kwargs=kwargs, rows=end - begin)

    def _by_name(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
        try:
            bound = self._signature.bind(*args, **kwargs)
        except TypeError as error:
            raise RunsAlone("its arguments are not those of its method") from error
        values: dict[str, Any] = {}
        for name, value in bound.arguments.items():
            if self._signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
                values.update(value)
            else:
                values[name] = value
        if unknown := values.keys() - self._table.arguments.keys():
            raise RunsAlone(f"it is given {min(unknown)}")
        return values

    def _given(self, values: Mapping[str, Any]) -> Arguments:
        main = values.get(self._table.main)
        if not isinstance(main, torch.Tensor) or main.ndim == 0 or main.shape[0] == 0:
            raise RunsAlone(f"its {self._table.main} is no tensor of rows")
        return Arguments({**self._defaults, **values}, rows=main.shape[0], device=main.device)

    def _tell(self, reason: str) -> None:
        if reason not in self._told and len(self._told) < len(self._table.arguments):
            self._told.add(reason)
            log.warning(
                "a call of %s runs alone: %s", self._part, reason, extra={"component": type(self._module).__name__}
            )
