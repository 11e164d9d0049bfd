"""The GPU's benchmark measures a model of the size that it says, and refuses where it cannot."""

import pytest
from click.testing import CliRunner

from omnirt_tasks.bench.random_weights import SIZED
from omnirt_tasks.cli import cli


@pytest.mark.parametrize("device", ["cuda:99", "cpu:0"])
def test_a_device_that_is_not_there_is_refused_with_what_to_do(device: str) -> None:
    ended = CliRunner().invoke(cli, ["bench", "device", "--device", device])

    assert ended.exit_code == 1
    assert device in ended.stderr
    assert "GPU" in ended.stderr


WEIGHTS = {
    "sdxl-base-1.0": {
        "unet": 2_567_463_684,
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
        "vae": 83_653_863,
    },
    "sd15": {"unet": 859_520_964, "text_encoder": 123_060_480, "vae": 83_653_863},
}


@pytest.mark.parametrize("model", SIZED)
def test_the_models_have_the_published_ones_weights(model: str) -> None:
    pipeline = SIZED[model]("meta")

    assert {
        name: sum(parameter.numel() for parameter in pipeline.components[name].parameters()) for name in WEIGHTS[model]
    } == WEIGHTS[model]
