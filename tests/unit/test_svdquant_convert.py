"""Convert: what it writes is what the readers read, in Nunchaku's names; calibration pays."""

import json

import pytest
import svdquant_models
import torch
from safetensors.torch import load_file, save_file
from slipstream.backends.svdquant.assemble import assemble
from slipstream.backends.svdquant.config import ConvertConfig
from slipstream.backends.svdquant.convert import convert
from slipstream.backends.svdquant.dialects import detect
from slipstream.backends.svdquant.errors import CheckpointError
from slipstream.backends.svdquant.header import read_header
from slipstream.backends.svdquant.kernels import Reference
from slipstream.backends.svdquant.linear import linear
from slipstream.backends.svdquant.quantize import (
    quantise_inputs,
    round_int4,
)
from slipstream.backends.svdquant.statistics import LayerInputs, Statistics, load_statistics
from slipstream.backends.svdquant.weight import QuantWeight, effective, unsigned_output


def rel(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-12))


def dense_file(tmp_path, family, prefix="", **sizes):
    """A 16-bit file in ComfyUI's names, and its tensors as stored."""
    path = tmp_path / "any.safetensors"
    dense = svdquant_models.write(path, family, svdquant_models.OWN[family], **sizes)
    dense = {name: tensor.bfloat16() for name, tensor in dense.items()}
    path = tmp_path / f"{family}.safetensors"
    save_file({prefix + n: t.contiguous() for n, t in dense.items()}, path)
    return path, dense


def read(path):
    checkpoint = detect(read_header(path))
    return checkpoint, dict(assemble(checkpoint, torch.bfloat16))


@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
@pytest.mark.parametrize("family", svdquant_models.OWN)
def test_the_reader_reads_what_convert_writes(family, precision, tmp_path):
    source, dense = dense_file(tmp_path, family)
    seen = []
    target = convert(
        source,
        tmp_path / "out.safetensors",
        ConvertConfig(precision=precision),
        progress=lambda done, total: seen.append((done, total)),
    )
    checkpoint, got = read(target)
    assert (checkpoint.family.id, checkpoint.dialect) == (family, svdquant_models.OWN[family])
    assert (checkpoint.precision, checkpoint.ranks) == (precision, (32,))
    assert got.keys() == dense.keys()
    assert seen == [(i + 1, len(seen)) for i in range(len(seen))]
    for name, value in got.items():
        wanted = dense[name].float()
        if isinstance(value, QuantWeight):
            assert rel(effective(value), wanted) < 0.11, name
        elif name.endswith(".bias") and isinstance(got[name[:-4] + "weight"], QuantWeight):
            whole = value.float() + unsigned_output(got[name[:-4] + "weight"])
            assert rel(whole, wanted) < 0.02, name
        else:
            assert torch.equal(value, dense[name]), name


FLUX_BLOCK = {
    "transformer_blocks.0": {
        "qkv_proj": 6,
        "qkv_proj_context": 6,
        "out_proj": 6,
        "out_proj_context": 6,
        "mlp_fc1": 6,
        "mlp_fc2": 6,
        "mlp_context_fc1": 6,
        "mlp_context_fc2": 6,
        "norm1.linear": 3,
        "norm1_context.linear": 3,
        "norm_q": 0,
        "norm_k": 0,
        "norm_added_q": 0,
        "norm_added_k": 0,
    },
    "single_transformer_blocks.0": {
        "qkv_proj": 6,
        "out_proj": 6,
        "mlp_fc1": 6,
        "mlp_fc2": 6,
        "norm.linear": 3,
        "norm_q": 0,
        "norm_k": 0,
    },
}
PARTS = {
    6: ("qweight", "wscales", "smooth", "smooth_orig", "lora_down", "lora_up", "bias"),
    3: ("qweight", "wscales", "wzeros", "bias"),
    0: ("weight",),
}


