"""A stand-in for ComfyUI's ModelPatcher, guider and euler sampler, with a small DiT. Torch only.

The engine runs on it where no ComfyUI can be had: in the unit tests and in the standalone mode of
`./run`. It keeps ComfyUI's order of hooks, argument positions and clone rules (0.33); the tests in
tests/unit/test_contract.py hold for it and for the real one alike.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

Options = dict[str, Any]


def copy_containers(value: Any) -> Any:
    """Dicts and lists copied, everything else shared: what clone() does to model_options."""
    if isinstance(value, dict):
        return {key: copy_containers(item) for key, item in value.items()}
    return [copy_containers(item) for item in value] if isinstance(value, list) else value


def flatten(by_key: dict[Any, list[Callable]]) -> list[Callable]:
    """The callables of all keys, in the order in which the keys came."""
    return [function for group in by_key.values() for function in group]


class Executor:
    """What a wrapper gets first: calling it runs the next wrapper. The first added is outermost."""

    def __init__(self, original: Callable, class_obj: Any, wrappers: list[Callable]):
        self.original, self.class_obj, self.wrappers = original, class_obj, wrappers

    def execute(self, *args: Any, **kwargs: Any) -> Any:
        """Run the first wrapper, or the original if there is none."""
        if not self.wrappers:
            return self.original(*args, **kwargs)
        inner = Executor(self.original, self.class_obj, self.wrappers[1:])
        return self.wrappers[0](inner, *args, **kwargs)

    __call__ = execute


def around(kind: str, original: Callable, class_obj: Any, options: Options) -> Executor:
    """`original` inside all wrappers of `kind` that these transformer_options carry."""
    return Executor(original, class_obj, flatten(options.get("wrappers", {}).get(kind, {})))


def attention(*args: Any, **kwargs: Any) -> Tensor:
    """ComfyUI's wrap_attn: an override in the transformer_options gets the call."""
    kwargs["_inside_attn_wrapper"] = True
    override = kwargs["transformer_options"].get("optimized_attention_override")
    return (
        override(attention_sdpa, *args, **kwargs) if override else attention_sdpa(*args, **kwargs)
    )


def attention_sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    mask: Tensor | None = None,
    attn_precision: Any = None,
    skip_reshape: bool = False,
    skip_output_reshape: bool = False,
    **kwargs: Any,
) -> Tensor:
    """torch's SDPA in ComfyUI's signature. q, k, v: [B, N, H*D]; [B, H, N, D] if skip_reshape."""
    if not skip_reshape:
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    if mask is not None and mask.ndim < 4:
        mask = mask[None, None] if mask.ndim == 2 else mask[:, None]
    extra = {name: kwargs[name] for name in ("scale", "enable_gqa") if name in kwargs}
    out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, **extra)
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


def sinusoid(positions: Tensor, width: int) -> Tensor:
    """[N] -> [N, width], the usual sines and cosines."""
    half = width // 2
    rates = torch.exp(-math.log(10000.0) * torch.arange(half, device=positions.device) / half)
    angles = positions.float()[:, None] * rates
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


