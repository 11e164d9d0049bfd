"""Which devices a backend has, asked from a process that must not import torch.

    probe_apart ─► python -m workers.backends.probing BACKEND ─► one line of JSON ─► DeviceInfo…

The Celery process outlives many device processes: torch in it would cost memory for good, and a context on the device
would hold on to what a device process has given back.
"""

import importlib.util
import logging
import subprocess
import sys
from collections.abc import Mapping

from pydantic import TypeAdapter, ValidationError

from omnirt_tasks.contract import Backend
from omnirt_tasks.errors import ConfigurationError
from workers.backends import DeviceInfo, driver

log = logging.getLogger(__name__)

# Cold from a network disk, torch alone has taken a minute.
PROBE_TIMEOUT_S = 180.0
# What a backend's probe imports. The others find their devices without.
IMPORTED_BY_PROBE: Mapping[str, str] = {Backend.CUDA: "torch", Backend.ASCEND: "torch_npu"}

_DEVICES = TypeAdapter(tuple[DeviceInfo, ...])


def probe_apart(backend: str, *, timeout_s: float = PROBE_TIMEOUT_S) -> tuple[DeviceInfo, ...]:
    """What `driver(backend).probe()` finds, without an import of torch here.

    A backend that needs torch for it is asked in a child process, for at most `timeout_s`. Raises ConfigurationError
    for a backend without a driver, and when the child fails.
    """
    module = IMPORTED_BY_PROBE.get(backend)
    if module is None:
        return driver(backend).probe()
    if importlib.util.find_spec(module) is None:
        return ()
    command = [sys.executable, "-m", __name__, backend]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout_s)
    except subprocess.TimeoutExpired as error:
        raise ConfigurationError(
            f"The probe of the backend {backend} has not ended after {timeout_s:g} s.",
            "See whether its driver answers (nvidia-smi, npu-smi), or serve another queue here.",
        ) from error
    told = _last_line(done.stderr)
    try:
        devices = _DEVICES.validate_json(_last_line(done.stdout))
    except ValidationError as error:
        raise ConfigurationError(
            f"The probe of the backend {backend} ended with status {done.returncode}: {told or 'it said nothing'}",
            "Mend its software, or serve another queue here.",
        ) from error
    if not devices and told:
        log.warning("no %s device: %s", backend, told)
    return devices


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else ""


def _main(backend: str) -> None:
    sys.stdout.write(_DEVICES.dump_json(driver(backend).probe()).decode() + "\n")


if __name__ == "__main__":
    _main(sys.argv[1])