def test_names_and_metadata_are_nunchakus(tmp_path):
    source, _ = dense_file(tmp_path, "flux", single=1)
    path = convert(source, tmp_path / "out.safetensors", ConvertConfig())
    header = read_header(path)
    wanted = {
        f"{block}.{layer}.{part}"
        for block, layers in FLUX_BLOCK.items()
        for layer, kind in layers.items()
        for part in PARTS[kind]
    }
    assert {n for n in header.tensors if "blocks" in n} == wanted
    outside = {n.rsplit(".", 1)[0] for n in header.tensors if "blocks" not in n}
    assert outside == {
        "x_embedder",
        "context_embedder",
        "norm_out.linear",
        "proj_out",
        *(
            f"time_text_embed.{part}_embedder.linear_{i}"
            for part in ("timestep", "text", "guidance")
            for i in (1, 2)
        ),
    }
    assert header.metadata["model_class"] == "NunchakuFluxTransformer2dModel"
    quantization = header.json("quantization_config")
    assert quantization["method"] == "svdquant"
    assert quantization["weight"] == {"dtype": "int4", "group_size": 64, "scale_dtype": None}
    assert quantization["rank"] == 32
    config = header.json("config")
    assert config["_class_name"] == "FluxTransformer2DModel"
    assert (config["num_layers"], config["num_single_layers"]) == (1, 1)
    assert config["guidance_embeds"] is True
    assert header.json("comfy_config")["model_config"]["hidden_size"] == 128
    # what Nunchaku requires of dtypes: everything that is not packed is bf16
    dtypes = {e.dtype for n, e in header.tensors.items() if not n.endswith("qweight")}
    assert dtypes == {"BF16"}


def test_scale_and_shift_are_exchanged_in_the_file(tmp_path):
    source, dense = dense_file(tmp_path, "flux", single=1)
    path = convert(source, tmp_path / "out.safetensors", ConvertConfig())
    stored = load_file(path)["norm_out.linear.weight"]
    ours = dense["final_layer.adaLN_modulation.1.weight"]
    assert torch.equal(stored, torch.cat(ours.chunk(2)[::-1]))
    assert not torch.equal(stored, ours)


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model."])
def test_checkpoint_prefixes(prefix, tmp_path):
    source, dense = dense_file(tmp_path, "qwen-image", prefix)
    _, got = read(convert(source, tmp_path / "out.safetensors", ConvertConfig()))
    assert got.keys() == dense.keys()


def test_again_gives_the_same_bytes_and_an_interrupt_leaves_nothing(tmp_path):
    source, _ = dense_file(tmp_path, "z-image")
    torch.manual_seed(1)
    first = convert(source, tmp_path / "a.safetensors", ConvertConfig())
    state = torch.random.get_rng_state()
    second = convert(source, tmp_path / "b.safetensors", ConvertConfig())
    assert first.read_bytes() == second.read_bytes()
    assert torch.equal(torch.random.get_rng_state(), state)  # nobody's seeds are touched

    def stop(done, total):
        if done == 2:
            raise KeyboardInterrupt

    before = sorted(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "c.safetensors", ConvertConfig(), progress=stop)
    assert sorted(tmp_path.iterdir()) == before
    with pytest.raises(ValueError, match="exists already: choose another file name"):
        convert(source, first, ConvertConfig())


