"""How prompts of different length become rows of one tensor, by text encoder, as data.

The rule is that a row must give what its prompt alone would give. What a network does with the
rows of a padded prompt decides that, and a CLIP does not name the network; its tokenizer's class
does, except where two families share one (then prompts of another length get another batch).
Measured per family in tests/host/test_prompts.py; classes of ComfyUI 0.33.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Way = Literal["repeat", "mask", "left", "none", "alone"]

# A repeated prompt is at most this many times as long as the longest one of its batch: prompts of
# 3, 4 and 5 chunks of 77 tokens would be 60 chunks.
MAX_REPEATED = 4


@dataclass(frozen=True, kw_only=True)
class Padding:
    """way: of making lengths equal; why: what hinders the rest, as a clause; up_to: tokens.

    repeat: the whole prompt several times. Cross-attention alone reads it, so every key's weight is
        shared among its copies, and the sum is the same (comfy/conds.py, CONDCrossAttn).
    mask: rows of zeros behind the prompt, and an attention_mask that the network obeys.
    left: rows of zeros before the prompt, as the network itself adds them to up_to tokens.
    none: only prompts of the same length, masked alike, share a batch. alone: never two prompts.
    """

    way: Way
    why: str = ""
    up_to: int = 0


_JOINT = "the network attends to every row of a prompt, padding too"
_T5 = f"{_JOINT} (T5 Tokenizer Options in front gives all prompts one length)"
_REPEAT = Padding(way="repeat", why="repeated to a common length they would be much longer")
_MASK = Padding(way="mask")

UNKNOWN = Padding(way="none", why="nothing is known about padding for this text encoder")

PADDING: dict[str, Padding] = {
    "comfy.sd1_clip.SD1Tokenizer": _REPEAT,
    "comfy.text_encoders.sd2_clip.SD2Tokenizer": _REPEAT,
    "comfy.sdxl_clip.SDXLTokenizer": _REPEAT,
    "comfy.text_encoders.qwen_image.QwenImageTokenizer": _MASK,
    "comfy.text_encoders.mage_flow.MageFlowTokenizer": _MASK,
    "comfy.text_encoders.gpt_oss.LensTokenizer": _MASK,
    "comfy.text_encoders.ideogram4.Ideogram4Tokenizer": _MASK,
    "comfy.text_encoders.ideogram4.Ideogram4Qwen3VLTokenizer": _MASK,
    "comfy.text_encoders.lt.LTXVT5Tokenizer": _MASK,
    "comfy.text_encoders.flux.Flux2Tokenizer": Padding(
        way="left", up_to=512, why="above 512 tokens FLUX.2 does not pad"
    ),
    "comfy.text_encoders.flux.FluxTokenizer": Padding(way="none", why=_T5),
    "comfy.text_encoders.sd3_clip.SD3Tokenizer": Padding(way="none", why=_T5),
    # PixArt and Chroma share it; PixArt could repeat, Chroma could not.
    "comfy.text_encoders.pixart_t5.PixArtTokenizer": Padding(way="none", why=_T5),
    "comfy.text_encoders.z_image.ZImageTokenizer": Padding(
        way="none", why="Z-Image takes no mask, and its image tokens count from the prompt's end"
    ),
    "comfy.text_encoders.lumina2.LuminaTokenizer": Padding(
        way="none", why="Lumina 2 takes no mask, and its image tokens count from the prompt's end"
    ),
    "comfy.text_encoders.hunyuan_video.HunyuanVideoTokenizer": Padding(
        way="none", why="HunyuanVideo takes a mask for one row only"
    ),
    "comfy.text_encoders.genmo.MochiT5Tokenizer": Padding(
        way="none", why="Mochi counts the tokens of all rows together"
    ),
    "comfy.text_encoders.minimax.MiniMaxH3Tokenizer": Padding(
        way="alone", why="MiniMax H3 takes a batch of 1"
    ),
    "comfy.text_encoders.anima.AnimaTokenizer": Padding(
        way="alone", why="Anima takes the T5 tokens of one prompt"
    ),
    "comfy.text_encoders.ace15.ACE15Tokenizer": Padding(
        way="alone", why="ACE-Step 1.5 does not keep the rows of a batch apart"
    ),
}


def padding_of(clip: Any) -> Padding:
    """By the exact class of the CLIP's tokenizer: a subclass may serve another network."""
    kind = type(getattr(clip, "tokenizer", None))
    return PADDING.get(f"{kind.__module__}.{kind.__qualname__}", UNKNOWN)


def common_length(lengths: Sequence[int], padding: Padding) -> int | None:
    """Tokens that prompts of these lengths can all have, or None."""
    longest = max(lengths)
    if padding.way == "repeat":
        length = math.lcm(*lengths)
        return length if length <= MAX_REPEATED * longest else None
    if padding.way == "mask" or (padding.way == "left" and longest <= padding.up_to):
        return longest
    return longest if longest == min(lengths) else None
