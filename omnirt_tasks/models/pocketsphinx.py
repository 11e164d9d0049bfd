"""`pocketsphinx`: recognition of English speech, with the model that comes inside the package."""

import sys
from array import array
from collections.abc import Iterator, Sequence
from typing import Any

from omnirt_tasks.audio import SAMPLE_BYTES, decode_mono
from omnirt_tasks.contract import ArtifactKind, Backend, ExecutionMode, Task, Tier
from omnirt_tasks.registry import options
from omnirt_tasks.registry.runnable import RankGroup, RankJob, RankOutput, RankStart
from omnirt_tasks.registry.spec import LoadRequest, ModelSpec, Needs, TaskSpec, Verification

MIB = 1024**2
RATE_HZ = 16_000
AUDIO_MAX_S = 600.0
UTTERANCE_MAX_S = 10.0
"""How much is searched at once, in about a tenth of the time; between two utterances a job can be stopped."""
PAUSE_SOUGHT_S = 4.0
PAUSE_S = 0.2


def load(spec: ModelSpec, request: LoadRequest) -> RankGroup:
    """One process, since the decoder keeps state and holds the interpreter's lock."""
    return RankGroup("omnirt_tasks.models.pocketsphinx:Recogniser")


class Recogniser:
    """The decoder with its English model, loaded once."""

    def __init__(self, start: RankStart) -> None:
        from pocketsphinx import Decoder

        # It logs what it hears, and what it hears is private.
        self._decoder: Any = Decoder(loglevel="FATAL", samprate=float(RATE_HZ))

    def run(self, job: RankJob) -> Sequence[RankOutput]:
        """Write down what is said, a line for each utterance. Raises UnsupportedMediaType and TooLarge."""
        samples = decode_mono(job.files["audio"], rate_hz=RATE_HZ, max_s=AUDIO_MAX_S)
        pieces = tuple(utterances(samples))
        lines = []
        for step, piece in enumerate(pieces, start=1):
            lines.append(self._heard(piece))
            job.tell(step, len(pieces))
        (job.output_dir / "0.txt").write_text("\n".join(filter(None, lines)), encoding="utf-8")
        return (RankOutput("0.txt", ArtifactKind.TEXT, "text/plain"),)

    def _heard(self, utterance: bytes) -> str:
        self._decoder.start_utt()
        # Known as a whole, it is measured by its own loudness alone, and not by that of what came before.
        self._decoder.process_raw(utterance, no_search=False, full_utt=True)
        self._decoder.end_utt()
        found = self._decoder.hyp()
        return "" if found is None else str(found.hypstr)


def utterances(samples: bytes) -> Iterator[bytes]:
    """The samples in pieces that the decoder's memory bears, cut where it is quietest near the end of each."""
    longest = round(UTTERANCE_MAX_S * RATE_HZ) * SAMPLE_BYTES
    while len(samples) > longest:
        cut = _quietest(samples, longest)
        yield samples[:cut]
        samples = samples[cut:]
    yield samples


def _quietest(samples: bytes, end: int) -> int:
    """Where the quietest moment before `end` is, as a place in bytes."""
    begin = end - round(PAUSE_SOUGHT_S * RATE_HZ) * SAMPLE_BYTES
    pause = round(PAUSE_S * RATE_HZ) * SAMPLE_BYTES
    return min(range(begin, end - pause + 1, pause), key=lambda at: _loudness(samples[at : at + pause])) + pause // 2


def _loudness(samples: bytes) -> int:
    values = array("h", samples)
    if sys.byteorder == "big":
        values.byteswap()
    return sum(map(abs, values))


SPECS = (
    ModelSpec(
        id="pocketsphinx",
        family="pocketsphinx",
        queue="speech",
        summary="Writes down clear English speech, at most ten minutes of it; ten times faster than it was said.",
        tasks={
            Task.AUDIO2TEXT: TaskSpec(
                required_inputs=("audio",),
                optional_inputs=(),
                options=options.by_name((options.preset(),)),
                artifact_kind=ArtifactKind.TEXT,
            )
        },
        backends=(Backend.CPU,),
        execution_mode=ExecutionMode.PERSISTENT_WORKER,
        tier=Tier.EXPERIMENTAL,
        status="beta",
        min_memory_bytes=160 * MIB,
        needs=Needs(weights=False, packages=("imageio_ffmpeg", "pocketsphinx")),
        loader=load,
        verified=Verification.REAL_WEIGHTS,
    ),
)
