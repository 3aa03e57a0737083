"""How large a model would be in 4 bits: against what Convert writes, and None where it cannot."""

import pytest
import torch
from slipstream.backends.offload.four_bit import four_bit_bytes, layer_bytes
from slipstream.backends.svdquant.families.data import columns, layer, one, rows


class Named(torch.nn.Module):
    """Modules by dotted path."""

    def __init__(self, linears, dtype=torch.bfloat16):
        super().__init__()
        for path, (num_rows, num_columns) in linears.items():
            *parents, name = path.split(".")
            at = self
            for parent in parents:
                if parent not in at._modules:
                    at.add_module(parent, torch.nn.Module())
                at = at._modules[parent]
            weight = torch.empty(num_rows, num_columns, dtype=dtype, device="meta")
            linear = torch.nn.Module()
            linear.weight = torch.nn.Parameter(weight, requires_grad=False)
            at.add_module(name, linear)


def flux(width=3072, num_double=19, num_single=38, **options):
    linears = {"img_in": (width, 64), "txt_in": (width, 4096)}
    for at in range(num_double):
        for stream in ("img", "txt"):
            stem = f"double_blocks.{at}.{stream}"
            linears[f"{stem}_attn.qkv"] = (3 * width, width)
            linears[f"{stem}_attn.proj"] = (width, width)
            linears[f"{stem}_mlp.0"] = (4 * width, width)
            linears[f"{stem}_mlp.2"] = (width, 4 * width)
            linears[f"{stem}_mod.lin"] = (6 * width, width)
    for at in range(num_single):
        linears[f"single_blocks.{at}.linear1"] = (7 * width, width)
        linears[f"single_blocks.{at}.linear2"] = (width, 5 * width)
        linears[f"single_blocks.{at}.modulation.lin"] = (3 * width, width)
    return Named(linears, **options)


def test_flux_shrinks_to_a_quarter_and_its_branches():
    network = flux()
    total = sum(weight.nbytes for weight in network.parameters())
    assert total == pytest.approx(23.7e9, rel=0.01)
    assert total / four_bit_bytes(network) == pytest.approx(3.6, rel=0.02)


def test_a_model_known_by_a_parameter_is_one_that_we_can_convert():
    """Z-Image is told from Lumina 2 by its padding tokens."""
    linears = {"attention.qkv": (768, 256), "attention.out": (256, 256)}
    linears |= {"feed_forward.w1": (1024, 256), "feed_forward.w3": (1024, 256)}
    linears["feed_forward.w2"] = (256, 1024)
    network = Named({f"layers.0.{name}": shape for name, shape in linears.items()})
    assert four_bit_bytes(network) is None
    network.cap_pad_token = torch.nn.Parameter(torch.empty(1, 256, device="meta"))
    assert four_bit_bytes(network) is not None


def test_a_layer_counts_codes_scales_smoothing_and_branches():
    n, k = 256, 128
    codes, scales = n * k // 2, 2 * n * k // 64
    whole = layer("x", one("x"))
    assert layer_bytes(whole, n, k) == codes + scales + 2 * k + 64 * (n + k)
    fused = layer("x", rows("q", "k", "v"))
    assert layer_bytes(fused, n, k) == codes + scales + 6 * k + 64 * (n + 3 * k)
    pieces = columns(*(grid[0][0] for grid in (one("a"), one("b"))))
    assert layer_bytes(layer("x", pieces), n, k) == codes + scales + 2 * k + 64 * (2 * n + k)
    assert layer_bytes(layer("x", one("x"), chunks=6), n, k) == codes + 2 * scales


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.uint8])
def test_quantised_models_have_no_answer(dtype):
    assert four_bit_bytes(flux(128, 1, 1, dtype=dtype)) is None


def test_models_that_convert_does_not_know_have_no_answer():
    assert four_bit_bytes(Named({"blocks.0.self_attn.q": (128, 128)})) is None
