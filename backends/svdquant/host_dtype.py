"""In which dtype a file's model computes: what ComfyUI itself would choose for it here (0.33).

ComfyUI asks the model's class and the card: Qwen-Image, for example, is not safe in fp16, so cards
without bf16 compute it in fp32. Here its own functions decide, on the model that the file stands
for: names and shapes, without the weights. Imports happen when called.
"""

from dataclasses import dataclass

import torch

from .config import SVDQuantConfig
from .dialects import Checkpoint
from .host_detection import detected_config, outline
from .segments import FILE_DTYPES

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Dtypes:
    """storage: of scales, low-rank branches and dense weights in memory, and what ComfyUI is told;
    compute: of activations and matmuls."""

    storage: torch.dtype
    compute: torch.dtype


def pick_dtypes(checkpoint: Checkpoint, config: SVDQuantConfig, device: torch.device) -> Dtypes:
    """As the widget says, else as ComfyUI would load the same model from a 16-bit file.

    Raises CheckpointError for a model that ComfyUI does not know.
    """
    import comfy.model_management
    import comfy.utils

    file_dtype = FILE_DTYPES[checkpoint.dtype]
    state = outline(checkpoint)
    model_config = detected_config(checkpoint, state)
    supported = list(model_config.supported_inference_dtypes)

    def computes(dtype: torch.dtype) -> torch.dtype:
        cast = comfy.model_management.unet_manual_cast(dtype, device, supported)
        model_config.set_inference_dtype(dtype, cast, device=device)
        return model_config.manual_cast_dtype or model_config.unet_config["dtype"]

    if config.dtype == "auto":
        num_parameters = comfy.utils.calculate_parameters(state)
        asked = comfy.model_management.unet_dtype(
            model_params=num_parameters, supported_dtypes=supported, weight_dtype=file_dtype
        )
    else:
        asked = DTYPES[config.dtype]
    compute = computes(asked)
    if config.dtype == "fp32" or compute not in (*HALVES, torch.float32):
        return Dtypes(torch.float32, computes(torch.float32))
    # 16 bits in memory wherever ComfyUI computes alike with them
    fitting = (compute, file_dtype, *HALVES) if compute in HALVES else (file_dtype, *HALVES)
    storage = next((d for d in fitting if computes(d) == compute), torch.float32)
    return Dtypes(storage, compute)
