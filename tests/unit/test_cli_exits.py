"""How the `omnirt` command ends: its exit codes and what it prints, without a gateway."""

import json
import logging
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from omnirt_tasks import errors
from omnirt_tasks.cli import cli
from omnirt_tasks.cli.exits import Exit, exit_code
from omnirt_tasks.embedded import free_port

Omnirt = Callable[..., Result]


@pytest.fixture
def omnirt(monkeypatch: pytest.MonkeyPatch) -> Iterator[Omnirt]:
    """Runs the command in this process; standard output and error are apart."""

    def run(*arguments: str, **environment: str) -> Result:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return CliRunner().invoke(cli, list(arguments))

    root = logging.getLogger()
    before = root.handlers[:], root.level
    yield run
    root.handlers[:], root.level = before


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.ValidationFailed("bad"), Exit.REFUSED),
        (errors.ModelNotFound("bad"), Exit.REFUSED),
        (errors.JobNotFound("bad"), Exit.REFUSED),
        (errors.StubDisabled("bad"), Exit.REFUSED),
        (errors.ModelFailed("bad"), Exit.FAILED),
        (errors.OutOfMemory("bad"), Exit.FAILED),
        (errors.WorkerLost("bad"), Exit.FAILED),
        (errors.JobCancelled("bad"), Exit.CANCELLED),
        (errors.JobTimeout("bad"), Exit.TIMEOUT),
        (errors.Unauthorized("bad"), Exit.UNREACHABLE),
        (errors.GatewayUnreachable("bad"), Exit.UNREACHABLE),
        (errors.StoreUnavailable("bad"), Exit.UNREACHABLE),
        (errors.QueueFull("bad"), Exit.UNREACHABLE),
        (errors.StorageError("bad"), Exit.INSTALLATION),
        (errors.ConfigurationError("bad"), Exit.INSTALLATION),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_error_decides_the_exit_code(error: errors.OmnirtError, code: Exit) -> None:
    assert exit_code(error) is code


def test_help_lists_every_exit_code(omnirt: Omnirt) -> None:
    told = omnirt("--help").stdout

    assert {int(code) for code in re.findall(r"^\s+(\d+)  ", told, re.MULTILINE)} == {0, *Exit}


def test_an_unknown_model_is_one_line_with_the_nearest_name_and_no_traceback(omnirt: Omnirt) -> None:
    result = omnirt("generate", "--model", "shaped", "--prompt", "x")

    assert result.exit_code == Exit.REFUSED
    assert result.stdout == ""
    assert "model_not_found: " in result.stderr
    assert "shapes" in result.stderr
    assert "Traceback" not in result.stderr


def test_validate_tells_of_every_problem_with_its_place(omnirt: Omnirt) -> None:
    result = omnirt("validate", "--model", "shapes", "--prompt", "x", "--set", "width=513", "--set", "stepz=3")

    assert result.exit_code == Exit.REFUSED
    assert [line.split(":")[0] for line in result.stderr.splitlines()] == ["config.width", "config.stepz"]


def test_validate_shows_what_a_good_request_comes_to(omnirt: Omnirt) -> None:
    result = omnirt("validate", "--model", "shapes", "--prompt", "x", "--preset", "fast", "--seed", "7", "--json")

    told = json.loads(result.stdout)
    assert result.exit_code == 0
    assert told["ok"] is True
    assert (told["request"]["config"]["seed"], told["request"]["config"]["num_inference_steps"]) == (7, 20)


@pytest.mark.parametrize(
    ("options", "task"),
    [
        ([], "text2image"),
        (["--image", "upload:1"], "image2image"),
        (["--image", "upload:1", "--mask", "upload:2"], "inpaint"),
    ],
)
def test_the_inputs_suggest_the_task(omnirt: Omnirt, options: list[str], task: str) -> None:
    result = omnirt("validate", "--model", "sdxl-base-1.0", "--prompt", "x", *options, "--json")

    assert json.loads(result.stdout)["request"]["task"] == task


def test_values_of_set_are_json_or_else_text(omnirt: Omnirt) -> None:
    arguments = ["--model", "shapes", "--prompt", "x", "--set", "scheduler=ddim", "--set", "guidance_scale=2.5"]
    config = json.loads(omnirt("validate", *arguments, "--json").stdout)["request"]["config"]

    assert (config["scheduler"], config["guidance_scale"]) == ("ddim", 2.5)


def test_with_json_an_error_is_a_document_too(omnirt: Omnirt) -> None:
    result = omnirt("generate", "--model", "shaped", "--prompt", "x", "--json")

    assert json.loads(result.stdout)["error"]["code"] == "model_not_found"


