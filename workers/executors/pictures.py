"""What every executor that makes pictures shares: their seeds, their names, their files. No torch."""

import io
from collections.abc import Sequence

from PIL import Image

from omnirt_tasks.contract import ArtifactKind
from omnirt_tasks.errors import StorageError
from omnirt_tasks.registry.spec import SEED_MAX
from workers.host import OutputFile, RunOrder

PNG = "image/png"


def picture_seed(order: RunOrder, index: int) -> int:
    """The seed that gives picture `index` of the order alone: the job's seed plus the index, within a seed's bounds."""
    seed = order.request.config.get("seed")
    assert isinstance(seed, int), "a resolved request has a seed"
    return (seed + index) % (SEED_MAX + 1)


def save_pictures(pictures: Sequence[Image.Image], order: RunOrder) -> tuple[OutputFile, ...]:
    """Write each picture as PNG into the order's folder: `0.png`, `1.png`… Raises StorageError.

    Those of a part are named and numbered by their places in the whole job's result.
    """
    outputs = []
    for place, picture in enumerate(pictures):
        index = order.first_output + place
        name = f"{index}.png"
        try:
            picture.save(order.output_dir / name, "PNG")
        except OSError as error:
            raise StorageError("A picture could not be written.", "The worker's disk may be full.") from error
        outputs.append(
            OutputFile(
                name=name,
                index=index,
                kind=ArtifactKind.IMAGE,
                mime=PNG,
                width=picture.width,
                height=picture.height,
                seed=picture_seed(order, place),
            )
        )
    return tuple(outputs)


def png_bytes(picture: Image.Image) -> bytes:
    """The picture as PNG."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()
