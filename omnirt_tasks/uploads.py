"""Pictures and sounds that callers send, kept for a while on any fsspec storage.

    {root}/uploads/{id}.bin    the bytes
    {root}/uploads/{id}.json   whose they are, what they are, until when

What a file is, is told from its bytes, never from what the caller says of it. A picture is decoded once here, within
its limits, so that a broken one is refused before anything is queued.
"""

import hashlib
import secrets
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO

from PIL import Image
from pydantic import TypeAdapter, ValidationError

from omnirt_tasks.clock import unix_ms
from omnirt_tasks.contract import MEDIA_INPUTS, Inputs
from omnirt_tasks.errors import StorageError, TooLarge, UnsupportedMediaType, UploadNotFound, ValidationFailed
from omnirt_tasks.storage import SAFE_NAME, make_folder, open_filesystem, reach_disk, storage_errors

CHUNK_BYTES = 1024 * 1024
JOB_UPLOAD_TTL_S = 60 * 24 * 3600
"""How long an upload of a job's own may stay: past any deadline. Its job takes it along when it goes."""
MEMORY_BYTES = 8 * 1024 * 1024  # a larger upload waits in a temporary file
PICTURE_FORMATS = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}


@dataclass(frozen=True)
class Upload:
    """A stored upload; `owner` is the id of the key that sent it.

    One that came inside a job's request has that job's id: it goes with the job, and not before.
    """

    id: str
    owner: str
    mime: str
    size_bytes: int
    sha256: str
    expires_at_ms: int
    job_id: str | None = None


_FACTS = TypeAdapter(Upload)