def test_what_cannot_be_converted(tmp_path):
    source, dense = dense_file(tmp_path, "flux", single=1)
    quantised = convert(source, tmp_path / "q.safetensors", ConvertConfig())

    def attempt(path, word, statistics=None):
        with pytest.raises(CheckpointError, match=word):
            convert(path, tmp_path / "x.safetensors", ConvertConfig(), statistics=statistics)
        assert not (tmp_path / "x.safetensors").exists()

    attempt(quantised, "is quantised already: convert the 16-bit file")

    def saved(change):
        tensors = {n: t.clone() for n, t in dense.items()}
        change(tensors)
        save_file(tensors, tmp_path / "changed.safetensors")
        return tmp_path / "changed.safetensors"

    def nan(tensors):
        tensors["single_blocks.0.linear1.weight"][0, 0] = float("nan")

    attempt(saved(nan), "linear1.weight contains NaN")
    attempt(saved(lambda t: t.pop("single_blocks.0.linear1.weight")), "cannot be converted")
    attempt(saved(lambda t: t.pop("double_blocks.0.img_mlp.0.weight")), "lacks double_blocks.0.im")
    attempt(saved(lambda t: t.update({"extra.weight": torch.zeros(4)})), "extra.weight is not part")

    def odd(tensors):
        tensors["double_blocks.0.img_attn.proj.weight"] = torch.zeros(100, 128).bfloat16()

    attempt(saved(odd), r"N=100, K=128 is not a multiple of 128")
    save_file({"layers.0.weight": torch.zeros(4, 4)}, tmp_path / "other.safetensors")
    attempt(tmp_path / "other.safetensors", "family that cannot be converted")
    other = Statistics("WanModel", {"blocks.0": LayerInputs(torch.ones(4), torch.ones(4, 4))})
    attempt(source, r"statistics lack layer .* recorded on another model \(WanModel\)", other)
    with pytest.raises(ValueError, match="rank is 20"):
        ConvertConfig(rank=20)
    with pytest.raises(ValueError, match="precision is 'auto'"):
        ConvertConfig(precision="auto")


