"""Which calls may become one: keys, tables, and how arguments are joined. On functions, not on pipelines."""

import logging
from collections.abc import Callable
from inspect import Parameter, Signature
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests.support.tiny_models import tiny_sdxl
from workers.chunks.arguments import Absent, ListOfEqual, Mask, NamedRows, Numbers, Padded, Rows, Shared, Unread
from workers.chunks.calls import DeviceCall, Joint
from workers.chunks.methods import SharedMethod
from workers.chunks.outputs import Unsplittable, split
from workers.chunks.tables import TABLES, Table, Unshared, sharing_of
from workers.executors.heavy import send_to_device


class Denoiser(nn.Module):
    """Every kind of argument there is; each number of its result depends on all of them, and on its own row alone."""

    def forward(
        self,
        sample: torch.Tensor,
        timestep: Any,
        text: torch.Tensor | None = None,
        text_mask: torch.Tensor | None = None,
        added: dict[str, torch.Tensor | None] | None = None,
        shapes: list[Any] | None = None,
        ids: Any = None,
        scale: Any = None,
        generator: Any = None,
        residuals: Any = None,
        return_dict: bool = True,
    ) -> Any:
        del generator, residuals
        number = torch.as_tensor(timestep, dtype=torch.float64).reshape(-1, 1).expand(len(sample), 1)
        result = sample.double().flatten(1).sum(1, keepdim=True) + number
        if text is not None:
            kept = torch.ones(text.shape[:2], dtype=torch.bool) if text_mask is None else text_mask.bool()
            result = result + (text * kept[..., None]).flatten(1).sum(1, keepdim=True)
        if added is not None:
            for rows in added.values():
                result = result if rows is None else result + rows.flatten(1).sum(1, keepdim=True)
        if shapes is not None:  # as real ones do: from the first row, for all
            result = result * sum(shapes[0])
        if ids is not None:
            result = result + (ids.sum() if isinstance(ids, torch.Tensor) else len(repr(ids)))
        result = result * (2 if scale is None else len(repr(scale)))
        return {"sample": result} if return_dict else (result,)


TABLE = Table(
    main="sample",
    arguments={
        "sample": Rows(),
        "timestep": Numbers(),
        "text": Padded(mask="text_mask"),
        "text_mask": Mask(of="text"),
        "added": NamedRows(frozenset({"pooled", "time_ids"})),
        "shapes": ListOfEqual(),
        "ids": Shared(),
        "scale": Shared(),
        "generator": Unread(),
        "residuals": Absent(),
        "return_dict": Shared(),
    },
)


def shared_method(module: Denoiser | None = None, function: Callable[..., Any] | None = None) -> SharedMethod:
    module = module or Denoiser()
    return SharedMethod(module, function or module.forward, "unet", TABLE)


def sample(rows: int = 1, side: int = 2) -> torch.Tensor:
    return torch.arange(rows * side, dtype=torch.float32).reshape(rows, side) + 1


def text(rows: int = 1, length: int = 3) -> torch.Tensor:
    return torch.ones(rows, length, 2)


def joint_of(call: DeviceCall) -> Joint:
    assert call.joint is not None
    return call.joint


