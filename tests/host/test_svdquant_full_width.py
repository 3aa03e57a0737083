"""Files of real width, one block: ComfyUI's own detection finds the class, and a layer is right.

Qwen-Image, Z-Image and SDXL have fixed widths in ComfyUI's detection, so no small file goes through
it. SDXL's depths are fixed as well: the file has those of Segmind Vega, the smallest that detection
takes for an SDXL.
"""

import pytest
import svdquant_files
import torch
from safetensors.torch import save_file
from slipstream.backends.svdquant import layouts
from slipstream.backends.svdquant.host import load_svdquant
from slipstream.backends.svdquant.host_patcher import quantised_layers
from slipstream.backends.svdquant.layout import unwrap
from slipstream.backends.svdquant.weight import effective
from svdquant_wide import qwen_image, sdxl, z_image

pytestmark = pytest.mark.usefixtures("comfy")
CASES = [
    ("QwenImage", qwen_image, "transformer_blocks.0.attn.to_k", 3584, (1, 16, 1, 4, 4)),
    ("Lumina2", z_image, "layers.0.feed_forward.w1", 2560, (1, 16, 4, 4)),
    ("SDXL", sdxl, "input_blocks.7.1.transformer_blocks.1.attn1.to_v", 2048, (1, 4, 8, 8)),
]
MORE = {
    "QwenImage": {"attention_mask": None},
    "Lumina2": {"num_tokens": 6, "attention_mask": None},
    "SDXL": {"y": torch.ones(1, 2816)},
}


@pytest.mark.parametrize(("base", "make", "layer", "text", "shape"), CASES)
def test_one_block_of_full_width(base, make, layer, text, shape, tmp_path):
    import comfy.model_management

    path = tmp_path / "model.safetensors"
    tensors = make()
    save_file(tensors, path)
    rows = rows_by_hand(tensors, layer)
    del tensors
    model = load_svdquant(str(path), {"backend": "dequant"})
    assert type(model.model).__name__ == base
    comfy.model_management.load_models_gpu([model], force_full_load=True)
    module = quantised_layers(model.model)[f"diffusion_model.{layer}"]
    x = torch.randn(4, module.in_features)
    with torch.no_grad():
        y = module(x) - (0 if module.bias is None else module.bias.float())
        wanted = x.bfloat16().float() @ rows.t()
        assert float((y - wanted).norm() / wanted.norm()) < 8e-3
        assert torch.allclose(effective(unwrap(module.weight)), rows)
        out = model.model.diffusion_model(
            torch.randn(*shape),
            torch.tensor([0.5]),
            context=torch.randn(1, 6, text),
            **MORE[base],
        )
    assert out.shape == shape
    assert torch.isfinite(out).all()
    assert out.std() > 1e-3


def rows_by_hand(tensors, layer):
    """The dense rows of one ComfyUI layer, from the file's fused one."""
    source, index, count = {
        "transformer_blocks.0.attn.to_k": ("transformer_blocks.0.attn.to_qkv", 1, 3),
        "layers.0.feed_forward.w1": ("layers.0.feed_forward.net.0.proj", 1, 2),
        "input_blocks.7.1.transformer_blocks.1.attn1.to_v": (
            "down_blocks.2.attentions.0.transformer_blocks.1.attn1.to_qkv",
            2,
            3,
        ),
    }[layer]
    names = svdquant_files.OLD if f"{source}.lora_up" in tensors else svdquant_files.NEW
    part = {key: tensors[f"{source}.{name}"] for key, name in names.items()}
    codes = layouts.codes_from_plain(layouts.weight_from_file(part["q"]), signed=True)
    scale = layouts.scales_from_file(part["scale"]).t().float().repeat_interleave(64, 1)
    smooth = layouts.vector_from_file(part["smooth"]).float()
    branch = layouts.up_from_file(part["up"]).float() @ (
        layouts.down_from_file(part["down"]).float().t()
    )
    return (codes.float() * scale / smooth + branch).chunk(count)[index]