class UploadStorage:
    """Uploads below one fsspec URL. Safe to share between threads."""

    def __init__(
        self, url: str, *, ttl_s: float, max_bytes: int, max_pixels: int, clock_ms: Callable[[], int] = unix_ms
    ) -> None:
        self._fs, self._root = open_filesystem(url)
        self._folder = f"{self._root}/uploads"
        self._ttl_ms = round(ttl_s * 1000)
        self._max_bytes = max_bytes
        self._max_pixels = max_pixels
        self._clock_ms = clock_ms

    def put(self, owner: str, stream: BinaryIO, *, job_id: str | None = None) -> Upload:
        """Keep what the stream holds, for the job if one is named; it outlives a loss of power when this returns.

        Raises TooLarge past the byte limit, UnsupportedMediaType for what is neither a picture (PNG, JPEG, WEBP) nor
        audio (WAV, FLAC, OGG, MP3), ValidationFailed for a picture that is broken or has too many pixels,
        StorageError when it cannot be written.
        """
        with tempfile.SpooledTemporaryFile(max_size=MEMORY_BYTES) as copy:
            digest, size_bytes = hashlib.sha256(), 0
            while chunk := stream.read(CHUNK_BYTES):
                size_bytes += len(chunk)
                if size_bytes > self._max_bytes:
                    raise TooLarge(f"The upload is larger than {self._max_bytes} bytes.", "Send a smaller file.")
                digest.update(chunk)
                with storage_errors("The upload could not be stored"):  # a full folder for temporary files
                    copy.write(chunk)
            mime = self.inspect(copy)
            upload = Upload(
                id=secrets.token_hex(16),
                owner=owner,
                mime=mime,
                size_bytes=size_bytes,
                sha256=digest.hexdigest(),
                expires_at_ms=self._clock_ms() + (self._ttl_ms if job_id is None else JOB_UPLOAD_TTL_S * 1000),
                job_id=job_id,
            )
            copy.seek(0)
            with storage_errors("The upload could not be stored"):
                make_folder(self._fs, self._folder)
                try:
                    with self._fs.open(self._bytes_of(upload.id), "wb") as target:
                        while chunk := copy.read(CHUNK_BYTES):
                            target.write(chunk)
                    # Written last: an upload is there when its facts are.
                    self._fs.pipe_file(self._facts_of(upload.id), _FACTS.dump_json(upload))
                    reach_disk(self._fs, self._parts_of(upload.id), self._root)
                except BaseException:
                    with suppress(Exception):  # what stays is swept
                        self._remove(upload.id)
                    raise
        return upload

    def find(self, owner: str, upload_id: str) -> Upload:
        """The owner's upload. Raises UploadNotFound when there is none, it is another's, or its time is over."""
        upload = self._read(upload_id)
        if upload is None or upload.owner != owner or upload.expires_at_ms <= self._clock_ms():
            raise _missing(upload_id)
        return upload

    def copy(self, upload: Upload, *, job_id: str) -> Upload:
        """The same bytes once more, for the job. Raises UploadNotFound when they are gone, and StorageError."""
        with storage_errors("The upload could not be read"):
            try:
                stream: BinaryIO = self._fs.open(self._bytes_of(upload.id), "rb")
            except FileNotFoundError:
                raise _missing(upload.id) from None
            with stream:
                return self.put(upload.owner, stream, job_id=job_id)

    def remove_inputs(self, job_id: str, inputs: Inputs) -> None:
        """Remove those of a job's inputs that came inside its request; its caller's other uploads stay. Idempotent."""
        for name in MEDIA_INPUTS:
            kind, _, upload_id = (getattr(inputs, name) or "").partition(":")
            upload = self._read(upload_id) if kind == "upload" else None
            if upload is not None and upload.job_id == job_id:
                with storage_errors("The job's inputs could not be removed"):
                    self._remove(upload_id)

    def fetch(self, upload_id: str, target: Path) -> None:
        """Copy the bytes to a local file. Raises UploadNotFound."""
        path = self._bytes_of(upload_id)
        with storage_errors("The upload could not be read"):
            try:
                self._fs.get_file(path, str(target))
            except FileNotFoundError:
                raise _missing(upload_id) from None

    def sweep(self) -> int:
        """Remove the uploads whose time is over, and tell how many they were.

        What lies there without facts that can be read goes when it is as old as an upload may get. One that cannot be
        removed stops no other; then raises StorageError in the end.
        """
        with storage_errors("Expired uploads could not be removed"):
            paths = [Path(path) for path in self._fs.glob(f"{self._folder}/*")]
        removed = 0
        failure: StorageError | None = None
        for upload_id in {path.stem for path in paths if path.suffix in {".json", ".bin"}}:
            if not SAFE_NAME.fullmatch(upload_id):
                continue  # none of ours
            try:
                with storage_errors("Expired uploads could not be removed"):
                    if self._ends_at_ms(upload_id) <= self._clock_ms():
                        self._remove(upload_id)
                        removed += 1
            except StorageError as error:
                failure = error
        if failure is not None:
            raise failure
        return removed

    def inspect(self, stream: IO[bytes]) -> str:
        """The MIME type of what the stream holds, writing nothing. Raises like `put`."""
        mime = self._picture(stream)
        if mime is None:
            stream.seek(0)
            mime = _audio_mime(stream.read(16))
        if mime is None:
            raise UnsupportedMediaType(
                "The upload is neither a picture nor audio.", "Send PNG, JPEG or WEBP, or WAV, FLAC, OGG or MP3."
            )
        return mime

    def _picture(self, stream: IO[bytes]) -> str | None:
        stream.seek(0)
        try:
            picture = Image.open(stream, formats=tuple(PICTURE_FORMATS))
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            raise self._bomb("more pixels than any picture may have") from None
        except (OSError, SyntaxError, ValueError):
            return None
        with picture:
            if picture.width * picture.height > self._max_pixels:
                raise self._bomb(f"{picture.width}x{picture.height} pixels")
            try:
                picture.load()
            except Exception as error:  # decoders raise whatever they like at hostile bytes
                raise ValidationFailed(
                    f"The picture is broken ({type(error).__name__}).", "Save it again and resend it."
                ) from error
            return PICTURE_FORMATS[str(picture.format)]

    def _bomb(self, what: str) -> ValidationFailed:
        return ValidationFailed(
            f"The picture has {what}; at most {self._max_pixels} are accepted.", "Scale it down and resend it."
        )

    def _read(self, upload_id: str) -> Upload | None:
        with storage_errors("The upload could not be read"):
            try:
                return _FACTS.validate_json(self._fs.cat_file(self._facts_of(upload_id)))
            except (FileNotFoundError, ValidationError):  # facts that cannot be read are none
                return None

    def _ends_at_ms(self, upload_id: str) -> int:
        if (upload := self._read(upload_id)) is not None:
            return upload.expires_at_ms
        parts = [part for part in self._parts_of(upload_id) if self._fs.exists(part)]
        written_at_s = max((self._fs.modified(part).timestamp() for part in parts), default=0.0)
        return round(written_at_s * 1000) + self._ttl_ms

    def _remove(self, upload_id: str) -> None:
        for part in self._parts_of(upload_id):
            if self._fs.exists(part):
                self._fs.rm_file(part)

    def _parts_of(self, upload_id: str) -> tuple[str, str]:
        """The facts first, so that nobody finds an upload without its bytes."""
        return self._facts_of(upload_id), self._bytes_of(upload_id)

    def _bytes_of(self, upload_id: str) -> str:
        return f"{self._folder}/{_checked(upload_id)}.bin"

    def _facts_of(self, upload_id: str) -> str:
        return f"{self._folder}/{_checked(upload_id)}.json"


def _audio_mime(head: bytes) -> str | None:
    if head[:4] == b"RIFF" and head[8:12] == b"WAVE":
        return "audio/wav"
    if head[:4] == b"fLaC":
        return "audio/flac"
    if head[:4] == b"OggS":
        return "audio/ogg"
    return "audio/mpeg" if head[:3] == b"ID3" or _begins_mp3(head) else None


def _begins_mp3(head: bytes) -> bool:
    """Whether it begins with a frame of MPEG audio, layer III; text in UTF-16 begins with the same eleven set bits."""
    if len(head) < 3 or head[0] != 0xFF or head[1] & 0xE0 != 0xE0:
        return False
    version, layer, bitrate, rate = head[1] >> 3 & 3, head[1] >> 1 & 3, head[2] >> 4, head[2] >> 2 & 3
    return version != 1 and layer == 1 and bitrate != 15 and rate != 3


def _checked(upload_id: str) -> str:
    if not SAFE_NAME.fullmatch(upload_id):
        raise _missing(upload_id)
    return upload_id


def _missing(upload_id: str) -> UploadNotFound:
    shown = upload_id if len(upload_id) <= 80 else upload_id[:77] + "..."
    return UploadNotFound(f"There is no upload {shown!r}, or its time is over.", "POST /v1/uploads gives a new one.")