# What may stand for an argument of so many rows, with texts of that length; some of it may be merged with nothing.
CHOICES: dict[str, tuple[Callable[[int, int], Any], ...]] = {
    "sample": (
        lambda rows, _: sample(rows),
        lambda rows, _: sample(rows, 3),
        lambda rows, _: sample(rows).double(),
    ),
    "timestep": (
        lambda rows, _: torch.arange(rows),
        lambda *_: 7,
        lambda *_: 7.5,
        lambda *_: torch.tensor(2.5),
        lambda *_: torch.tensor([4]),
        lambda *_: True,
    ),
    "text": (text, lambda *_: None, lambda rows, length: text(rows, length)[..., :1]),
    "text_mask": (
        lambda *_: None,
        lambda rows, length: torch.arange(length).expand(rows, length) < max(1, length - 1),
        torch.ones,
    ),
    "added": (
        lambda *_: None,
        lambda rows, _: {"pooled": sample(rows)},
        lambda rows, _: {"pooled": sample(rows), "image": None},
        lambda *_: {"pooled": sample(1)},
        lambda rows, _: {"image": sample(rows)},
    ),
    "shapes": (
        lambda *_: None,
        lambda rows, _: [(1, 2)] * rows,
        lambda rows, _: [[1, 2]] * rows,
        lambda rows, _: [(2, 1, 4)] * rows,
        lambda rows, _: [(1, 2), *[(4, 2)] * (rows - 1)],
    ),
    "ids": (
        lambda *_: None,
        lambda *_: torch.tensor([1, 2]),
        lambda *_: torch.tensor([1, 3]),
        lambda *_: torch.tensor([1.0, 2.0]),
        lambda *_: torch.tensor([[1, 2]]),
    ),
    "scale": tuple(
        lambda *_, value=value: value
        for value in (None, True, 1, 1.0, "1", "", (), [], [1], (1,), {"a": 1}, {"a": 1.0}, {}, {1}, object())
    ),
    "generator": (lambda *_: None, lambda *_: object()),
    "residuals": (lambda *_: None, lambda *_: None, lambda *_: [1]),
    "return_dict": (lambda *_: True, lambda *_: False),
}
OFTEN_ALIKE = st.integers(0, 9)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of two calls that differ in a few of them, and in their rows and lengths; some are left out."""
    choices = {name: draw(st.sampled_from(made)) for name, made in CHOICES.items()}
    calls = []
    for _ in range(2):
        rows, length = draw(st.integers(1, 3)), draw(st.integers(1, 3))
        own = {
            name: draw(st.sampled_from(CHOICES[name])) if draw(OFTEN_ALIKE) == 0 else choice
            for name, choice in choices.items()
        }
        made = {name: choice(rows, length) for name, choice in own.items()}
        kept = {name: value for name, value in made.items() if value is not None or draw(st.booleans())}
        calls.append({"timestep": 1, **kept})
    return calls[0], calls[1]


MODULES = (Denoiser(), Denoiser())


@given(pair=pairs(), places=st.sampled_from([(0, 0), (0, 0), (0, 1)]))
def test_whatever_calls_have_equal_keys_give_together_what_they_give_alone(
    pair: tuple[dict[str, Any], dict[str, Any]], places: tuple[int, int]
) -> None:
    methods = [SharedMethod(module, module.forward, "unet", TABLE) for module in MODULES]
    calls = [methods[place].call((), kwargs) for place, kwargs in zip(places, pair, strict=True)]

    if calls[0].key != calls[1].key:
        return
    assert places[0] == places[1], "two modules are never one"
    alone = [result[0] if isinstance(result, tuple) else result["sample"] for result in (call() for call in calls)]
    results = joint_of(calls[0]).together(calls)
    together = [result[0] if isinstance(result, tuple) else result["sample"] for result in results]
    for mine, its in zip(together, alone, strict=True):
        assert torch.equal(mine, its)


def test_calls_that_differ_in_rows_text_length_and_timestep_have_one_key() -> None:
    method = shared_method()
    calls = [
        method.call((sample(2), 7), {"text": text(2, 3)}),
        method.call((sample(1),), {"timestep": torch.tensor(2.5), "text": text(1, 5), "text_mask": None}),
        method.call((), {"sample": sample(3), "timestep": torch.arange(3), "text": text(3, 1), "generator": object()}),
    ]

    assert len({call.key for call in calls}) == 1
    assert [call.rows for call in calls] == [2, 1, 3]


@pytest.mark.parametrize(
    ("name", "one", "other"),
    [
        ("sample", sample(1, 2), sample(1, 3)),
        ("sample", sample(), sample().double()),
        ("scale", 1, True),
        ("scale", 1, 1.0),
        ("scale", 1, "1"),
        ("scale", "a, b", ["a", "b"]),
        ("scale", (1,), [1]),
        ("scale", {"a": 1}, {"a": 2}),
        ("ids", torch.tensor([1, 2]), torch.tensor([2, 1])),
        ("ids", torch.tensor([1, 2]), torch.tensor([1.0, 2.0])),
        ("ids", torch.zeros(2), torch.zeros(2, 1)),
        ("ids", torch.zeros(2), None),
        ("shapes", [(32, 64)], [(64, 32)]),
        ("added", {"pooled": sample()}, {"time_ids": sample()}),
        ("added", {"pooled": sample()}, None),
        ("text", text()[..., :1], text()),
        ("return_dict", True, False),
    ],
)
def test_calls_that_differ_in_what_they_must_agree_in_never_have_one_key(name: str, one: Any, other: Any) -> None:
    method = shared_method()

    keys = {method.call((), {"sample": sample(), "timestep": 1, name: value}).key for value in (one, other)}

    assert len(keys) == 2


def test_the_same_call_of_two_modules_of_one_class_has_two_keys() -> None:
    assert shared_method().call((sample(), 1), {}).key != shared_method().call((sample(), 1), {}).key


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("residuals", [torch.zeros(1)]),
        ("text", text(2)),
        ("text", torch.ones(1, 3)),
        ("added", {"image_embeds": sample()}),
        ("added", {"pooled": [sample()]}),
        ("timestep", torch.ones(3)),
        ("timestep", True),
        ("shapes", [(1, 2), (1, 2)]),
        ("scale", object()),
        ("scale", {1: 2}),
        ("sample", torch.zeros(0, 2)),
    ],
)
def test_a_call_that_uses_an_argument_in_an_unknown_way_runs_alone_and_the_log_names_it_once(
    name: str, value: Any, caplog: pytest.LogCaptureFixture
) -> None:
    method = shared_method()
    with caplog.at_level(logging.WARNING):
        calls = [method.call((), {"sample": sample(), "timestep": 1, name: value}) for _ in range(2)]

    assert calls[0].key != calls[1].key
    assert calls[0].joint is None
    (warning,) = (record for record in caplog.records if record.name.startswith("workers."))
    assert name in warning.getMessage()


def test_a_further_argument_of_a_method_that_takes_any_makes_a_call_run_alone() -> None:
    method = shared_method(function=lambda sample, timestep, **more: sample)

    assert method.call((sample(), 1), {"scale": 2}).joint is method
    assert method.call((sample(), 1), {"depth": 2}).joint is None


def test_shapes_that_differ_from_row_to_row_run_alone() -> None:
    call = shared_method().call((sample(2), 1), {"shapes": [(1, 2), (2, 1)]})

    assert call.joint is None


def test_timesteps_of_any_kind_become_one_number_per_row_and_lose_nothing() -> None:
    seen: list[torch.Tensor] = []
    fine = 0.1  # no float32 is that

    def spy(sample: torch.Tensor, timestep: Any) -> torch.Tensor:
        seen.append(timestep)
        return sample

    method = shared_method(function=spy)
    calls = [
        method.call((sample(2), fine), {}),
        method.call((sample(1), torch.tensor(999)), {}),
        method.call((sample(2), torch.tensor([0.5, 0.25], dtype=torch.float16)), {}),
    ]
    joint_of(calls[0]).together(calls)

    assert seen[0].tolist() == [fine, fine, 999.0, 0.5, 0.25]


def test_texts_of_one_length_are_merged_without_a_mask_and_others_with_one() -> None:
    seen: list[Any] = []

    def spy(sample: torch.Tensor, timestep: Any, text: Any, text_mask: Any = None) -> torch.Tensor:
        del timestep, text
        seen.append(text_mask)
        return sample

    method = shared_method(function=spy)
    for lengths in ((3, 3), (3, 1)):
        calls = [method.call((sample(), 1), {"text": text(1, length)}) for length in lengths]
        joint_of(calls[0]).together(calls)

    assert seen[0] is None
    assert seen[1].tolist() == [[True, True, True], [True, False, False]]


def test_a_shared_tensor_that_was_changed_in_place_changes_the_key() -> None:
    method, ids = shared_method(), torch.zeros(2)
    before = method.call((sample(), 1), {"ids": ids}).key
    assert method.call((sample(), 1), {"ids": ids.clone()}).key == before, "its content counts, not its place"

    ids[0] = 1

    assert method.call((sample(), 1), {"ids": ids}).key != before


@pytest.mark.parametrize("result", [torch.zeros(2, 3), torch.zeros(()), (torch.zeros(3), torch.zeros(4)), object()])
def test_a_result_that_has_not_the_rows_where_they_belong_is_never_split(result: Any) -> None:
    with pytest.raises(Unsplittable):
        split(result, [1, 2])


def test_what_a_member_does_to_its_result_no_other_sees() -> None:
    method = shared_method(function=lambda sample, timestep: (sample, None))
    calls = [method.call((sample(), 1), {}) for _ in range(2)]
    first, second = joint_of(calls[0]).together(calls)

    first[0].untyped_storage().fill_(255)

    assert torch.equal(second[0], sample())
    assert torch.equal(calls[0].kwargs["sample"], sample())


def test_a_call_of_one_row_has_no_halves_and_one_of_three_has_two_that_make_it_whole() -> None:
    method = shared_method()
    assert joint_of(single := method.call((sample(1), 1), {})).halves(single) is None

    call = method.call(
        (sample(3), torch.arange(3)),
        {"text": text(3), "added": {"pooled": sample(3)}, "shapes": [(1, 2)] * 3, "ids": torch.ones(1)},
    )
    halves = joint_of(call).halves(call)

    assert halves is not None
    assert [half.rows for half in halves] == [2, 1]
    assert torch.equal(joint_of(call).whole(halves[0](), halves[1]())["sample"], call()["sample"])


def test_pictures_that_are_encoded_together_have_each_its_own_distribution() -> None:
    vae = tiny_sdxl().vae
    method = SharedMethod(vae, vae.encode, "vae.encode", TABLES["diffusers", "AutoencoderKL", "encode"])
    with torch.no_grad(), torch.random.fork_rng():
        calls = [method.call((torch.rand(rows, 3, 16, 16),), {}) for rows in (1, 2)]
        alone = [call().latent_dist for call in calls]
        together = [result.latent_dist for result in joint_of(calls[0]).together(calls)]
        first, second = joint_of(calls[1]).halves(calls[1]) or pytest.fail("it has two rows")
        whole = joint_of(calls[1]).whole(first(), second()).latent_dist

    for mine, its in zip([*together, whole], [*alone, alone[1]], strict=True):
        assert torch.allclose(mine.mean, its.mean, atol=1e-5)
        assert torch.allclose(mine.std, its.std, atol=1e-5)
    together[0].mean.fill_(7)
    assert torch.allclose(together[1].mean, alone[1].mean, atol=1e-5)


@pytest.mark.parametrize(("library", "name", "method"), TABLES)
def test_every_class_with_a_table_is_shared_as_the_libraries_are_today(library: str, name: str, method: str) -> None:
    import diffusers
    import transformers

    kind = getattr({"diffusers": diffusers, "transformers": transformers}[library], name)
    module = with_weight(kind)

    assert isinstance(sharing_of(module, getattr(module, method), method), Table)


def test_a_denoiser_with_an_argument_that_is_not_known_runs_alone_and_the_log_and_the_record_name_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    unet = tiny_sdxl().unet
    original = unet.forward

    def forward(sample: Any, timestep: Any, encoder_hidden_states: Any, depth: Any = None, **more: Any) -> Any:
        del depth
        return original(sample, timestep, encoder_hidden_states, **more)

    unet.forward = forward
    with caplog.at_level(logging.WARNING):
        sharing = send_to_device({"unet": unet})

    assert sharing.classes == ()
    assert sharing.unchunked == "Its unet takes an argument that is not known: 'depth'."
    (warning,) = (record for record in caplog.records if record.name.startswith("workers."))
    assert "'depth'" in warning.getMessage()


def test_a_denoiser_that_lost_its_mask_is_not_padded(caplog: pytest.LogCaptureFixture) -> None:
    import diffusers

    transformer = with_weight(diffusers.QwenImageTransformer2DModel)
    table = TABLES["diffusers", "QwenImageTransformer2DModel", "forward"]
    names = [name for name in table.arguments if "mask" not in name]
    forward: Any = lambda **_: None  # noqa: E731
    forward.__signature__ = Signature([Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in names])
    transformer.forward = forward

    with caplog.at_level(logging.WARNING):
        sharing = send_to_device({"transformer": transformer})

    assert sharing.unchunked is not None
    assert "'encoder_hidden_states_mask'" in sharing.unchunked


def test_a_class_derived_from_one_with_a_table_is_not_taken_for_it() -> None:
    import diffusers

    class Own(diffusers.UNet2DConditionModel):  # type: ignore[misc]
        pass

    module = with_weight(Own)

    assert isinstance(sharing_of(module, module.forward, "forward"), Unshared)


def test_a_compiled_denoiser_runs_alone_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function: function)

    sharing = send_to_device({"unet": tiny_sdxl().unet}, compiled=True)

    assert sharing.unchunked is not None
    assert "compiled" in sharing.unchunked


def test_a_text_encoder_whose_rows_would_see_each_others_overflow_runs_alone() -> None:
    import transformers

    half = with_weight(transformers.T5EncoderModel, torch.float16)

    sharing = sharing_of(half, half.forward, "forward")

    assert isinstance(sharing, Unshared)
    assert "float16" in sharing.why
    assert not sharing.unexpected


def with_weight(kind: Any, dtype: torch.dtype = torch.float32) -> Any:
    """A module of the class that has one number, and nothing else: what is looked at is its signature."""
    module = kind.__new__(kind)
    nn.Module.__init__(module)
    module.register_parameter("weight", nn.Parameter(torch.zeros(1, dtype=dtype)))
    return module
