"""Token plans of the other image families (ComfyUI 0.33)."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

from .tokens import Blocks, Gather, GatherOut, Shards, Tok, TokenPlan, boundary, ranges

X = Tok(1, ("x",))
IMG, TXT = Tok(1, ("img",)), Tok(1, ("txt",))
TXT_IMG, IMG_TXT = ("txt", "img"), ("img", "txt")

# --- Qwen-Image and Mage-Flow: their blocks build the joint mask from local lengths

QWEN_IMAGE = TokenPlan(
    blocks=(
        Blocks(
            path="transformer_blocks.*",
            layout=TXT_IMG,
            args={
                "hidden_states": IMG,
                "encoder_hidden_states": TXT,
                "encoder_hidden_states_mask": TXT,
                "image_rotary_emb": Tok(2, TXT_IMG),
                "timestep_zero_index": boundary("img"),
            },
            define=("hidden_states", "encoder_hidden_states"),
        ),
    ),
    end=Gather(path="norm_out", args={"x": IMG}),
    control={"input": IMG},
    heads="transformer_blocks.0.attn.heads",
)

# --- SD3, SD3.5: the joint blocks take (text, image); some image layers attend twice

SD3 = TokenPlan(
    blocks=(
        Blocks(
            path="joint_blocks.*",
            layout=TXT_IMG,
            args={0: TXT, 1: IMG},
            define=(0, 1),
            other_layouts=(("img",),),
            attention=(1, 2),
        ),
    ),
    end=Gather(path="final_layer", args={"x": IMG}),
    control={"output": IMG},
)

# --- Lumina 2 and Z-Image: refiners run before, on whole streams

LUMINA2 = TokenPlan(
    blocks=(
        Blocks(
            path="layers.*",
            layout=("x",),
            args={"x": X, "freqs_cis": X, "timestep_zero_index": ranges("x", keep=2)},
            define=("x",),
        ),
    ),
    end=Gather(path="final_layer", args={"x": X}),
    heads="layers.0.attention.n_local_heads",
)

# --- HiDream-I1: fresh text tokens are appended in every block, so text stays whole


def _enter_hidream(shards: Shards, get: Callable[[Any], Any]) -> None:
    image, text = get("image_tokens"), get("text_tokens")
    if "img" not in shards.full:
        shards.define("img", image.shape[1])
    length = image.shape[1] - shards.local(("img",)) if text is None else text.shape[1]
    if shards.full.get("txt") != length:
        shards.replicate("txt", length)


HIDREAM = TokenPlan(
    blocks=(
        Blocks(
            path="double_stream_blocks.*",
            layout=IMG_TXT,
            args={"image_tokens": IMG, "rope": Tok(1, IMG_TXT)},
            enter=_enter_hidream,
        ),
        Blocks(
            path="single_stream_blocks.*",
            layout=IMG_TXT,
            args={"rope": Tok(1, IMG_TXT)},
            enter=_enter_hidream,
        ),
    ),
    end=Gather(path="final_layer", args={"x": IMG}),
    replicate=("txt",),
    heads="double_stream_blocks.0.block.attn1.num_heads",
)

# --- HiDream-O1: the text is causal and attends by itself on every rank, pixels attend to all


@cache
def _hidream_o1(num_text: int) -> TokenPlan:
    """The plan for a prompt whose first `num_text` tokens do not see the pixels."""
    everything = ("txt", "x")

    def enter(shards: Shards, get: Callable[[Any], Any]) -> None:
        if "x" not in shards.full:
            shards.replicate("txt", num_text)
            shards.define("x", get("x").shape[1] - num_text)

    return TokenPlan(
        blocks=(
            Blocks(
                path="language_model.layers.*",
                layout=everything,
                args={"x": Tok(1, everything), "freqs_cis": Tok(-2, everything)},
                enter=enter,
            ),
        ),
        end=Gather(path="language_model.norm", args={0: Tok(1, everything)}),
        attention_layouts={"language_model.layers.*.self_attn": (("x",), everything)},
        heads="text_config.num_attention_heads",
    )


def _for_prompt(arguments: Mapping[str, Any]) -> TokenPlan:
    return _hidream_o1(arguments.get("ar_len") or 0)


HIDREAM_O1 = replace(_hidream_o1(0), variant=_for_prompt)

# --- AuraFlow: positions are added before the blocks

AURA_FLOW = TokenPlan(
    blocks=(
        Blocks(
            path="double_layers.*", layout=TXT_IMG, args={"c": TXT, "x": IMG}, define=("c", "x")
        ),
        Blocks(path="single_layers.*", layout=TXT_IMG, args={"cx": Tok(1, TXT_IMG)}),
    ),
    end=Gather(path="final_linear", args={0: IMG}),
    heads="double_layers.0.attn.n_heads",
)

# --- single-stream families

KREA2 = TokenPlan(
    blocks=(
        Blocks(
            path="blocks.*",
            layout=("x",),
            args={"x": X, "freqs": Tok(2, ("x",)), "timestep_zero_index": boundary("x")},
            define=("x",),
        ),
    ),
    end=Gather(path="last", args={"x": X}),
    heads="blocks.0.attn.heads",
)
IDEOGRAM4 = TokenPlan(
    blocks=(Blocks(path="layers.*", layout=("x",), args={"x": X, "freqs_cis": X}, define=("x",)),),
    end=Gather(path="final_layer", args={"x": X}),
    heads="layers.0.attention.num_heads",
)
OMNIGEN2 = TokenPlan(
    blocks=(
        Blocks(
            path="layers.*",
            layout=("x",),
            args={"hidden_states": X, "image_rotary_emb": X},
            define=("hidden_states",),
        ),
    ),
    end=Gather(path="norm_out", args={0: X}),
    heads="layers.0.attn.heads",
)

# --- dual-stream families

LENS = TokenPlan(
    blocks=(
        Blocks(
            path="transformer_blocks.*",
            layout=IMG_TXT,
            args={
                "hidden_states": IMG,
                "encoder_hidden_states": TXT,
                "freqs_cis": Tok(2, IMG_TXT),
                "attention_mask": Tok(3, IMG_TXT),
            },
            define=("hidden_states", "encoder_hidden_states"),
        ),
    ),
    end=Gather(path="norm_out", args={0: IMG}),
    control={"input": IMG},
    heads="transformer_blocks.0.attn.heads",
)
JOYIMAGE = TokenPlan(
    blocks=(
        Blocks(
            path="double_blocks.*",
            layout=IMG_TXT,
            args={"hidden_states": IMG, "encoder_hidden_states": TXT, "image_rotary_emb": IMG},
            define=("hidden_states", "encoder_hidden_states"),
        ),
    ),
    end=GatherOut(path="double_blocks.*", tok=IMG, index=0),
    heads="double_blocks.0.attn.num_attention_heads",
)

PLANS = {
    "QwenImageTransformer2DModel": QWEN_IMAGE,
    "MageFlowTransformer2DModel": QWEN_IMAGE,
    "OpenAISignatureMMDITWrapper": SD3,
    "NextDiT": LUMINA2,
    "MMDiT": AURA_FLOW,
    "HiDreamImageTransformer2DModel": HIDREAM,
    "HiDreamO1Transformer": HIDREAM_O1,
    "SingleStreamDiT": KREA2,
    "Ideogram4Transformer2DModel": IDEOGRAM4,
    "OmniGen2Transformer2DModel": OMNIGEN2,
    "LensTransformer2DModel": LENS,
    "JoyImageTransformer3DModel": JOYIMAGE,
}
