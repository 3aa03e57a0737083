"""Every bad file gets its sentence; mutated files never crash, hang or take memory."""

import json
import random
import resource
import struct
import sys
import time

import pytest
import svdquant_models
import torch
from safetensors.torch import load_file, save_file
from slipstream.backends.svdquant.assemble import assemble
from slipstream.backends.svdquant.dialects import detect
from slipstream.backends.svdquant.errors import CheckpointError
from slipstream.backends.svdquant.header import read_header


def read(path):
    return dict(assemble(detect(read_header(path)), torch.bfloat16))


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("good") / "good.safetensors"
    svdquant_models.write(path, "flux", "nunchaku-1", depth=1, single=1)
    return path


def changed(good, tmp_path, change, name="bad.safetensors"):
    tensors = load_file(good)
    change(tensors)
    path = tmp_path / name
    save_file(tensors, path)
    return path


def rewritten(good, tmp_path, change):
    """The file with its header's JSON text changed and its data kept."""
    raw = good.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    text = change(raw[8 : 8 + length].decode()).encode()
    path = tmp_path / "bad.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])
    return path


BLOCK = "transformer_blocks.0."


def drop(name):
    return lambda t: t.pop(name)


def put(name, make):
    def change(t):
        t[name] = make(t[name])

    return change


def nan(t):
    t = t.clone()
    t.view(-1)[5] = float("nan")
    return t


def zero(t):
    t = t.clone()
    t.view(-1)[5] = 0
    return t


CHANGES = [
    (drop(f"{BLOCK}qkv_proj.wscales"), r"layer transformer_blocks.0.qkv_proj lacks wscales: the"),
    (drop(f"{BLOCK}qkv_proj.qweight"), r"layer transformer_blocks.0.attn.to_qkv is missing"),
    (drop(f"{BLOCK}out_proj.smooth"), r"out_proj lacks smooth"),
    (drop(f"{BLOCK}norm1.linear.wzeros"), r"norm1.linear lacks wzeros"),
    (put(f"{BLOCK}qkv_proj.wscales", nan), r"qkv_proj has NaN or infinite values in .*wscales"),
    (put(f"{BLOCK}qkv_proj.smooth", zero), r"qkv_proj has zeros among its smoothing factors"),
    (put(f"{BLOCK}norm_q.weight", nan), r"norm_q.weight contains NaN"),
    (
        put(f"{BLOCK}qkv_proj.wscales", lambda t: t[:, :256].contiguous()),
        r"has wscales \[2, 256\], but int4 needs \[2, 384\]",
    ),
    (
        put(f"{BLOCK}qkv_proj.qweight", lambda t: t[:96].contiguous()),
        r"N=96, K=128: not a multiple of 128 \(group 64\)",
    ),
    (
        put(f"{BLOCK}qkv_proj.lora_down", lambda t: t[:, :24].contiguous()),
        r"has rank 24: not a multiple of 16",
    ),
    (
        put(f"{BLOCK}qkv_proj.lora_up", lambda t: t[:, :16].contiguous()),
        r"has lora_up BF16\[384, 16\], but .*\[384, 32\] fits the rest",
    ),
    (put(f"{BLOCK}qkv_proj.bias", lambda t: t.int()), r"has bias I32\[384\], but BF16"),
    (
        put(f"{BLOCK}norm1.linear.wscales", lambda t: t[:1].contiguous()),
        r"norm1.linear has 1 groups of scales",
    ),
    (
        lambda t: t.update({"some_other_layer.in_proj.weight": torch.zeros(4, 4)}),
        r"1 keys that FLUX.1 does not have \(some_other_layer.in_proj.weight\)",
    ),
]


@pytest.mark.parametrize(("change", "sentence"), CHANGES)
def test_damaged_contents(change, sentence, good, tmp_path):
    with pytest.raises(CheckpointError, match=sentence):
        read(changed(good, tmp_path, change))


def only(part):
    def change(t):
        for name in [n for n in t if not part(n)]:
            del t[name]

    return change