# ---- quality ----
def outlier_model(tmp_path, hidden=384):
    """A 16-bit Qwen-Image block with power-law spectra and heavy channels, and its statistics."""
    source, dense = dense_file(tmp_path, "qwen-image", hidden=hidden)
    g = torch.Generator().manual_seed(0)
    statistics, inputs = Statistics("QwenImageTransformer2DModel"), {}
    for name in [n for n in dense if n.endswith(".weight") and "transformer_blocks" in n]:
        if dense[name].dim() != 2 or "mod" in name:
            continue
        n, k = dense[name].shape
        dense[name] = outlier_weight(n, k, g).bfloat16()
        scale = torch.exp(torch.randn(k, generator=g) * 0.5)
        hot = torch.randperm(k, generator=g)[: max(k // 100, 2)]
        scale[hot] *= torch.rand(len(hot), generator=g) * 15 + 4
        layer = name.removesuffix(".weight")
        if layer.rsplit("_", 1)[0].endswith(("to", "add_k", "add_v")) and "attn" in layer:
            first = layer.replace("to_k", "to_q").replace("to_v", "to_q")
            first = first.replace("add_k_proj", "add_q_proj").replace("add_v_proj", "add_q_proj")
            if first in inputs and inputs[first].shape[1] == k and first != layer:
                inputs[layer] = inputs[first]
                continue
        x = torch.randn(256, k, generator=g) * scale
        if layer.endswith("net.2"):
            x = torch.nn.functional.gelu(x, approximate="tanh")
        inputs[layer] = x
        statistics.record(layer, x[:128])
        statistics.record(layer, x[64:128])
    save_file({n: t.contiguous() for n, t in dense.items()}, source)
    return source, dense, statistics, inputs


def outlier_weight(n, k, g):
    rank = min(n, k) // 4
    power = torch.arange(1, rank + 1).float() ** -0.6
    low = (torch.randn(n, rank, generator=g) * power) @ torch.randn(rank, k, generator=g)
    noise = torch.randn(n, k, generator=g)
    noise *= 1 + (torch.rand(n, k, generator=g) < 0.002).float() * 4
    weight = (0.6 * low / low.norm() + 0.8 * noise / noise.norm()) * (n * k) ** 0.5 * 0.02
    hot = torch.randperm(k, generator=g)[: k // 128]
    weight[:, hot] *= torch.rand(len(hot), generator=g) * 3 + 1.5
    return weight


def layer_errors(path, dense, inputs):
    """W4A4 output error of each layer on inputs that calibration has not seen."""
    _, got = read(path)
    errors = {}
    for layer, x in inputs.items():
        x, weight = x[128:], got[f"{layer}.weight"]
        bias = got[f"{layer}.bias"]
        wanted = x @ dense[f"{layer}.weight"].float().t()
        y = linear(x, weight, bias, lambda *_: Reference()).float()
        errors[layer] = rel(y - bias.float() - unsigned_output(weight), wanted)
    return errors


def plain_errors(dense, inputs):
    errors = {}
    for layer, x in inputs.items():
        x, weight = x[128:], dense[f"{layer}.weight"].float()
        rounded = quantise_inputs(x) @ round_int4(weight).dense().t()
        errors[layer] = rel(rounded, x @ weight.t())
    return errors


def mean(errors):
    return sum(errors.values()) / len(errors)


def test_calibration_pays(tmp_path):
    source, dense, statistics, inputs = outlier_model(tmp_path)
    plain = plain_errors(dense, inputs)
    free = convert(source, tmp_path / "free.safetensors", ConvertConfig(rank=32))
    calibrated = convert(
        source, tmp_path / "cal.safetensors", ConvertConfig(rank=32), statistics=statistics
    )
    data_free = layer_errors(free, dense, inputs)
    smoothed = layer_errors(calibrated, dense, inputs)
    assert mean(data_free) < 0.95 * mean(plain)
    assert mean(smoothed) < 0.45 * mean(plain)
    assert all(smoothed[name] < 0.6 * plain[name] for name in plain)
    # statistics of other inputs do not pay: the gain is calibration's
    shuffled = Statistics("x")
    for name, one in statistics.layers.items():
        order = torch.randperm(one.absmax.shape[0], generator=torch.Generator().manual_seed(1))
        shuffled.layers[name] = LayerInputs(one.absmax[order], one.rows[:, order])
    wrong = convert(
        source, tmp_path / "wrong.safetensors", ConvertConfig(rank=32), statistics=shuffled
    )
    assert mean(layer_errors(wrong, dense, inputs)) > 1.5 * mean(smoothed)


def test_search_and_rank_help_a_little(tmp_path):
    source, dense, statistics, inputs = outlier_model(tmp_path, hidden=256)

    def error(name, config):
        path = convert(source, tmp_path / name, config, statistics=statistics)
        return mean(layer_errors(path, dense, inputs))

    base = error("base.safetensors", ConvertConfig(rank=16))
    assert error("search.safetensors", ConvertConfig(rank=16, search=True)) < base
    assert error("rank.safetensors", ConvertConfig(rank=64)) < base


# ---- statistics ----
def test_statistics_files(tmp_path):
    one = Statistics("Flux", num_runs=1)
    x = torch.randn(3, 50, 64)
    one.record("a", x)
    one.record("a", -2 * x)
    one.record("b", torch.zeros(0, 64))
    one.save(tmp_path / "s.safetensors")
    back = load_statistics(tmp_path / "s.safetensors")
    assert set(back.layers) == {"a"}
    assert torch.equal(back.layers["a"].absmax, 2 * x.abs().amax((0, 1)))
    assert back.layers["a"].rows.shape == (8, 64)
    assert (back.model, back.num_runs) == ("Flux", 1)
    for _ in range(60):
        one.record("a", x)
    assert one.layers["a"].rows.shape == (64, 64)
    back.merge(one)
    assert back.num_runs == 2
    assert back.layers["a"].rows.shape[0] <= 64
    assert list(tmp_path.iterdir()) == [tmp_path / "s.safetensors"]
    save_file({"a": torch.zeros(1)}, tmp_path / "no.safetensors")
    with pytest.raises(CheckpointError, match="holds no calibration statistics"):
        load_statistics(tmp_path / "no.safetensors")
    metadata = {"format": "slipstream.svdquant.statistics"}
    broken = {"a.absmax": torch.zeros(4), "a.rows": torch.zeros(2, 5)}
    save_file(broken, tmp_path / "bad.safetensors", metadata=metadata)
    with pytest.raises(CheckpointError, match="statistics of a are damaged"):
        load_statistics(tmp_path / "bad.safetensors")


def test_config_of_every_family_is_json(tmp_path):
    for family in svdquant_models.OWN:
        source, _ = dense_file(tmp_path, family)
        path = convert(source, tmp_path / f"{family}-out.safetensors", ConvertConfig())
        config = json.loads(read_header(path).metadata["config"])
        assert config["_class_name"].endswith(("Transformer2DModel", "UNet2DConditionModel"))
        assert all(value is not None for value in config.values())
