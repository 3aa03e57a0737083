"""Random-weight models of full width for `python bench offload`, and the sizes to sample."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

Sizes = dict[str, tuple[int, ...]]
Parts = tuple[Any, Sizes, Callable[[], Any]]  # network, sizes, conditioning


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model and how to sample it.

    load() -> a fresh ModelPatcher; sizes: name -> latent shape, small to large; conditioning() ->
    CONDITIONING for that family.
    """

    load: Callable[[], Any]
    sizes: Sizes
    conditioning: Callable[[], Any]
    steps: int = 8


def make(model: str, *, rehearse: bool = False) -> Case:
    """wan (20 of 40 blocks), wan-video (10), flux (all 57), qwen (20 of 60) or sdxl, in bf16. Call
    it first: with dynamic memory on ComfyUI makes networks without weights.

    rehearse: narrow networks and small latents under the same names. Raises ValueError for models
    that ComfyUI knows in full width only.
    """
    if rehearse and model not in REHEARSED:
        raise ValueError(f"{model} has no narrow form: ComfyUI knows it in full width only")
    network, sizes, text = (REHEARSED if rehearse else PARTS)[model]()
    weights = random_weights(network)

    def load() -> Any:
        import comfy.sd  # type: ignore[import-not-found]

        return comfy.sd.load_diffusion_model_state_dict(dict(weights))

    return Case(load=load, sizes=sizes, conditioning=text)


def num_blocks(model: Any) -> str:
    """ "10 blocks, " of a loaded model, "" where there is no plain list of them."""
    network = model.model.diffusion_model
    names = ("blocks", "transformer_blocks", "double_blocks", "single_blocks")
    count = sum(len(getattr(network, name, ())) for name in names)
    return f"{count} blocks, " if count else ""


def turn_dynamic_on() -> None:
    """ComfyUI's dynamic memory management, as its main.py turns it on (0.33)."""
    import comfy.memory_management
    import comfy.model_management as management
    import comfy.model_patcher
    import comfy_aimdo.control as control  # type: ignore[import-not-found]

    devices = [device.index for device in management.get_all_torch_devices()]
    try:
        ready = control.init_devices((index, 0) for index in devices)
    except TypeError:  # comfy-aimdo 0.4.9
        ready = control.init_devices(iter(devices))
    if not ready:
        raise RuntimeError("comfy-aimdo does not work here: measure with --managers classic")
    comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
    comfy.memory_management.aimdo_enabled = True


def random_block() -> torch.Tensor:
    """A million small random numbers in bf16."""
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(1 << 20, generator=generator) * 0.02).bfloat16()