def test_other_kinds_of_files(good, tmp_path):
    lora = {
        "transformer_blocks.0.qkv_proj.lora_down": torch.zeros(128, 16),
        "transformer_blocks.0.qkv_proj.lora_up": torch.zeros(384, 16),
    }
    plain_lora = {"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": torch.zeros(4, 4)}
    dense = {"double_blocks.0.img_attn.qkv.weight": torch.zeros(4, 4)}
    sana = {f"transformer_blocks.0.qkv_proj.{n}": t for n, t in _layer(good).items()}
    sana["caption_projection.linear_1.weight"] = torch.zeros(4, 4)
    unknown = {f"layers.0.self_attention.to_q.{n}": t for n, t in _layer(good).items()}
    cases = [
        ("lora.safetensors", lora, "is a LoRA converted for nunchaku, not a model. Use the orig"),
        ("style.safetensors", plain_lora, "is a LoRA, not a model. Use a LoRA loader"),
        ("dense.safetensors", dense, r"is not an SVDQuant checkpoint \(no \*.qweight"),
        ("sana.safetensors", sana, "is a SANA model, which ComfyUI has no class for"),
        ("ernie.safetensors", unknown, "unknown family .first layers: layers.0.self_attention"),
    ]
    for name, tensors, sentence in cases:
        save_file({k: v.clone() for k, v in tensors.items()}, tmp_path / name)
        with pytest.raises(CheckpointError, match=sentence):
            read(tmp_path / name)
    with pytest.raises(CheckpointError, match="is a folder: choose a"):
        read(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        read(tmp_path / "nothing.safetensors")


def _layer(good):
    prefix = f"{BLOCK}qkv_proj."
    return {k.removeprefix(prefix): v for k, v in load_file(good).items() if k.startswith(prefix)}


def test_other_formats_of_comfyui_are_named(tmp_path):
    """Krea 2 files with convrot_w4a4 and a low-rank branch: other nodes read them."""
    text = json.dumps({"format": "convrot_w4a4"}).encode()
    tensors = {
        "blocks.0.attn.wq.weight": torch.zeros(128, 64, dtype=torch.int8),
        "blocks.0.attn.wq.weight_scale": torch.ones(2, 128),
        "blocks.0.attn.wq.comfy_quant": torch.tensor(list(text), dtype=torch.uint8),
        "blocks.0.attn.wq.proj_down": torch.zeros(128, 16),
    }
    save_file(tensors, tmp_path / "krea.safetensors")
    with pytest.raises(CheckpointError, match=r"quantised as convrot_w4a4, not SVDQuant.*made for"):
        read(tmp_path / "krea.safetensors")


def test_ltx2_in_diffusers_names_says_what_it_lacks(good, tmp_path):
    """Nunchaku Lite: ComfyUI's model holds the connectors, diffusers keeps them elsewhere."""
    suffixes = {"smooth": "smooth_factor", "lora_down": "proj_down", "lora_up": "proj_up"}
    layer = {suffixes.get(n, n): t for n, t in _layer(good).items() if n != "smooth_orig"}
    tensors = {f"transformer_blocks.0.attn1.to_q.{n}": t for n, t in layer.items()}
    tensors["av_cross_attn_video_scale_shift.linear.weight"] = torch.zeros(4, 4)
    save_file(tensors, tmp_path / "ltx.safetensors")
    with pytest.raises(CheckpointError, match="LTX-2 in diffusers' names, without the text conn"):
        read(tmp_path / "ltx.safetensors")


def test_a_missing_block_is_named(good, tmp_path):
    path = tmp_path / "two.safetensors"
    svdquant_models.write(path, "flux", "nunchaku-1", depth=3, single=1)
    with pytest.raises(CheckpointError, match=r"lacks transformer_blocks.1: the file is trunc"):
        read(changed(path, tmp_path, only(lambda n: not n.startswith("transformer_blocks.1."))))


def test_missing_metadata_is_no_problem(tmp_path):
    path = tmp_path / "plain.safetensors"
    from svdquant_files import Writer
    from svdquant_models import flux

    writer = Writer("nunchaku-2")
    flux(writer)
    writer.save(path, metadata=False)
    checkpoint = detect(read_header(path))
    assert (checkpoint.dialect, checkpoint.precision, checkpoint.ranks) == (
        "nunchaku-2",
        "int4",
        (32,),
    )


def hostile(length):
    return struct.pack("<Q", length) + b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}' * 2


HEADERS = [
    (b"", "too short"),
    (b"\x01\x00\x00", "too short"),
    (hostile(2**63), "not a safetensors file"),
    (hostile(0), "not a safetensors file"),
    (hostile(5000), "truncated inside its header"),
    (struct.pack("<Q", 4) + b"null", "damaged header"),
    (struct.pack("<Q", 4) + b"{{{{", "damaged header"),
    (struct.pack("<Q", 40000) + b"[" * 40000, "damaged header"),
    (struct.pack("<Q", 2) + b"\xff\xff", "damaged header"),
]


@pytest.mark.parametrize(("raw", "sentence"), HEADERS)
def test_hostile_headers(raw, sentence, tmp_path):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=sentence):
        read_header(path)


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


ENTRIES = [
    ({"a": entry(shape=(2**62, 2**62))}, "needs .* bytes"),
    ({"a": entry(shape=(-2,))}, "entry of a in its header is damaged"),
    ({"a": entry(offsets=(8, 0))}, "damaged"),
    ({"a": entry(offsets=(0, 2**70))}, "damaged"),
    ({"a": entry(dtype="F99")}, "damaged"),
    ({"a": entry(shape=(True, 2))}, "damaged"),
    ({"a": 3}, "damaged"),
    ({"a": entry(), "b": entry()}, "overlaps"),
    ({"a": entry(), "b": entry(offsets=(16, 24))}, "gap"),
    ({"a": entry(shape=(64,), offsets=(0, 256))}, "is truncated: its header describes"),
    ({"a": entry(shape=(1,), offsets=(0, 4))}, "bytes behind its last tensor"),
    ({"__metadata__": {"a": 3}, "a": entry()}, "damaged metadata"),
    ({"__metadata__": 3, "a": entry()}, "damaged metadata"),
]


