"""How a big request becomes parts, how many pictures each has, and what Celery is told of the job as a whole."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omnirt_tasks.contract import ExecutionMode, Inputs, ModelAbility, ResolvedRequest, Task, WorkerCapability
from omnirt_tasks.contract.capability import ChunkMeasure
from omnirt_tasks.jobs.values import NewPart
from omnirt_tasks.registry.spec import SEED_MAX
from omnirt_tasks.splitting import PICTURES_UNMEASURED, pictures_per_part, split

QUEUE = "cpu-shapes"
SIZE = {"width": 512, "height": 512, "dtype": "fp16"}

Picture = tuple[int, str, int]
"""Its index in the job, its prompt, its seed."""


def request(
    prompt: str | tuple[str, ...] = "a red circle", *, task: Task = Task.TEXT2IMAGE, seed: int = 7, **config: Any
) -> ResolvedRequest:
    return ResolvedRequest(
        task=task,
        model="shapes",
        backend="cpu",
        inputs=Inputs(prompt=prompt, negative_prompt="blurry"),
        config={"seed": seed, "num_inference_steps": 4, **SIZE, **config},
        metadata={"who": "test"},
        deadline_s=60.0,
    )


def pictures(whole: ResolvedRequest, first: int = 0) -> list[Picture]:
    """What an executor makes of a request: each prompt's pictures in turn, with one seed after another."""
    prompt, seed, count = whole.inputs.prompt, whole.config["seed"], whole.config.get("num_images_per_prompt", 1)
    assert isinstance(seed, int)
    assert isinstance(count, int)
    prompts = [prompt] if isinstance(prompt, str) else list(prompt or ())
    each = [text for text in prompts for _ in range(count)]
    return [(first + index, text, (seed + index) % (SEED_MAX + 1)) for index, text in enumerate(each)]


def told(parts: tuple[NewPart, ...]) -> list[Picture]:
    return [picture for part in parts for picture in pictures(part.resolved, part.first_output)]


def without_share(resolved: ResolvedRequest) -> ResolvedRequest:
    """All that a part has from its job unchanged."""
    config = {name: value for name, value in resolved.config.items() if name not in {"seed", "num_images_per_prompt"}}
    inputs = resolved.inputs.model_copy(update={"prompt": None})
    return resolved.model_copy(update={"inputs": inputs, "config": config})


prompt_lists = st.one_of(
    st.text("ab", min_size=1, max_size=2),
    st.lists(st.text("ab", min_size=1, max_size=2), min_size=1, max_size=16).map(tuple),
)


@given(
    prompt=prompt_lists,
    count=st.one_of(st.none(), st.integers(1, 16)),
    per_part=st.integers(1, 20),
    seed=st.one_of(st.integers(0, 100), st.integers(SEED_MAX - 20, SEED_MAX)),
)
def test_the_parts_together_are_exactly_the_pictures_of_the_whole(
    prompt: str | tuple[str, ...], count: int | None, per_part: int, seed: int
) -> None:
    given_count: dict[str, Any] = {} if count is None else {"num_images_per_prompt": count}
    whole = request(prompt, seed=seed, **given_count)
    wanted = pictures(whole)

    parts = split(whole, per_part)

    if len(wanted) <= per_part:
        assert parts == (), "one chunk would do"
        return
    assert told(parts) == wanted
    seeds = [part.resolved.config["seed"] for part in parts]
    assert all(isinstance(each, int) and 0 <= each <= SEED_MAX for each in seeds)
    sizes = [len(pictures(part.resolved)) for part in parts]
    assert max(sizes) <= per_part, "a part is larger than a chunk"
    assert max(sizes) - min(sizes) <= 1, "one worker gets much more to do than another"
    assert len(parts) == -(-len(wanted) // per_part), "more parts than are needed"
    assert {without_share(part.resolved).model_dump_json() for part in parts} == {
        without_share(whole).model_dump_json()
    }
    assert [set(part.resolved.config) for part in parts] == [set(whole.config)] * len(parts), "no option comes or goes"


def test_the_pictures_of_one_prompt_stay_one_prompt_and_those_of_several_become_a_list() -> None:
    parts = split(request(("a", "b"), num_images_per_prompt=3), 2)

    shares = [(part.resolved.inputs.prompt, part.resolved.config["num_images_per_prompt"]) for part in parts]
    assert shares == [("a", 2), (("a", "b"), 1), ("b", 2)]
    assert [(part.first_output, part.resolved.config["seed"]) for part in parts] == [(0, 7), (2, 9), (4, 11)]


def test_only_text2image_is_split() -> None:
    for task in (Task.IMAGE2IMAGE, Task.EDIT, Task.TEXT2VIDEO):
        assert split(request(task=task, num_images_per_prompt=8), 1) == ()


# How many pictures


def measure(
    limit: int, *, module: str = "unet", shape: str = "512x512 fp16", largest: int | None = None
) -> ChunkMeasure:
    """What pays is `limit`, and calls of up to `largest` rows were measured: twice as many, so it is known to."""
    step_ms = {"1": 1.0, str(2 * limit if largest is None else largest): 2.0}
    return ChunkMeasure(module=module, shape=shape, limit=limit, gain=1.5, step_ms=step_ms)


def worker(*measures: ChunkMeasure, queue: str = QUEUE, model: str = "shapes") -> WorkerCapability:
    ability = ModelAbility(tasks=(Task.TEXT2IMAGE,), execution_mode=ExecutionMode.MODULAR, chunks=measures)
    return WorkerCapability(worker_id="w", backend="cpu", device="cpu:0", queues=(queue,), abilities={model: ability})


@pytest.mark.parametrize(
    ("workers", "limit", "expected"),
    [
        ([], None, PICTURES_UNMEASURED),
        ([worker()], None, PICTURES_UNMEASURED),
        ([], 2, 2),
        ([], 1, 1),
        # Two rows for each picture; any worker of the queue may take a part, so the weakest counts.
        ([worker(measure(16))], None, 8),
        ([worker(measure(16)), worker(measure(6)), worker()], None, 3),
        ([worker(measure(7))], None, 3),
        ([worker(measure(16))], 5, 5),
        ([worker(measure(1))], None, 1),
        # Nothing larger was measured yet: small jobs alone would else keep all later ones small.
        ([worker(measure(2, largest=2))], None, PICTURES_UNMEASURED),
        ([worker(measure(16, largest=16))], None, 8),
        # What says nothing of this request's denoiser at this size.
        ([worker(measure(16)), worker(measure(2), queue="cpu-other")], None, 8),
        ([worker(measure(16)), worker(measure(2), model="other")], None, 8),
        ([worker(measure(16), measure(2, module="vae.decode"), measure(2, module="text_encoder"))], None, 8),
        ([worker(measure(16), measure(2, shape="1024x1024 fp16"), measure(2, shape="512x512 fp32"))], None, 8),
        ([worker(measure(12, module="transformer", shape="512x512"))], None, 6),
    ],
)
def test_a_part_has_as_many_pictures_as_pay_on_the_weakest_worker_that_may_take_it(
    workers: list[WorkerCapability], limit: int | None, expected: int
) -> None:
    assert pictures_per_part(workers, QUEUE, request(), limit) == expected
