"""Speech from text and text from speech, for real: what flite says, pocketsphinx writes down."""

import importlib.util
import io
import os
import shutil
import subprocess
import sys
import wave
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from omnirt_tasks import ffmpeg
from omnirt_tasks.audio import decode_mono
from omnirt_tasks.contract import EventName, ExecutionMode, Inputs, JobRecord, JobState, Task
from omnirt_tasks.errors import TooLarge, UnsupportedMediaType, ValidationFailed
from omnirt_tasks.models.pocketsphinx import RATE_HZ, Recogniser, utterances
from omnirt_tasks.registry import RankJob, RankStart
from omnirt_tasks.settings import Settings
from omnirt_tasks.uploads import UploadStorage
from omnirt_tasks.validation import parse_request
from tests.support.job_system import JobSystem
from tests.support.processes import Processes, environment
from tests.support.waiting import eventually

SENTENCE = "the quick brown fox jumps over the lazy dog"
COUNTING = "one two three four five. "
START_TIMEOUT_S = 60.0


@pytest.fixture(autouse=True)
def _speech_is_here() -> None:
    lacking = [name for name in ("flite",) if shutil.which(name) is None]
    lacking += [name for name in ("pocketsphinx", "imageio_ffmpeg") if importlib.util.find_spec(name) is None]
    if lacking:
        told = f"not installed here: {', '.join(lacking)}"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(told)


class Speech:
    """A bare worker on the queue of speech, and all that it wrote to its log."""

    def __init__(self, settings: Settings, processes: Processes) -> None:
        self.system = JobSystem(settings)
        self.lines: list[str] = []
        command = [sys.executable, "-m", "celery", "-A", "omnirt_tasks", "worker", "-Q", "cpu-speech"]
        worker = processes.start("worker", command, env=environment(settings), on_line=self.lines.append)
        eventually(
            lambda: worker.exit_code is not None or any(" ready." in line for line in self.lines),
            START_TIMEOUT_S,
            told=self.told,
        )
        assert worker.exit_code is None, self.told()

    def told(self) -> str:
        return "\n".join(self.lines[-60:])

    def say(self, words: str, **config: object) -> str:
        """A job that speaks; its id."""
        return self._submit({"task": "text2audio", "model": "flite", "inputs": {"prompt": words}, "config": config})

    def write_down(self, audio: str) -> str:
        """A job that listens; its id."""
        return self._submit({"task": "audio2text", "model": "pocketsphinx", "inputs": {"audio": audio}})

    def _submit(self, body: dict[str, object]) -> str:
        return self.system.submission.submit(parse_request(body), owner="").record.id

    def finished(self, job_id: str) -> JobRecord:
        return self.system.finished(job_id, timeout_s=60)

    def output(self, job_id: str, name: str) -> Path:
        job = self.finished(job_id)
        assert job.state is JobState.SUCCEEDED, f"{job.error}\n{self.told()}"
        file = self.system.local_file(job, name)
        assert file is not None
        return file


@pytest.fixture
def speech(settings: Settings, processes: Processes) -> Iterator[Speech]:
    speech = Speech(settings.model_copy(update={"log_level": "DEBUG"}), processes)
    yield speech
    speech.system.close()


def test_what_flite_says_is_written_down_word_for_word(speech: Speech) -> None:
    said = speech.say(SENTENCE)
    with wave.open(str(speech.output(said, "0.wav"))) as sound:
        assert 1 < sound.getnframes() / sound.getframerate() < 10

    heard = speech.write_down(f"artifact:{said}/0.wav")

    assert speech.output(heard, "0.txt").read_text(encoding="utf-8") == SENTENCE
    spoken, written = speech.finished(said), speech.finished(heard)
    assert spoken.result is not None
    assert written.result is not None
    assert [output.mime for output in (*spoken.result.outputs, *written.result.outputs)] == ["audio/wav", "text/plain"]
    assert spoken.result.metadata.execution_mode is ExecutionMode.SUBPROCESS
    assert written.result.metadata.execution_mode is ExecutionMode.PERSISTENT_WORKER
    assert speech.system.events(heard, EventName.STAGE_PROGRESS)
    # The recogniser is kept: the next job finds it loaded.
    again = speech.write_down(f"artifact:{said}/0.wav")
    assert speech.output(again, "0.txt").read_text(encoding="utf-8") == SENTENCE
    assert speech.system.events(again, EventName.CACHE_HIT)


