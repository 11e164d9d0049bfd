"""Memory really comes back: what a model took of its process is the system's again once the model is evicted."""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from omnirt_tasks.registry.footprint import MIB
from tests.support.model_memory import load_and_evict, save_large_sdxl

# The schedulers meet NumPy's newest wish in an old way of making arrays.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

LARGE_BYTES_MIN = 200 * MIB
COMES_BACK = 0.8


@pytest.mark.leaks("multiprocessing keeps its resource tracker")
def test_the_memory_of_an_evicted_model_is_the_systems_again(tmp_path: Path) -> None:
    large = save_large_sdxl(tmp_path / "large")

    # In a process of its own: what other tests freed, and the allocator kept, would be taken first.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as own:
        resident = own.submit(load_and_evict, large, tmp_path).result()

    assert resident.weights > LARGE_BYTES_MIN
    assert resident.loaded - resident.before > COMES_BACK * resident.weights
    assert resident.loaded - resident.evicted > COMES_BACK * resident.weights, str(resident)