def repeated(some: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """`some`, again and again: drawing billions of numbers takes minutes."""
    count = math.prod(shape)
    return some.repeat(-(-count // some.numel()))[:count].view(shape)


def random_weights(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """bf16 weights of a network on the meta device, from one small random block, repeated."""
    some = random_block()
    weights = {}
    for name, value in network.state_dict().items():
        if value.ndim > 1:
            weights[name] = repeated(some, value.shape)
        else:
            is_scale = name.endswith(("weight", "scale"))  # of a norm
            weights[name] = torch.full(value.shape, 1.0 if is_scale else 0.0).bfloat16()
    return weights


def _common() -> dict[str, Any]:
    import comfy.ops  # type: ignore[import-not-found]

    return {"operations": comfy.ops.manual_cast, "device": "meta", "dtype": torch.bfloat16}


def _text(*shape: int, **extra: Any) -> Callable[[], Any]:
    def make_text() -> Any:
        generator = torch.Generator().manual_seed(1)
        return [[torch.randn(shape, generator=generator) * 0.1, dict(extra)]]

    return make_text


_WAN_SIZES: Sizes = {
    "480p 1 frame": (1, 16, 1, 60, 104),
    "480p 17 frames": (1, 16, 5, 60, 104),
    "480p 49 frames": (1, 16, 13, 60, 104),
}
_WAN_VIDEO: Sizes = {"480p 81 frames": (1, 16, 21, 60, 104)}
_FLUX_SIZES: Sizes = {
    "512": (1, 16, 64, 64),
    "1024": (1, 16, 128, 128),
    "2048": (1, 16, 256, 256),
}


def _wan(sizes: Sizes, *, num_heads: int, ffn_dim: int, num_layers: int, text_len: int) -> Parts:
    from comfy.ldm.wan.model import WanModel  # type: ignore[import-not-found]

    network = WanModel(
        model_type="t2v", patch_size=(1, 2, 2), text_len=text_len, in_dim=16, dim=128 * num_heads,
        ffn_dim=ffn_dim, freq_dim=256, text_dim=4096, out_dim=16, num_heads=num_heads,
        num_layers=num_layers, **_common(),
    )  # fmt: skip
    return network, sizes, _text(1, text_len, 4096)


def _flux(sizes: Sizes, *, num_heads: int, depths: tuple[int, int], num_words: int) -> Parts:
    from comfy.ldm.flux.model import Flux  # type: ignore[import-not-found]

    network = Flux(
        image_model="flux", in_channels=16, out_channels=16, patch_size=2, vec_in_dim=768,
        context_in_dim=4096, hidden_size=128 * num_heads, mlp_ratio=4.0, num_heads=num_heads,
        depth=depths[0], depth_single_blocks=depths[1], axes_dim=[16, 56, 56], theta=10000,
        qkv_bias=True, guidance_embed=True, txt_ids_dims=[], **_common(),
    )  # fmt: skip
    pooled = torch.zeros(1, 768)
    return network, sizes, _text(1, num_words, 4096, pooled_output=pooled, guidance=3.5)


def _qwen() -> Parts:
    from comfy.ldm.qwen_image.model import (  # type: ignore[import-not-found]
        QwenImageTransformer2DModel,
    )

    network = QwenImageTransformer2DModel(num_layers=20, **_common())
    sizes: Sizes = {
        "512": (1, 16, 1, 64, 64),
        "1024": (1, 16, 1, 128, 128),
        "1328": (1, 16, 1, 166, 166),
    }
    return network, sizes, _text(1, 256, 3584)


def _sdxl() -> Parts:
    from comfy.ldm.modules.diffusionmodules.openaimodel import (  # type: ignore[import-not-found]
        UNetModel,
    )

    network = UNetModel(
        image_size=32, in_channels=4, out_channels=4, model_channels=320, num_res_blocks=[2, 2, 2],
        channel_mult=(1, 2, 4), num_head_channels=64, use_spatial_transformer=True,
        transformer_depth=[0, 0, 2, 2, 10, 10], transformer_depth_middle=10,
        transformer_depth_output=[0, 0, 0, 2, 2, 2, 10, 10, 10], context_dim=2048,
        use_linear_in_transformer=True, num_classes="sequential", adm_in_channels=2816,
        legacy=False, **_common(),
    )  # fmt: skip
    sizes: Sizes = {"1024": (1, 4, 128, 128)}
    return network, sizes, _text(1, 77, 2048, pooled_output=torch.zeros(1, 1280))


_WAN_14B = {"num_heads": 40, "ffn_dim": 13824, "text_len": 512}
_NARROW_WAN = {"num_heads": 1, "ffn_dim": 256, "num_layers": 6, "text_len": 8}
PARTS: dict[str, Callable[[], Parts]] = {
    "wan": partial(_wan, _WAN_SIZES, **_WAN_14B, num_layers=20),
    "wan-video": partial(_wan, _WAN_VIDEO, **_WAN_14B, num_layers=10),
    "flux": partial(_flux, _FLUX_SIZES, num_heads=24, depths=(19, 38), num_words=512),
    "qwen": _qwen,
    "sdxl": _sdxl,
}


def _smaller(sizes: Sizes) -> Sizes:
    """The same names and axes with a few tokens."""
    return {name: (*shape[:2], *(min(n, 2) for n in shape[2:-2]), 8, 8)
            for name, shape in sizes.items()}  # fmt: skip


REHEARSED: dict[str, Callable[[], Parts]] = {
    "wan": partial(_wan, _smaller(_WAN_SIZES), **_NARROW_WAN),
    "wan-video": partial(_wan, _smaller(_WAN_VIDEO), **_NARROW_WAN),
    "flux": partial(_flux, _smaller(_FLUX_SIZES), num_heads=1, depths=(3, 4), num_words=8),
}