def test_the_words_are_in_no_command_line_and_no_log(speech: Speech) -> None:
    short = speech.say("matters of nobody")
    speech.output(short, "0.wav")
    heard = speech.write_down(f"artifact:{short}/0.wav")
    assert "matters" in speech.output(heard, "0.txt").read_text(encoding="utf-8")
    said = speech.say("matters of nobody else. " * 300)
    lines: set[str] = set()

    def flite_runs() -> bool:
        now = [" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])]
        lines.update(now)
        return any("flite -voice" in line for line in now)

    eventually(flite_runs, 30, told=speech.told)
    speech.system.submission.store.cancel(said)

    assert speech.finished(said).state is JobState.CANCELLED
    assert any("debug" in line.casefold() for line in speech.lines)
    assert not [line for line in [*lines, *speech.lines] if "matters" in line]


def test_a_cancel_of_a_long_recognition_lands_within_seconds(speech: Speech) -> None:
    said = speech.say(COUNTING * 70)
    speech.output(said, "0.wav")
    heard = speech.write_down(f"artifact:{said}/0.wav")
    first = speech.system.seen(heard, EventName.STAGE_PROGRESS, 30)
    assert int(str(first.data["total"])) > 10

    speech.system.submission.store.cancel(heard)

    job = speech.system.finished(heard, timeout_s=5)
    assert job.state is JobState.CANCELLED
    assert len(speech.system.events(heard, EventName.STAGE_PROGRESS)) < 10
    short = speech.say(SENTENCE)
    speech.output(short, "0.wav")
    after = speech.write_down(f"artifact:{short}/0.wav")
    assert speech.output(after, "0.txt").read_text(encoding="utf-8") == SENTENCE


def test_audio_that_is_none_fails_its_job_alone_with_a_remedy(speech: Speech) -> None:
    uploads = speech.system.submission.uploads
    begun_like_a_wav = uploads.put("", io.BytesIO(b"RIFF\x10\x00\x00\x00WAVEfmt and nothing of the kind"))
    assert begun_like_a_wav.mime == "audio/wav"

    job = speech.finished(speech.write_down(f"upload:{begun_like_a_wav.id}"))

    assert job.state is JobState.FAILED
    assert job.error is not None
    assert job.error.code == "unsupported_media_type"
    assert "no sound" in job.error.message
    assert "WAV, FLAC, OGG or MP3" in (job.error.hint or "")
    speech.output(speech.say(SENTENCE, voice="kal", speed=1.5), "0.wav")


# Without a worker


@pytest.fixture
def uploads(tmp_path: Path) -> UploadStorage:
    return UploadStorage(tmp_path.as_uri(), ttl_s=60, max_bytes=10**6, max_pixels=10**6)


@pytest.mark.parametrize("garbage", [b"this is not audio at all", "text of UTF-16".encode("utf-16"), b"\xff\xfb"])
def test_garbage_named_wav_is_no_upload(uploads: UploadStorage, garbage: bytes) -> None:
    with pytest.raises(UnsupportedMediaType, match="WAV, FLAC, OGG or MP3"):
        uploads.put("", io.BytesIO(garbage))


@pytest.mark.parametrize(("form", "mime"), [("wav", "wav"), ("flac", "flac"), ("ogg", "ogg"), ("mp3", "mpeg")])
def test_sound_of_each_form_is_told_by_its_bytes_and_decoded(
    uploads: UploadStorage, tmp_path: Path, form: str, mime: str
) -> None:
    from imageio_ffmpeg import get_ffmpeg_exe

    file = tmp_path / f"sound.{form}"
    tone = ("-f", "lavfi", "-i", "sine=frequency=440:sample_rate=44100:duration=1", "-ac", "2")
    bare = ("-id3v2_version", "0", "-write_xing", "0") if form == "mp3" else ()  # it begins with a frame
    subprocess.run([get_ffmpeg_exe(), "-v", "fatal", *tone, *bare, file], check=True, timeout=60)

    assert uploads.put("", io.BytesIO(file.read_bytes())).mime == f"audio/{mime}"
    assert len(decode_mono(file, rate_hz=RATE_HZ, max_s=2)) == pytest.approx(2 * RATE_HZ, rel=0.1)


@pytest.mark.parametrize(
    ("config", "place"),
    [({"voice": "nobody"}, "config.voice"), ({"speed": 0.1}, "config.speed"), ({"seed": 1}, "seed")],
)
def test_flite_takes_its_own_options_alone(settings: Settings, config: dict[str, object], place: str) -> None:
    system = JobSystem(settings)
    body = {"task": "text2audio", "model": "flite", "inputs": {"prompt": "hello"}, "config": config}
    try:
        with pytest.raises(ValidationFailed, match=place):
            system.submission.submit(parse_request(body), owner="")
    finally:
        system.close()


def wav(samples: bytes, rate_hz: int = RATE_HZ) -> bytes:
    stream = io.BytesIO()
    with wave.open(stream, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(rate_hz)
        sound.writeframes(samples)
    return stream.getvalue()


def test_sound_of_any_rate_is_decoded_and_too_much_of_it_names_the_limit(tmp_path: Path) -> None:
    file = tmp_path / "audio"
    file.write_bytes(wav(b"\0\0" * 8_000, rate_hz=8_000))
    assert len(decode_mono(file, rate_hz=RATE_HZ, max_s=2)) == pytest.approx(2 * RATE_HZ, rel=0.01)
    file.write_bytes(wav(b"\0\0" * RATE_HZ * 3))

    with pytest.raises(TooLarge, match="longer than 2 s"):
        decode_mono(file, rate_hz=RATE_HZ, max_s=2)


def test_sound_is_decoded_by_an_ffmpeg_that_is_only_on_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "programs"
    folder.mkdir()
    (folder / "ffmpeg-of-the-host").symlink_to(ffmpeg.executable())
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "ffmpeg-of-the-host")
    (tmp_path / "audio").write_bytes(wav(b"\0\0" * RATE_HZ))

    assert len(decode_mono(tmp_path / "audio", rate_hz=RATE_HZ, max_s=2)) == pytest.approx(2 * RATE_HZ, rel=0.01)


@pytest.mark.parametrize("playlist", ["#EXTM3U\n#EXTINF:1,\nother.wav\n", "ffconcat version 1.0\nfile other.wav\n"])
def test_a_playlist_opens_no_other_file(tmp_path: Path, playlist: str) -> None:
    (tmp_path / "other.wav").write_bytes(wav(b"\0\0" * RATE_HZ))
    file = tmp_path / "audio"
    file.write_text(playlist, encoding="utf-8")

    with pytest.raises(UnsupportedMediaType, match="no sound"):
        decode_mono(file, rate_hz=RATE_HZ, max_s=2)


def test_long_sound_is_cut_into_utterances_without_loss_where_it_is_quiet() -> None:
    loud, quiet = b"\x00\x40" * RATE_HZ, b"\0\0" * RATE_HZ
    samples = loud * 7 + quiet + loud * 9

    pieces = list(utterances(samples))

    assert b"".join(pieces) == samples
    assert [7 <= len(pieces[0]) / len(loud) <= 8, len(pieces)] == [True, 2]


def test_what_was_heard_before_changes_no_text(tmp_path: Path) -> None:
    start = RankStart(tmp_path, "cpu", "fp32")
    noise = wav(bytes(range(256)) * 400)
    subprocess.run(["flite", "-voice", "rms", "-t", SENTENCE, "-o", tmp_path / "said.wav"], check=True, timeout=30)
    said = (tmp_path / "said.wav").read_bytes()

    def written(recogniser: Recogniser, sound: bytes) -> str:
        (tmp_path / "audio").write_bytes(sound)
        recogniser.run(
            RankJob(Task.AUDIO2TEXT, Inputs(), {}, {"audio": tmp_path / "audio"}, tmp_path, lambda step, total: None)
        )
        return (tmp_path / "0.txt").read_text(encoding="utf-8")

    used = Recogniser(start)
    for _ in range(3):
        written(used, noise)

    assert written(used, said) == written(Recogniser(start), said) != ""