def test_models_of_this_installation_as_json(omnirt: Omnirt) -> None:
    told = json.loads(omnirt("models", "--task", "text2image", "--json").stdout)

    assert {"shapes", "stub"} <= {model["id"] for model in told}


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "--prompt", "x"],
        ["generate", "--model", "shapes", "--set", "nonsense"],
        ["generate", "--model", "stub", "--prompt", "x", "--no-wait"],
        ["up", "--queues", "nonsense"],
        ["worker", "--queues", ""],
        ["no-such-command"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_2(omnirt: Omnirt, arguments: list[str]) -> None:
    assert omnirt(*arguments).exit_code == Exit.REFUSED


def test_no_gateway_is_6_and_says_what_to_do(omnirt: Omnirt) -> None:
    result = omnirt("jobs", "list", OMNIRT_URL=f"http://127.0.0.1:{free_port()}")

    assert result.exit_code == Exit.UNREACHABLE
    assert re.fullmatch(
        r"gateway_unreachable: No gateway answers at http://127.0.0.1:\d+ \(.*\)\. Check the URL, .*omnirt up\n",
        result.stderr,
    )


def test_a_wrong_setting_is_1_and_names_the_variable(omnirt: Omnirt) -> None:
    result = omnirt("jobs", "list", OMNIRT_PROT="8000")

    assert result.exit_code == Exit.INSTALLATION
    assert "OMNIRT_PROT" in result.stderr


def test_generate_here_saves_the_picture_under_a_friendly_name(omnirt: Omnirt, tmp_path: Path) -> None:
    result = omnirt("generate", "--model", "stub", "--prompt", "A big Cat!", "--seed", "7", "-o", str(tmp_path / "out"))

    target = tmp_path / "out" / "a-big-cat-7.png"
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{target}  (seed 7)\n"
    assert target.read_bytes().startswith(b"\x89PNG")


def test_generate_here_with_json_prints_one_document(omnirt: Omnirt, tmp_path: Path) -> None:
    target = tmp_path / "cat.png"
    result = omnirt("generate", "--model", "stub", "--prompt", "x", "--json", "-o", str(target))

    told = json.loads(result.stdout)
    assert told["files"] == [str(target)]
    assert told["job"]["state"] == "succeeded"
    assert target.is_file()


def test_several_prompts_and_pictures_are_one_job_with_a_file_for_each(omnirt: Omnirt, tmp_path: Path) -> None:
    prompts = ["--prompt", "a cat", "--prompt", "a dog", "--prompt", "a bird"]
    arguments = ["--model", "stub", *prompts, "-n", "2", "--seed", "7", "-o", str(tmp_path)]

    result = omnirt("generate", *arguments)

    assert result.exit_code == 0, result.output
    names = [
        f"a-{animal}-{seed}.png"
        for animal, seed in zip(("cat", "cat", "dog", "dog", "bird", "bird"), range(7, 13), strict=True)
    ]
    assert result.stdout.splitlines() == [f"{tmp_path / name}  (seed {7 + index})" for index, name in enumerate(names)]
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in names)


def test_prompts_count_and_priority_become_the_request(omnirt: Omnirt) -> None:
    prompts = ["--prompt", "a", "--prompt", "b"]

    result = omnirt("validate", "--model", "shapes", *prompts, "--count", "3", "--priority", "low", "--json")

    told = json.loads(result.stdout)["request"]
    assert (told["inputs"]["prompt"], told["config"]["num_images_per_prompt"]) == (["a", "b"], 3)
    assert told["priority"] == "low"


def test_a_lone_prompt_is_no_list(omnirt: Omnirt) -> None:
    result = omnirt("validate", "--model", "shapes", "--prompt", "a", "--json")

    assert json.loads(result.stdout)["request"]["inputs"]["prompt"] == "a"


def test_a_wrong_prompt_of_several_is_named(omnirt: Omnirt) -> None:
    result = omnirt("validate", "--model", "shapes", "--prompt", "a", "--prompt", " ")

    assert result.exit_code == Exit.REFUSED
    assert result.stderr.startswith("inputs.prompt.1: ")


def test_a_job_that_fails_is_3(omnirt: Omnirt, tmp_path: Path) -> None:
    result = omnirt("generate", "--model", "stub", "--prompt", "x", "--set", "fail_at_step=1", "-o", str(tmp_path))

    assert result.exit_code == Exit.FAILED
    assert "model_failed: " in result.stderr
    assert "Traceback" not in result.stderr


def test_the_log_is_shown_when_it_is_asked_for_in_the_project_s_form(omnirt: Omnirt, tmp_path: Path) -> None:
    arguments = ["generate", "--model", "stub", "--prompt", "x", "--set", "fail_at_step=1", "-o", str(tmp_path)]
    line = re.compile(r"^\S+Z \[error +\] ", re.MULTILINE)

    assert not line.search(omnirt(*arguments).stderr)
    assert line.search(omnirt(*arguments, "-v").stderr)


def test_a_job_that_is_not_over_in_time_is_5(omnirt: Omnirt, tmp_path: Path) -> None:
    arguments = ["--model", "stub", "--prompt", "x", "--set", "step_ms=2000", "--timeout", "0.3", "-o", str(tmp_path)]

    assert omnirt("generate", *arguments).exit_code == Exit.TIMEOUT


def test_a_demo_without_the_model_s_weights_says_what_is_missing(
    omnirt: Omnirt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["omnirt_tasks.cli.demo"], "MODEL", "sdxl-turbo")  # no weights of it are shipped

    result = omnirt("demo")

    assert result.exit_code == Exit.INSTALLATION
    assert "The weights of the model 'sdxl-turbo' are not here" in result.stderr
    assert "make train-shapes" in result.stderr


def test_an_output_that_cannot_be_written_is_1_and_named(omnirt: Omnirt, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    result = omnirt("generate", "--model", "stub", "--prompt", "x", "-o", str(tmp_path / "file" / "x.png"))

    assert result.exit_code == Exit.INSTALLATION
    assert "x.png cannot be written" in result.stderr
