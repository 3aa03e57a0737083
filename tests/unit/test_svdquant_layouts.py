"""Every layout rule of the file formats: golden bytes, both directions, bit for bit."""

import pytest
import svdquant_golden as golden
import torch
from slipstream.backends.svdquant import layouts

SHAPES = [(128, 128, 16), (384, 256, 48), (640, 896, 128), (256, 384, 32)]

TO_FILE = {
    "qweight": lambda t: layouts.weight_to_file(layouts.plain_from_codes(t)),
    "vector": layouts.vector_to_file,
    "wscales": layouts.scales_to_file,
    "wscales_fp8": layouts.fp8_scales_to_file,
    "down": layouts.down_to_file,
    "up": layouts.up_to_file,
    "awq": lambda t: layouts.awq_to_file(layouts.plain_from_codes(t)),
}
FROM_FILE = {
    "qweight": lambda t: layouts.codes_from_plain(layouts.weight_from_file(t), signed=False),
    "vector": layouts.vector_from_file,
    "wscales": layouts.scales_from_file,
    "wscales_fp8": layouts.fp8_scales_from_file,
    "down": layouts.down_from_file,
    "up": layouts.up_from_file,
    "awq": lambda t: layouts.codes_from_plain(layouts.awq_from_file(t), signed=False),
}


def raw(tensor):
    return tensor.contiguous().view(torch.uint8).reshape(-1)


@pytest.mark.parametrize("name", golden.GOLDEN)
def test_golden_bytes(name):
    shape, first, sha = golden.GOLDEN[name]
    plain = golden.values(**golden.SHAPE)[name]
    packed = TO_FILE[name](plain)
    assert tuple(packed.shape) == shape
    assert golden.digest(packed) == (first, sha)
    assert golden.digest(golden.PACK[name](plain)) == (first, sha)


def test_golden_values_are_the_documented_ones():
    assert [golden.value(0, 0), golden.value(0, 1), golden.value(1, 0)] == [41259, 55096, 30830]
    byte, shift = golden.address_qweight(137, 77, 384)
    assert (byte // 4, byte % 4 * 2 + shift // 4) == (7190, 5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", golden.GOLDEN)
def test_unpacking_what_addresses_packed(name, shape):
    plain = golden.values(*shape)[name]
    packed = golden.PACK[name](plain)
    assert torch.equal(raw(FROM_FILE[name](packed)), raw(plain))
    assert torch.equal(raw(TO_FILE[name](FROM_FILE[name](packed))), raw(packed))


def test_a_wrong_digit_order_changes_the_hash():
    plain = golden.values(**golden.SHAPE)["up"]
    parts = plain.view(16, 2, 8, 2, 2, 4, 2)
    wrong = parts.permute(0, 3, 2, 5, 4, 1, 6).reshape(plain.shape)  # i4 and i5 exchanged
    assert golden.digest(wrong) != golden.GOLDEN["up"][1:]


def test_signed_codes_are_twos_complement():
    codes = torch.arange(-8, 8, dtype=torch.int8).repeat(2, 1)
    plain = layouts.plain_from_codes(codes)
    assert plain.dtype is torch.int8
    assert plain[0, 0].item() == (-8 & 15) | ((-7 & 15) << 4) - 256
    assert torch.equal(layouts.codes_from_plain(plain, signed=True), codes)
    unsigned = layouts.codes_from_plain(plain, signed=False)
    assert torch.equal(unsigned, codes & 15)


def test_nibble_swap_is_its_own_inverse():
    plain = layouts.plain_from_codes(golden.values(128, 128, 16)["qweight"])
    swapped = layouts.swap_nibbles(plain)
    assert torch.equal(swapped >> 4, plain.view(torch.uint8) & 15)
    assert torch.equal(layouts.swap_nibbles(swapped), plain.view(torch.uint8))


@pytest.mark.parametrize("num_chunks", [3, 6])
def test_modulation_rows(num_chunks):
    rows = torch.arange(num_chunks * 8).view(-1, 1)
    file_rows = layouts.interleave(rows, num_chunks)
    for chunk in range(num_chunks):
        for channel in range(8):
            at = channel * num_chunks + chunk
            assert file_rows[at].item() == chunk * 8 + channel
    assert torch.equal(layouts.deinterleave(file_rows, num_chunks), rows)


def test_tiles_follow_their_index_rule():
    num_rows, num_columns, rank = 384, 256, 48
    plain = golden.values(num_rows, num_columns, rank)
    weight = layouts.plain_from_codes(plain["qweight"])
    tiles = layouts.weight_to_tiles(weight)
    assert tuple(tiles.shape) == (3, 4, 32, 128)
    for nt, kt, i, s, b in [(0, 0, 0, 0, 0), (2, 3, 31, 3, 31), (1, 2, 5, 1, 17)]:
        assert tiles[nt, kt, i, 32 * s + b] == weight[128 * nt + 4 * i + s, 32 * kt + b]
    scales = layouts.scales_to_tiles(plain["wscales"])
    assert scales[2, 1, 77] == plain["wscales"][1, 2 * 128 + 77]
    up = layouts.up_to_tiles(plain["up"])
    assert up[1, 47, 3] == plain["up"][128 + 3, 47]
    assert torch.equal(layouts.weight_from_tiles(tiles), weight)
    assert torch.equal(layouts.scales_from_tiles(scales), plain["wscales"])
    assert torch.equal(layouts.up_from_tiles(up), plain["up"])


def test_blocked_scales_follow_cublas_rule():
    scales = torch.arange(256 * 8).remainder(127).to(torch.uint8).view(256, 8)
    blocked = layouts.blocked_from_plain(scales.view(torch.float8_e4m3fn)).view(torch.uint8)
    flat = blocked.reshape(-1)
    for row, group in [(0, 0), (0, 3), (0, 4), (31, 1), (32, 0), (127, 7), (128, 0), (200, 5)]:
        tile = row // 128 * 2 + group // 4
        at = tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + group % 4
        assert flat[at] == scales[row, group]
    back = layouts.plain_from_blocked(blocked.view(torch.float8_e4m3fn)).view(torch.uint8)
    assert torch.equal(back, scales)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fp4_values_and_nearest_codes(dtype):
    codes = torch.arange(16, dtype=torch.int8)
    table = torch.tensor([*layouts.E2M1, *(-v for v in layouts.E2M1)])
    assert torch.equal(layouts.fp4_values(codes, dtype).float(), table)
    values = torch.linspace(-7, 7, 4001)
    nearest = (values.unsqueeze(1) - table[:8].repeat(1, 1) * values.sign().unsqueeze(1)).abs()
    got = layouts.fp4_values(layouts.fp4_codes(values))
    assert torch.allclose((got - values).abs(), nearest.amin(1), atol=1e-6)
    back = layouts.fp4_codes(table)
    assert torch.equal(layouts.fp4_values(back), table)
