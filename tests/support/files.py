"""What lies in a folder that others write to and clear at the same time."""

import os
from pathlib import Path


def files_in(folder: Path) -> list[Path]:
    """Every file below the folder, in order; none where it does not exist.

    `Path.rglob` raises over a folder that is cleared while it looks.
    """
    return sorted(Path(place, name) for place, _, names in os.walk(folder) for name in names)
