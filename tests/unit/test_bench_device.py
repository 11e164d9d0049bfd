"""The GPU's benchmark measures a model of the size that it says, and refuses where it cannot."""

import pytest
from click.testing import CliRunner

from omnirt_tasks.bench.device import sdxl_sized
from omnirt_tasks.cli import cli


@pytest.mark.parametrize("device", ["cuda:99", "cpu:0"])
def test_a_device_that_is_not_there_is_refused_with_what_to_do(device: str) -> None:
    ended = CliRunner().invoke(cli, ["bench", "device", "--device", device])

    assert ended.exit_code == 1
    assert device in ended.stderr
    assert "GPU" in ended.stderr


def test_the_model_has_the_published_ones_weights() -> None:
    pipeline = sdxl_sized("meta")

    def weights(name: str) -> int:
        return sum(parameter.numel() for parameter in pipeline.components[name].parameters())

    assert weights("unet") == 2_567_463_684
    assert weights("text_encoder") == 123_060_480
    assert weights("text_encoder_2") == 694_659_840
    assert weights("vae") == 83_653_863
