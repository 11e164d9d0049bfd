"""Loading a diffusers pipeline from a local folder, as families do it; torch is imported inside."""

from typing import Any

from omnirt_tasks.errors import ConfigurationError
from omnirt_tasks.registry.spec import LoadRequest


def load_diffusers(class_name: str, request: LoadRequest) -> Any:
    """The pipeline of that diffusers class, on the request's device in its dtype; safetensors and local files only.

    Raises ConfigurationError when the folder is not there, OSError when it is not whole.
    """
    if not (request.folder / "model_index.json").is_file():
        raise ConfigurationError(
            "The model's folder holds no model_index.json.", "Point OMNIRT_MODEL_FOLDERS at a diffusers folder."
        )
    import diffusers
    import torch

    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[request.dtype]
    pipeline = getattr(diffusers, class_name).from_pretrained(
        str(request.folder), torch_dtype=dtype, local_files_only=True, use_safetensors=True
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(request.device)
