"""Where a request goes, and what is refused from the workers' records alone, as tables."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omnirt_tasks.contract import (
    Backend,
    ExecutionMode,
    Inputs,
    ModelAbility,
    ResolvedRequest,
    Task,
    WorkerCapability,
)
from omnirt_tasks.errors import BackendUnsupported, ConfigurationError, InsufficientMemory, OmnirtError
from omnirt_tasks.registry import ModelSpec, discover
from omnirt_tasks.registry.footprint import in_words
from omnirt_tasks.room import pictures_that_fit
from omnirt_tasks.routing import (
    QueueAddress,
    Route,
    choose,
    device_tag,
    judge,
    parse_queue,
    queue_name,
    queues_served,
    settle,
    worker_tags,
)
from omnirt_tasks.validation import failure

GIB = 2**30
MIB = 2**20


def request(
    model: str = "shapes",
    backend: str = "auto",
    tags: Sequence[str] = (),
    task: Task = Task.TEXT2IMAGE,
    num_frames: int | None = None,
    **config: Any,
) -> ResolvedRequest:
    return ResolvedRequest(
        task=task,
        model=model,
        backend=backend,
        inputs=Inputs(prompt="a", num_frames=num_frames),
        config=dict(config),
        tags=tuple(tags),
    )


def worker(
    queue: str,
    *models: str,
    tags: Sequence[str] = (),
    device: str | None = None,
    features: Sequence[str] = (),
    dtypes: Sequence[str] = (),
    budget_bytes: int | None = None,
    ability: ModelAbility | None = None,
) -> WorkerCapability:
    backend = parse_queue(queue).backend
    device = device or f"{backend}:0"
    return WorkerCapability(
        worker_id=f"{queue}@{device}",
        backend=backend,
        device=device,
        queues=queues_served([queue], worker_tags(tags, device)),
        models=models,
        features=tuple(features),
        dtypes=tuple(dtypes),
        memory_budget_bytes=budget_bytes,
        abilities={} if ability is None else dict.fromkeys(models, ability),
    )


def ability(
    weights_bytes: Mapping[str, int] | None = None,
    per_pixel_bytes: int = 0,
    seconds: float | None = None,
    tasks: Sequence[Task] = (Task.TEXT2IMAGE,),
    limits: Mapping[str, float] | None = None,
    options: Iterable[str] = (),
) -> ModelAbility:
    return ModelAbility(
        limits={Task.TEXT2IMAGE.value: dict(limits or {})},
        tasks=tuple(tasks),
        execution_mode=ExecutionMode.LEGACY_CALL,
        options=tuple(options),
        weights_bytes=dict(weights_bytes or {}),
        working_bytes_per_pixel=per_pixel_bytes,
        seconds_per_unit=seconds,
    )


def find(model: str, *backends: Backend) -> ModelSpec:
    """The model, for these backends in this order where any are given."""
    spec = discover().find(model)
    return dataclasses.replace(spec, backends=backends) if backends else spec


def route(
    wish: ResolvedRequest, spec: ModelSpec, fleet: Sequence[WorkerCapability], waiting: Mapping[str, int] | None = None
) -> Route:
    outlook = judge(wish, spec, fleet)
    assert not outlook.findings
    return choose(outlook.prospects, waiting or {})


def refusal(wish: ResolvedRequest, spec: ModelSpec, fleet: Sequence[WorkerCapability]) -> OmnirtError:
    outlook = judge(wish, spec, fleet)
    assert outlook.findings
    assert not outlook.prospects, "what is refused goes nowhere"
    return failure(outlook.findings)


SHAPES = find("shapes", Backend.CPU, Backend.CUDA)
CPU, CUDA = worker("cpu-shapes", "shapes"), worker("cuda-shapes", "shapes")


@pytest.mark.parametrize(
    ("wish", "fleet", "waiting", "queue", "workers"),
    [
        ("auto", [], {}, "cpu-shapes", 0),
        ("auto", [CPU], {}, "cpu-shapes", 1),
        ("auto", [CUDA], {}, "cuda-shapes", 1),
        ("auto", [CPU, CUDA], {}, "cpu-shapes", 1),
        ("auto", [CPU, CUDA], {"cpu-shapes": 3, "cuda-shapes": 2}, "cuda-shapes", 1),
        ("auto", [CPU, CUDA, CUDA], {"cpu-shapes": 2, "cuda-shapes": 3}, "cuda-shapes", 2),
        ("cuda", [CPU], {}, "cuda-shapes", 0),
        ("auto", [worker("cuda-shapes", "other"), CPU], {"cpu-shapes": 9}, "cpu-shapes", 1),
    ],
)
def test_auto_prefers_live_workers_then_the_shortest_wait(
    wish: str, fleet: list[WorkerCapability], waiting: dict[str, int], queue: str, workers: int
) -> None:
    chosen = route(request(backend=wish), SHAPES, fleet, waiting)

    assert (chosen.queue, chosen.workers) == (queue, workers)


@pytest.mark.parametrize(
    ("cpu_s", "cuda_s", "waiting", "queue"),
    [
        ((4.0,), (0.1,), {"cpu-shapes": 1, "cuda-shapes": 30}, "cuda-shapes"),  # 4 s against 3 s
        ((4.0,), (0.1,), {"cpu-shapes": 1, "cuda-shapes": 50}, "cpu-shapes"),
        ((4.0, 4.0), (0.1,), {"cpu-shapes": 1, "cuda-shapes": 30}, "cpu-shapes"),  # two of them: 2 s against 3 s
        ((4.0, 1.0), (0.1,), {"cpu-shapes": 5, "cuda-shapes": 50}, "cpu-shapes"),  # together 1.25 a second: 4 s, 5 s
        ((4.0,), (None,), {"cpu-shapes": 1, "cuda-shapes": 30}, "cpu-shapes"),  # one has not told: jobs are counted
        ((4.0, None), (0.1,), {"cpu-shapes": 1, "cuda-shapes": 30}, "cpu-shapes"),
    ],
)
def test_a_wait_is_told_in_time_where_every_worker_has_measured_it(
    cpu_s: Sequence[float | None], cuda_s: Sequence[float | None], waiting: dict[str, int], queue: str
) -> None:
    fleet = [worker("cpu-shapes", "shapes", ability=ability(seconds=seconds)) for seconds in cpu_s]
    fleet += [worker("cuda-shapes", "shapes", ability=ability(seconds=seconds)) for seconds in cuda_s]

    assert route(request(), SHAPES, fleet, waiting).queue == queue


def test_a_request_with_tags_goes_where_a_worker_has_them_all() -> None:
    fleet = [CPU, worker("cuda-shapes", "shapes", tags=["eu", "gold"])]

    assert route(request(tags=["gold"]), SHAPES, fleet).queue == "cuda-shapes+gold"
    assert route(request(tags=["gold", "eu"]), SHAPES, fleet).queue == "cuda-shapes+eu+gold"
    assert route(request(tags=["silver"]), SHAPES, fleet) == route(request(tags=["silver"]), SHAPES, [])


def test_the_stub_runs_on_the_stub() -> None:
    assert route(request("stub"), find("stub"), []).queue == "cpu-stub-stub"


@pytest.mark.parametrize(
    ("name", "address"),
    [
        ("cpu-shapes", QueueAddress("cpu", "shapes")),
        ("cpu-stub-stub", QueueAddress("cpu-stub", "stub")),
        ("cuda-sdxl+eu+gold", QueueAddress("cuda", "sdxl", ("eu", "gold"))),
    ],
)
def test_a_queue_name_is_read_as_it_is_written(name: str, address: QueueAddress) -> None:
    assert parse_queue(name) == address
    assert queue_name(address.backend, address.queue, address.tags) == name


@pytest.mark.parametrize("name", ["celery", "tpu-shapes", "cpu-", "cpu", ""])
def test_a_queue_of_no_backend_is_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match="BACKEND-QUEUE"):
        parse_queue(name)


def test_a_worker_serves_its_queue_for_every_subset_of_its_tags() -> None:
    assert queues_served(["cpu-shapes"], ["gold", "eu"]) == (
        "cpu-shapes", "cpu-shapes+eu", "cpu-shapes+gold", "cpu-shapes+eu+gold",
    )  # fmt: skip


# In what it is computed


def test_half_precision_on_a_cpu_becomes_single_and_says_so() -> None:
    settled = settle(request(dtype="fp16"), route(request(), SHAPES, []))

    assert (settled.backend, settled.config["dtype"]) == ("cpu", "fp32")
    assert "fp16" in settled.warnings[0]


@pytest.mark.parametrize(
    ("fleet", "wish", "becomes"),
    [
        ([("fp32", "fp16")], "fp16", "fp16"),  # a CPU that does compute in it says so
        ([("fp32",)], "bf16", "fp32"),
        ([("fp32", "bf16"), ("fp32",)], "bf16", "fp32"),  # either may take the job
        ([("fp32", "bf16"), ()], "bf16", "bf16"),  # one that says nothing is not asked
        ([("bf16",)], "fp16", "bf16"),
        ([()], "fp16", "fp32"),
    ],
)
def test_a_request_runs_in_what_the_workers_of_its_queue_compute_in(
    fleet: list[tuple[str, ...]], wish: str, becomes: str
) -> None:
    workers = [worker("cpu-shapes", "shapes", dtypes=dtypes) for dtypes in fleet]

    settled = settle(request(dtype=wish), route(request(), SHAPES, workers))

    assert settled.config["dtype"] == becomes
    assert bool(settled.warnings) == (wish != becomes)


# What a worker can do


SDXL = find("sdxl-base-1.0", Backend.CUDA, Backend.CPU)
SIZE: dict[str, Any] = {"width": 1024, "height": 1024, "num_images_per_prompt": 1}
# In fp16: 7 GiB of weights, and 4 KiB for each pixel that is decoded at once (4 GiB a megapixel).
BIG = ability({"fp32": 14 * GIB, "fp16": 7 * GIB}, per_pixel_bytes=4096)


def sdxl_worker(
    budget_gib: float | None, backend: str = "cuda", index: int = 0, *, dtypes: Sequence[str] = ("fp32", "fp16")
) -> WorkerCapability:
    return worker(
        f"{backend}-sdxl",
        SDXL.id,
        device=f"{backend}:{index}",
        dtypes=dtypes,
        budget_bytes=None if budget_gib is None else round(budget_gib * GIB),
        ability=BIG,
    )


@pytest.mark.parametrize(
    ("budget_gib", "config", "fits"),
    [
        (11, {}, True),  # 7 and 4, to the byte
        (10.9, {}, False),
        (11, {"num_images_per_prompt": 2}, True),  # in two parts
        (10.9, {"num_images_per_prompt": 2}, False),
        (11, {"num_images_per_prompt": 2, "vae_slicing": True}, True),
        (11, {"width": 2048}, False),
        (11, {"width": 2048, "height": 512}, True),
        (21, {"dtype": "fp32"}, False),  # 14 and, at twice the width, 8
        (22, {"dtype": "fp32"}, True),
        (1, {"dtype": "bf16"}, True),  # settled to what the device does; see below
        (None, {"width": 2048}, True),  # a worker that cannot tell its memory is not held to it
    ],
)
def test_what_can_never_fit_is_refused(budget_gib: float | None, config: dict[str, Any], fits: bool) -> None:
    wish = request(SDXL.id, **(SIZE | {"dtype": "fp16"} | config))
    dtypes = ("fp32", "fp16", "bf16")  # of bf16 the record does not tell the size

    outlook = judge(wish, SDXL, [sdxl_worker(budget_gib, dtypes=dtypes)])

    assert bool(outlook.prospects) is fits
    assert bool(outlook.findings) is not fits


def test_the_refusal_tells_what_is_needed_what_there_is_and_what_to_change() -> None:
    error = refusal(request(SDXL.id, dtype="fp16", **SIZE), SDXL, [sdxl_worker(6, index=1), sdxl_worker(8)])

    assert isinstance(error, InsufficientMemory)
    assert error.http_status == 422
    for part in ("cuda:0", "fp16", *(in_words(gib * GIB) for gib in (11, 7, 4, 8))):
        assert part in error.message, "the device that comes nearest, and its figures"
    assert error.hint is not None
    assert "smaller" in error.hint
    assert [problem.rule for problem in error.details] == ["memory"]


def test_memory_is_counted_in_the_dtype_that_the_queue_settles_on() -> None:
    only_fp32 = sdxl_worker(12, dtypes=("fp32",))

    error = refusal(request(SDXL.id, dtype="fp16", **SIZE), SDXL, [only_fp32])
    beside_a_better_one = judge(request(SDXL.id, dtype="fp16", **SIZE), SDXL, [only_fp32, sdxl_worker(12, index=1)])

    assert in_words(22 * GIB) in error.message
    assert beside_a_better_one.findings, "either may take the job, so both run in fp32"


@pytest.mark.parametrize(
    ("budgets_gib", "config", "pictures"),
    [
        ((80,), {}, 18),
        ((80, 20), {}, 3),  # whichever of them takes it
        ((80, 8), {}, 18),  # the second could run none of it
        ((8,), {}, None),
        ((80,), {"dtype": "fp32"}, 8),
        ((80,), {"vae_slicing": True}, None),
        ((None,), {}, None),
        ((), {}, None),
    ],
)
def test_pictures_fit_as_the_workers_of_the_queue_have_memory(
    budgets_gib: tuple[float | None, ...], config: dict[str, Any], pictures: int | None
) -> None:
    fleet = [sdxl_worker(gib, index=index) for index, gib in enumerate(budgets_gib)]
    wish = request(SDXL.id, **(SIZE | {"dtype": "fp16", "num_images_per_prompt": 16} | config))

    assert pictures_that_fit(wish, SDXL, "cuda-sdxl", fleet) == pictures


def test_the_frames_of_a_video_count_as_its_pictures() -> None:
    fits = judge(request(SDXL.id, dtype="fp16", num_frames=1, **SIZE), SDXL, [sdxl_worker(11)])
    too_long = judge(request(SDXL.id, dtype="fp16", num_frames=2, **SIZE), SDXL, [sdxl_worker(11)])

    assert fits.prospects
    assert too_long.findings


@pytest.mark.parametrize(
    ("fleet", "queue"),
    [
        ([sdxl_worker(8), sdxl_worker(64, "cpu")], "cpu-sdxl"),  # cuda comes first in the spec, but has no room
        ([sdxl_worker(80), sdxl_worker(8, index=1), sdxl_worker(64, "cpu")], "cpu-sdxl"),  # any may take it there
        ([sdxl_worker(80), sdxl_worker(8, index=1)], "cuda-sdxl"),  # better than to refuse
        ([sdxl_worker(80), sdxl_worker(8, index=1), sdxl_worker(2, "cpu")], "cuda-sdxl"),
    ],
)
def test_a_queue_is_preferred_where_whoever_takes_the_job_can_run_it(fleet: list[WorkerCapability], queue: str) -> None:
    waiting = {queue: 1_000}  # however long it is

    assert route(request(SDXL.id, dtype="fp16", **SIZE), SDXL, fleet, waiting).queue == queue


def test_what_is_beyond_a_workers_own_limits_goes_elsewhere_or_is_refused_by_the_field() -> None:
    narrow = worker("cpu-shapes", "shapes", ability=ability(limits={"num_inference_steps": 20, "num_frames": 9}))
    wide = worker("cuda-shapes", "shapes", ability=ability(limits={"num_inference_steps": 200}))
    wish = request(num_inference_steps=30)

    error = refusal(wish, SHAPES, [narrow])

    assert [(problem.loc, problem.rule) for problem in error.details] == [("config.num_inference_steps", "maximum")]
    assert "30 is above 20" in error.details[0].message
    assert route(wish, SHAPES, [narrow, wide]).queue == "cuda-shapes"
    assert route(request(num_inference_steps=20), SHAPES, [narrow, wide]).queue == "cpu-shapes"
    frames = refusal(request(num_frames=13), SHAPES, [narrow])
    assert [problem.loc for problem in frames.details] == ["inputs.num_frames"]


def test_a_job_on_several_devices_needs_a_worker_that_gives_them() -> None:
    one, four = (worker(f"{name}-shapes", "shapes", ability=ability()) for name in ("cpu", "cuda"))
    four = four.model_copy(update={"ranks_max": 4})

    error = refusal(request(devices=2), SHAPES, [one])

    assert [problem.loc for problem in error.details] == ["config.devices"]
    assert "cpu:0 gives 1" in error.details[0].message
    assert route(request(devices=2), SHAPES, [one, four]).queue == "cuda-shapes"


def test_a_wish_to_compile_needs_a_device_that_can() -> None:
    able = worker("cuda-shapes", "shapes", features=["compile"], ability=ability())
    unable = worker("cpu-shapes", "shapes", ability=ability())

    error = refusal(request(compile=True), SHAPES, [unable])

    assert error.http_status == 422
    assert [problem.loc for problem in error.details] == ["config.compile"]
    assert "cpu:0" in str(error)
    assert route(request(compile=True), SHAPES, [unable, able]).queue == "cuda-shapes"
    assert route(request(compile=False), SHAPES, [unable, able]).queue == "cpu-shapes"


def test_a_task_that_no_live_worker_does_is_refused() -> None:
    older = worker("cuda-sdxl", SDXL.id, ability=ability(tasks=[Task.TEXT2IMAGE]))
    wish = request(SDXL.id, task=Task.IMAGE2IMAGE, dtype="fp16")

    error = refusal(wish, SDXL, [older])

    assert [problem.loc for problem in error.details] == ["task"]
    assert "text2image" in str(error)


def test_the_refusal_tells_what_the_nearest_worker_lacks_so_that_mending_it_is_enough() -> None:
    small = sdxl_worker(8)  # lacks memory, and cannot compile
    large = sdxl_worker(80, "cpu")  # only cannot compile
    wish = request(SDXL.id, dtype="fp16", compile=True, **SIZE)

    error = refusal(wish, SDXL, [small, large])

    assert [problem.loc for problem in error.details] == ["config.compile"]
    assert route(request(SDXL.id, dtype="fp16", **SIZE), SDXL, [small, large]).queue == "cpu-sdxl"


def test_one_thing_that_is_lacking_is_nearer_than_two() -> None:
    small = worker("cuda-sdxl", SDXL.id, features=["compile"], budget_bytes=8 * GIB, ability=BIG)
    older = worker("cpu-sdxl", SDXL.id, ability=ability(tasks=[]))  # neither does the task nor compiles

    error = refusal(request(SDXL.id, dtype="fp16", compile=True, **SIZE), SDXL, [older, small])

    assert isinstance(error, InsufficientMemory)


def test_a_record_that_tells_no_abilities_is_not_held_against_its_worker() -> None:
    older = worker("cpu-shapes", "shapes", budget_bytes=1)

    assert route(request(compile=True, width=64, height=64), SHAPES, [older]).workers == 1


def test_what_a_live_worker_lacks_says_nothing_where_none_lives() -> None:
    chosen = route(request(SDXL.id, dtype="fp16", compile=True, **SIZE), SDXL, [])

    assert (chosen.queue, chosen.workers) == ("cuda-sdxl", 0)


@pytest.mark.parametrize(
    ("fleet", "queue"),
    [
        ([CUDA, worker("cuda-shapes", "other"), CPU], "cpu-shapes"),  # any of the queue may take the job
        ([CUDA, worker("cuda-shapes", "other", device="cuda:1")], "cuda-shapes"),  # better than to refuse
        ([worker("cuda-shapes", "other"), CPU], "cpu-shapes"),
    ],
)
def test_a_worker_of_the_queue_without_the_model_is_one_that_cannot(fleet: list[WorkerCapability], queue: str) -> None:
    waiting = {queue: 1_000}

    assert route(request(), find("shapes", Backend.CUDA, Backend.CPU), fleet, waiting).queue == queue


@pytest.mark.parametrize("device", ["auto", "cpu:0"])
def test_where_only_workers_without_the_model_live_it_is_refused_with_what_to_do(device: str) -> None:
    error = refusal(request(device=device), SHAPES, [worker("cpu-shapes", "other")])

    assert [(problem.loc, problem.rule) for problem in error.details] == [("model", "served")]
    assert "cpu:0" in error.details[0].message
    assert "Choose another model" in error.details[0].message


def test_a_worker_without_the_model_is_farther_than_one_that_lacks_memory_for_it() -> None:
    without = worker("cpu-sdxl", "other")

    error = refusal(request(SDXL.id, dtype="fp16", compile=True, **SIZE), SDXL, [without, sdxl_worker(8)])

    assert {problem.loc for problem in error.details} == {"config.compile", "config"}


def test_a_worker_without_the_model_has_no_say_in_what_the_others_compute_in() -> None:
    other = worker("cuda-sdxl", "other", device="cuda:1", dtypes=("fp32",))

    assert route(request(SDXL.id, dtype="fp16", **SIZE), SDXL, [sdxl_worker(80), other]).dtypes == ("fp32", "fp16")


@pytest.mark.parametrize(
    ("config", "refused"),
    [
        ({"vae_slicing": True}, ["config.vae_slicing"]),
        ({"vae_slicing": False}, []),  # what it does anyway
        ({"num_inference_steps": 7}, []),
        ({"vae_slicing": True, "scheduler": "ddim"}, ["config.vae_slicing", "config.scheduler"]),
    ],
)
def test_an_option_that_a_worker_does_not_know_goes_elsewhere_or_is_refused(
    config: dict[str, Any], refused: list[str]
) -> None:
    older = worker("cpu-shapes", "shapes", ability=ability(options=["num_inference_steps"]))
    newer = worker("cuda-shapes", "shapes", ability=ability(options=SHAPES.tasks[Task.TEXT2IMAGE].options))

    outlook = judge(request(**config), SHAPES, [older])

    assert [finding.problem.loc for finding in outlook.findings] == refused
    assert {finding.problem.rule for finding in outlook.findings} <= {"supported"}
    assert route(request(**config), SHAPES, [older, newer]).queue == ("cuda-shapes" if refused else "cpu-shapes")


# A named device


@pytest.mark.parametrize(
    ("device", "tag"),
    [("cuda:1", "cuda-1"), ("cpu:0", "cpu-0"), ("cpu-stub:3", "cpu-stub-3"), ("ascend:0", "ascend-0")],
)
def test_a_worker_has_the_tag_of_its_device(device: str, tag: str) -> None:
    assert device_tag(device) == tag
    assert worker_tags(["gold", "eu"], device) == tuple(sorted(["gold", "eu", tag]))


def test_an_operators_tag_cannot_pose_as_a_device() -> None:
    with pytest.raises(ConfigurationError, match="'cuda-1'"):
        worker_tags(["cuda-1"], "cuda:0")


TWO_GPUS = [worker("cuda-shapes", "shapes", device=f"cuda:{index}", tags=["eu"]) for index in range(2)]


@pytest.mark.parametrize(
    ("wish", "queue", "workers"),
    [
        (request(device="auto"), "cpu-shapes", 1),
        (request(device="cuda:1"), "cuda-shapes+cuda-1", 1),  # of "auto" backends, the device's
        (request(device="cuda:1", backend="cuda"), "cuda-shapes+cuda-1", 1),
        (request(device="cpu:0"), "cpu-shapes+cpu-0", 1),
        (request(device="cuda:0", tags=["eu"]), "cuda-shapes+cuda-0+eu", 1),
        (request(device="cuda:0", tags=["moon"]), "cuda-shapes+cuda-0+moon", 0),  # nobody lives with that tag
    ],
)
def test_a_job_for_a_device_goes_to_a_queue_that_its_workers_alone_serve(
    wish: ResolvedRequest, queue: str, workers: int
) -> None:
    chosen = route(wish, SHAPES, [CPU, *TWO_GPUS])

    assert (chosen.queue, chosen.workers) == (queue, workers)
    assert settle(wish, chosen).config["device"] == wish.config["device"], "what was asked for stays to be seen"


def test_a_device_is_waited_for_while_nobody_lives() -> None:
    assert route(request(device="cuda:7"), SHAPES, []).queue == "cuda-shapes+cuda-7"


def test_a_device_that_no_live_worker_has_is_refused_with_those_that_there_are() -> None:
    error = refusal(request(device="cuda:2"), SHAPES, [CPU, *TWO_GPUS])
    among_its_own = refusal(request(device="cuda:2", backend="cuda"), SHAPES, [CPU, *TWO_GPUS])

    assert "cpu:0, cuda:0, cuda:1" in str(error)
    assert "cpu:0" not in str(among_its_own)
    assert [problem.loc for problem in error.details] == ["config.device"]


def test_a_named_device_is_held_to_its_own_memory() -> None:
    fleet = [sdxl_worker(80), sdxl_worker(8, index=1)]

    error = refusal(request(SDXL.id, device="cuda:1", dtype="fp16", **SIZE), SDXL, fleet)

    assert isinstance(error, InsufficientMemory)
    assert route(request(SDXL.id, device="cuda:0", dtype="fp16", **SIZE), SDXL, fleet).queue == "cuda-sdxl+cuda-0"


@pytest.mark.parametrize("device", ["gpu", "cuda", "cuda:", "cuda:x", "cuda:01", "cuda:1234", "tpu:0", "", "cuda:0+eu"])
def test_what_names_no_device_is_refused(device: str) -> None:
    error = refusal(request(device=device), SHAPES, [])

    assert error.details[0].rule == "pattern"
    assert "cpu:0" in str(error), "the form is shown"


def test_a_device_of_another_backend_is_refused() -> None:
    assert isinstance(refusal(request(device="ascend:0"), SHAPES, [CPU]), BackendUnsupported)
    error = refusal(request(device="cuda:0", backend="cpu"), SHAPES, [CPU, *TWO_GPUS])
    assert "backend cpu" in str(error)


# The rule behind all tables

WORKERS = st.builds(
    lambda backend, index, budget_gib, features, known: worker(
        f"{backend}-sdxl",
        SDXL.id,
        device=f"{backend}:{index}",
        features=features,
        dtypes=("fp32", "fp16"),
        budget_bytes=budget_gib * GIB,
        ability=BIG if known else None,
    ),
    st.sampled_from(["cuda", "cpu"]),
    st.integers(0, 2),
    st.integers(1, 40),
    st.sampled_from([(), ("compile",)]),
    st.booleans(),
)


@given(
    fleet=st.lists(WORKERS, max_size=5),
    pictures=st.integers(1, 8),
    compiled=st.booleans(),
    device=st.sampled_from(["auto", "cuda:0", "cuda:1", "cpu:0"]),
    waiting=st.dictionaries(st.sampled_from(["cuda-sdxl", "cpu-sdxl"]), st.integers(0, 100)),
)
def test_no_queue_is_chosen_whose_every_worker_is_unable_while_another_could(
    fleet: list[WorkerCapability], pictures: int, compiled: bool, device: str, waiting: dict[str, int]
) -> None:
    wish = request(
        SDXL.id, dtype="fp16", compile=compiled, device=device, **(SIZE | {"num_images_per_prompt": pictures})
    )

    def can(record: WorkerCapability) -> bool:  # by a worker's own record, in plain words; a picture at a time
        if device not in {"auto", record.device}:
            return False
        known = bool(record.abilities)
        room_bytes = record.memory_budget_bytes or 0
        return not known or ((not compiled or "compile" in record.features) and room_bytes >= 11 * GIB)

    outlook = judge(wish, SDXL, fleet)

    if not any(map(can, fleet)):
        assert bool(outlook.findings) == bool(fleet), "refused where somebody lives, else queued"
        return
    assert not outlook.findings
    chosen = choose(outlook.prospects, waiting)
    takers = [record for record in fleet if chosen.queue in record.queues]
    assert any(map(can, takers))
    by_backend = {name: [record for record in fleet if record.backend == name] for name in ("cuda", "cpu")}
    if device == "auto" and any(records and all(map(can, records)) for records in by_backend.values()):
        assert all(map(can, takers)), "a queue where whoever takes it can run it was there"