class ReferenceBlock(nn.Module):
    """Modulated self-attention, cross-attention to the text, MLP: two attention calls per block."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.modulation = nn.Linear(width, 2 * width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.cross_q, self.cross_kv = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.cross_out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(
        self, x: Tensor, context: Tensor, vec: Tensor, transformer_options: Options
    ) -> Tensor:
        scale, shift = self.modulation(vec)[:, None].chunk(2, dim=-1)
        h = functional.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift
        q, k, v = self.qkv(h).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        h = attention(
            q, k, v, self.num_heads, skip_reshape=True, transformer_options=transformer_options
        )
        x = x + self.out(h)
        q = self.cross_q(functional.layer_norm(x, x.shape[-1:]))
        k, v = self.cross_kv(context).chunk(2, dim=-1)
        h = attention(q, k, v, heads=self.num_heads, transformer_options=transformer_options)
        x = x + self.cross_out(h)
        return x + self.mlp(functional.layer_norm(x, x.shape[-1:]))


class ReferenceDiT(nn.Module):
    """A flow transformer: [B, 16, H, W] -> the same shape, one token per latent pixel.

    Random weights: it shows mechanisms, never image quality. Runs DIFFUSION_MODEL wrappers and
    names its blocks in transformer_options as ComfyUI's models do.
    """

    def __init__(self, width: int = 32, num_heads: int = 2, num_layers: int = 2, seed: int = 0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.img_in, self.txt_in = nn.Linear(16, width), nn.Linear(32, width)
            self.time_in = nn.Sequential(nn.Linear(width, width), nn.SiLU())
            self.blocks = nn.ModuleList(ReferenceBlock(width, num_heads) for _ in range(num_layers))
            self.head = nn.Linear(width, 16)
        self.requires_grad_(False).eval()

    @property
    def dtype(self) -> torch.dtype:
        return self.head.weight.dtype

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        control: Any = None,
        transformer_options: Options | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """x: [B, 16, H, W]; timestep: [B], 1 (noise) to 0; context: [B, T, 32]."""
        options = transformer_options if transformer_options is not None else {}
        executor = around("diffusion_model", self._forward, self, options)
        return executor.execute(x, timestep, context, control, options, **kwargs)

    def _forward(
        self, x: Tensor, timestep: Tensor, context: Tensor, control: Any, options: Options
    ) -> Tensor:
        tokens = self.img_in(x.flatten(2).transpose(1, 2))
        width, num_tokens = tokens.shape[-1], tokens.shape[1]
        h = tokens + sinusoid(torch.arange(num_tokens, device=x.device), width).to(tokens)
        vec = self.time_in(sinusoid(timestep * 1000, width).to(tokens))
        context = self.txt_in(context)
        options["total_blocks"], options["block_type"] = len(self.blocks), "double"
        for index, block in enumerate(self.blocks):
            options["block_index"] = index
            h = block(h, context, vec, options)
        return self.head(h).transpose(1, 2).reshape(x.shape)


class ReferenceModel(nn.Module):
    """ComfyUI's BaseModel as far as patches see it: apply_model and the current patcher."""

    def __init__(self, diffusion_model: nn.Module | None = None):
        super().__init__()
        network = diffusion_model if diffusion_model is not None else ReferenceDiT()
        self.diffusion_model: Any = network  # with a dtype, as ComfyUI's networks have
        self.current_patcher: ReferencePatcher | None = None

    def apply_model(
        self,
        x: Tensor,
        t: Tensor,
        c_concat: Any = None,
        c_crossattn: Tensor | None = None,
        control: Any = None,
        transformer_options: Options | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The denoised latent at sigma `t` ([B])."""
        options = transformer_options if transformer_options is not None else {}
        executor = around("apply_model", self._apply_model, self, options)
        return executor.execute(x, t, c_concat, c_crossattn, control, options, **kwargs)

    def _apply_model(
        self,
        x: Tensor,
        t: Tensor,
        c_concat: Any,
        c_crossattn: Tensor,
        control: Any,
        options: Options,
        **kwargs: Any,
    ) -> Tensor:
        dtype = self.diffusion_model.dtype
        out = self.diffusion_model(
            x.to(dtype),
            t.float(),
            context=c_crossattn.to(dtype),
            control=control,
            transformer_options=options.copy(),
            **kwargs,
        )
        return x - t.view(-1, 1, 1, 1) * out.float()


class ReferencePatcher:
    """ComfyUI's ModelPatcher as far as our techniques use it."""

    def __init__(self, model: nn.Module | None = None):
        self.model: Any = model if model is not None else ReferenceModel()
        self.load_device = self.offload_device = torch.device("cpu")
        self.model_options: Options = {"transformer_options": {}}
        self.wrappers: dict[str, dict[Any, list[Callable]]] = {}
        self.callbacks: dict[str, dict[Any, list[Callable]]] = {}
        self.attachments: Options = {}
        self.additional_models: dict[str, list[Any]] = {}

    def clone(self) -> "ReferencePatcher":
        """Own containers, shared objects; attachments may say how they are cloned."""
        new = self.__class__(self.model)
        new.load_device, new.offload_device = self.load_device, self.offload_device
        new.model_options = copy_containers(self.model_options)
        new.wrappers = copy_containers(self.wrappers)
        new.callbacks = copy_containers(self.callbacks)
        for key, value in self.attachments.items():
            cloned = getattr(value, "on_model_patcher_clone", None)
            new.attachments[key] = cloned() if cloned is not None else value
        for callback in self.get_all_callbacks("on_clone"):
            callback(self, new)
        return new

    def is_clone(self, other: Any) -> bool:
        return getattr(other, "model", None) is self.model

    def model_dtype(self) -> torch.dtype:
        return self.model.diffusion_model.dtype

    def add_wrapper_with_key(self, kind: str, key: Any, wrapper: Callable) -> None:
        self.wrappers.setdefault(kind, {}).setdefault(key, []).append(wrapper)

    def remove_wrappers_with_key(self, kind: str, key: Any) -> None:
        self.wrappers.get(kind, {}).pop(key, None)

    def get_wrappers(self, kind: str, key: Any) -> list[Callable]:
        return self.wrappers.get(kind, {}).get(key, [])

    def get_all_wrappers(self, kind: str) -> list[Callable]:
        return flatten(self.wrappers.get(kind, {}))

    def add_callback_with_key(self, kind: str, key: Any, callback: Callable) -> None:
        self.callbacks.setdefault(kind, {}).setdefault(key, []).append(callback)

    def remove_callbacks_with_key(self, kind: str, key: Any) -> None:
        self.callbacks.get(kind, {}).pop(key, None)

    def get_callbacks(self, kind: str, key: Any) -> list[Callable]:
        return self.callbacks.get(kind, {}).get(key, [])

    def get_all_callbacks(self, kind: str) -> list[Callable]:
        return flatten(self.callbacks.get(kind, {}))

    def set_attachments(self, key: str, value: Any) -> None:
        self.attachments[key] = value

    def remove_attachments(self, key: str) -> None:
        self.attachments.pop(key, None)

    def get_attachment(self, key: str) -> Any:
        return self.attachments.get(key)