@pytest.mark.parametrize(("fields", "sentence"), ENTRIES)
def test_hostile_entries(fields, sentence, tmp_path):
    text = json.dumps(fields).encode()
    path = tmp_path / "bad.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(24 if "b" in fields else 8))
    with pytest.raises(CheckpointError, match=sentence):
        read_header(path)


def test_duplicate_keys_and_truncation(good, tmp_path):
    twice = rewritten(good, tmp_path, lambda text: '{"x_embedder.bias":1,' + text[1:])
    with pytest.raises(CheckpointError, match=r"holds the key 'x_embedder\.bias' twice"):
        read_header(twice)
    raw = good.read_bytes()
    short = tmp_path / "short.safetensors"
    for cut in (len(raw) - 1, len(raw) // 2, 2000):
        short.write_bytes(raw[:cut])
        with pytest.raises(CheckpointError, match="truncated"):
            read(short)


def mutated(raw, generator):
    """The file's bytes with a few of them changed, removed or repeated, mostly in the header."""
    (length,) = struct.unpack("<Q", raw[:8])
    data = bytearray(raw)
    kind = generator.choice(("flip", "flip", "digit", "cut", "insert", "swap", "length"))
    at = generator.randrange(8, 8 + length)
    if kind == "flip":
        for _ in range(generator.randrange(1, 4)):
            data[generator.randrange(8, 8 + length)] = generator.randrange(256)
    elif kind == "digit":
        digits = [i for i in range(8, 8 + length) if chr(data[i]).isdigit()]
        for _ in range(generator.randrange(1, 6)):
            data[generator.choice(digits)] = ord(generator.choice("0123456789"))
    elif kind == "cut":
        del data[at : at + generator.randrange(1, 200)]
    elif kind == "insert":
        data[at:at] = bytes(generator.randrange(256) for _ in range(generator.randrange(1, 40)))
    elif kind == "swap":
        other = generator.randrange(8, 8 + length - 40)
        data[at : at + 30], data[other : other + 30] = data[other : other + 30], data[at : at + 30]
    else:
        data[:8] = struct.pack("<Q", generator.randrange(2**64))
    if generator.random() < 0.3:
        start = generator.randrange(8 + length, len(raw))
        data[start : start + 8] = bytes(generator.randrange(256) for _ in range(8))
    return bytes(data)


@pytest.fixture(scope="module")
def kitchen(tmp_path_factory):
    """In ComfyUI's own names, of a model that no family table knows."""
    from svdquant_files import Writer

    writer = Writer("comfy-kitchen")
    for name in ("blocks.0.attn.q", "blocks.0.attn.k", "blocks.1.attn.q"):
        writer.svdquant(name, writer.weight(128, 128), writer.randn(128))
    writer.modulation("blocks.0.mod", writer.weight(256, 128), writer.randn(256), 2)
    fp8 = json.dumps({"format": "float8_e4m3fn"}).encode()
    writer.tensors |= {
        "blocks.0.mlp.weight": torch.zeros(16, 16, dtype=torch.float8_e4m3fn),
        "blocks.0.mlp.weight_scale": torch.ones(()),
        "blocks.0.mlp.comfy_quant": torch.tensor(list(fp8), dtype=torch.uint8),
        "head.weight": torch.zeros(16, 16),
    }
    return writer.save(tmp_path_factory.mktemp("kitchen") / "kitchen.safetensors")


@pytest.mark.parametrize("kind", ["good", "kitchen"])
def test_200_mutated_files(kind, tmp_path, request):
    """Any of them either reads or raises CheckpointError, quickly, in no more memory than the good
    file, which was read before, and another of its size (and what an allocator keeps)."""
    good = request.getfixturevalue(kind)
    raw, generator = good.read_bytes(), random.Random(0)
    path = tmp_path / "mutated.safetensors"
    read(good)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused, slowest = [], 0.0
    for _ in range(200):
        path.write_bytes(mutated(raw, generator))
        start = time.perf_counter()
        try:
            read(path)
        except CheckpointError as error:
            refused.append(str(error))
        slowest = max(slowest, time.perf_counter() - start)
    assert len(refused) > 100
    assert all(len(text.split()) > 3 and text[-1] not in "([:," for text in refused)
    assert slowest < 10
    unit = 1 if sys.platform == "darwin" else 1024
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * unit
    assert grown < len(raw) + (8 << 20)
