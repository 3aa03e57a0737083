"""Index rules of the file layouts: each tensor of a file to plain row-major order, and back.

N output features, K input features, R rank, G = 64 input channels per group. Every function is a
permutation of stored codes, so both directions are exact. "File" is the byte order of Nunchaku
files, "plain" is row-major. Bytes are little-endian. Golden vectors: tests/svdquant_golden.py.
"""

import torch

GROUP = {"int4": 64, "nvfp4": 16, "awq": 64}
TILE = 128  # rows of a file tile; N and K are multiples of it
UNSIGNED_SHIFT = 0.171875  # minus the minimum of GELU: makes the input of an unsigned layer >= 0
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # value of an fp4 code; bit 3 is the sign
_RUN = torch.complex128  # 16 bytes that stay together: copied as one element, on any device
_PAIR = {2: torch.int32, 4: torch.int64}  # bytes of an element -> two of them as one
_AWQ_BYTES = 786432  # unpacked at a time on a CPU: what lies between fits its cache


# ---- 4-bit weights: file words (32 bit) are [N/128, K/64, c8, l8, q4, a2, b2] of 8 nibbles ----
def weight_from_file(packed: torch.Tensor) -> torch.Tensor:
    """File qweight int8 [N, K/2] -> plain bytes [N, K/2], even column in the low nibble."""
    num_rows, num_bytes = packed.shape
    cells = packed.contiguous().view(torch.int32).view(-1, 4, 2, 2)
    turned = cells.new_empty(cells.shape[0], 2, 2, 4)
    for a in range(2):
        for b in range(2):
            turned[:, a, b] = cells[:, :, a, b]
    runs = turned.view(-1).view(_RUN).view(num_rows // TILE, num_bytes // 32, 8, 8, 2, 2)
    return runs.permute(0, 2, 4, 3, 1, 5).reshape(-1).view(torch.int8).view(num_rows, num_bytes)


def weight_to_file(plain: torch.Tensor) -> torch.Tensor:
    """Inverse of weight_from_file."""
    num_rows, num_bytes = plain.shape
    words = plain.contiguous().view(torch.int32)
    words = words.view(num_rows // TILE, 8, 2, 8, num_bytes // 32, 2, 4)
    packed = words.permute(0, 4, 1, 3, 6, 2, 5).contiguous()
    return packed.view(torch.int8).view(num_rows, num_bytes)


def codes_from_plain(plain: torch.Tensor, *, signed: bool) -> torch.Tensor:
    """Bytes [N, K/2] -> int8 codes [N, K]: -8..7 if signed (two's complement), else 0..15."""
    low, high = plain.view(torch.uint8) & 15, plain.view(torch.uint8) >> 4
    codes = torch.stack([low, high], -1).reshape(plain.shape[0], -1).view(torch.int8)
    return (codes ^ 8) - 8 if signed else codes


def plain_from_codes(codes: torch.Tensor) -> torch.Tensor:
    """Codes [N, K] of either kind -> int8 bytes [N, K/2]."""
    nibbles = codes.to(torch.uint8) & 15
    return (nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)).view(torch.int8)


def swap_nibbles(plain: torch.Tensor) -> torch.Tensor:
    """Exchange the two nibbles of every byte: Nunchaku's fp4 order and ComfyUI's NVFP4 order."""
    raw = plain.view(torch.uint8)
    return (raw << 4) | (raw >> 4)


def fp4_values(codes: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The values of E2M1 codes 0..15 (int8), exact in any float dtype."""
    size = codes & 7  # halves: 0 1 2 3 4 6 8 12
    halves = size + (size - 4).clamp_(min=0) + 2 * (size - 6).clamp_(min=0)
    return torch.where(codes >= 8, -halves, halves).to(dtype).div_(2)


def fp4_codes(values: torch.Tensor) -> torch.Tensor:
    """The nearest E2M1 code 0..15 (int8) of each value."""
    size = values.abs()
    codes = (size * 2).round_().clamp_(max=4).to(torch.int8)
    for bound in (2.5, 3.5, 5.0):
        codes += size > bound
    return codes + 8 * (values < 0).to(torch.int8)


# ---- 16-bit vectors and int4 group scales: one order inside each run of 128 features ----
def _order(device: torch.device) -> torch.Tensor:
    """_order[p] is the feature, within its 128, that a file stores at position p."""
    position = torch.arange(TILE, device=device)
    lane, half, odd = position // 4, position // 2 % 2, position % 2
    return lane // 4 * 16 + half * 8 + lane % 4 * 2 + odd


def vector_from_file(packed: torch.Tensor) -> torch.Tensor:
    """bias, smooth, wcscales [F] in file order -> plain order."""
    blocks = packed.reshape(-1, TILE)
    plain = torch.empty_like(blocks)
    plain[:, _order(packed.device)] = blocks
    return plain.view(-1)


def vector_to_file(plain: torch.Tensor) -> torch.Tensor:
    """Inverse of vector_from_file."""
    return plain.reshape(-1, TILE)[:, _order(plain.device)].reshape(-1)


def scales_from_file(packed: torch.Tensor) -> torch.Tensor:
    """int4 wscales [K/64, N] in file order -> the same shape in plain order."""
    num_groups, num_rows = packed.shape
    blocks = packed.contiguous().view(num_rows // TILE, num_groups, TILE)
    plain = torch.empty_like(blocks)
    plain[..., _order(packed.device)] = blocks
    return plain.permute(1, 0, 2).reshape(num_groups, num_rows)


def scales_to_file(plain: torch.Tensor) -> torch.Tensor:
    """Inverse of scales_from_file."""
    num_groups, num_rows = plain.shape
    blocks = plain.reshape(num_groups, num_rows // TILE, TILE)[..., _order(plain.device)]
    return blocks.permute(1, 0, 2).reshape(num_groups, num_rows)


# ---- fp4 group scales: file memory [N/128, K/64, l8, q4, s4, g4] ----
def fp8_scales_from_file(packed: torch.Tensor) -> torch.Tensor:
    """float8_e4m3fn wscales [K/16, N] in file order -> plain order."""
    num_groups, num_rows = packed.shape
    raw = packed.contiguous().view(torch.uint8)
    raw = raw.view(num_rows // TILE, num_groups // 4, 8, 4, 4, 4)
    plain = raw.permute(1, 5, 0, 4, 3, 2).reshape(num_groups, num_rows)
    return plain.view(torch.float8_e4m3fn)


def fp8_scales_to_file(plain: torch.Tensor) -> torch.Tensor:
    """Inverse of fp8_scales_from_file."""
    num_groups, num_rows = plain.shape
    raw = plain.contiguous().view(torch.uint8)
    raw = raw.view(num_groups // 4, 4, num_rows // TILE, 4, 4, 8)
    packed = raw.permute(2, 0, 5, 4, 3, 1).reshape(num_groups, num_rows)
    return packed.view(torch.float8_e4m3fn)


def blocked_from_plain(scales: torch.Tensor) -> torch.Tensor:
    """fp8 scales [N, G] -> cuBLAS's block-scale order, same shape; N % 128 == 0, G % 4 == 0.

    Source: CUDA documentation, cuBLAS, 1-D block scaling factors layout: tiles of 128 rows and 4
    groups, inside a tile [32, 4, 4] = (row % 32, row // 32, group).
    """
    num_rows, num_groups = scales.shape
    raw = scales.contiguous().view(torch.uint8)
    raw = raw.view(num_rows // TILE, 4, 32, num_groups // 4, 4).permute(0, 3, 2, 1, 4)
    return raw.reshape(num_rows, num_groups).view(torch.float8_e4m3fn)


def plain_from_blocked(blocked: torch.Tensor) -> torch.Tensor:
    """Inverse of blocked_from_plain."""
    num_rows, num_groups = blocked.shape
    raw = blocked.contiguous().view(torch.uint8)
    raw = raw.view(num_rows // TILE, num_groups // 4, 32, 4, 4).permute(0, 3, 2, 1, 4)
    return raw.reshape(num_rows, num_groups).view(torch.float8_e4m3fn)


# ---- low-rank branch: file memory [F/16, R/16, i2:8, i3:4, i4:2, i5:2, i6:2] ----
def down_from_file(packed: torch.Tensor) -> torch.Tensor:
    """lora_down [K, R] in file order -> plain order."""
    num_columns, rank = packed.shape
    turned = packed.reshape(-1, 8, 32).transpose(1, 2).contiguous()
    runs = turned.view(-1).view(_RUN).view(num_columns // 16, rank // 16, 4, 2, 2, 2, -1)
    plain = runs.permute(0, 4, 2, 5, 1, 3, 6).reshape(-1).view(packed.dtype)
    return plain.view(num_columns, rank)


def down_to_file(plain: torch.Tensor) -> torch.Tensor:
    """Inverse of down_from_file."""
    num_columns, rank = plain.shape
    parts = plain.contiguous().view(num_columns // 16, 2, 4, 2, rank // 16, 2, 8)
    return parts.permute(0, 4, 6, 2, 5, 1, 3).reshape(num_columns, rank)


def up_from_file(packed: torch.Tensor) -> torch.Tensor:
    """lora_up [N, R] in file order -> plain order."""
    num_rows, rank = packed.shape
    pairs = packed.contiguous().view(-1).view(_PAIR[packed.element_size()]).view(-1, 4, 4)
    turned = torch.empty_like(pairs)
    for i3 in range(4):
        turned[:, :, i3] = pairs[:, i3]
    runs = turned.view(-1).view(_RUN).view(num_rows // 16, rank // 16, 8, 2, 2, -1)
    plain = runs.permute(0, 3, 2, 1, 4, 5).reshape(-1).view(packed.dtype)
    return plain.view(num_rows, rank)


def up_to_file(plain: torch.Tensor) -> torch.Tensor:
    """Inverse of up_from_file."""
    num_rows, rank = plain.shape
    parts = plain.contiguous().view(num_rows // 16, 2, 8, rank // 16, 2, 4, 2)
    return parts.permute(0, 3, 2, 5, 1, 4, 6).reshape(num_rows, rank)


# ---- modulation (AWQ): int16 halves [N/4, K/64, row4, block2, j8], nibble t holds k = 8t + j ----
def awq_from_file(packed: torch.Tensor) -> torch.Tensor:
    """File qweight int32 [N/4, K/2] -> plain bytes [N, K/2] of codes 0..15."""
    num_quads, num_columns = packed.shape[0], packed.shape[1] * 2
    runs = torch.empty(num_quads, 4, num_columns // 64, 2, dtype=_RUN, device=packed.device)
    step = num_quads
    if packed.device.type == "cpu":
        step = max(1, _AWQ_BYTES // (4 * packed.shape[1]))
    for start in range(0, num_quads, step):
        part = _awq_runs(packed[start : start + step].reshape(-1))
        runs[start : start + step] = part.view(-1, num_columns // 64, 4, 2).permute(0, 2, 1, 3)
    return runs.view(-1).view(torch.int8).view(num_quads * 4, num_columns // 2)


def _awq_runs(words: torch.Tensor) -> torch.Tensor:
    """Words (two halves each) -> runs of 16 bytes: the 32 codes of a block in order."""
    low, high = words & 0x0F0F0F0F, (words >> 4) & 0x0F0F0F0F
    low, high = ((t | (t >> 12)) & 0xFFFF for t in (low, high))
    # byte of a word: the codes that its two halves hold in nibble 0, 2, 1, 3
    taken = (low | (high << 16)).view(torch.uint8).view(-1, 4, 4)
    turned = torch.empty_like(taken)
    for byte, nibble in enumerate((0, 2, 1, 3)):
        turned[:, nibble] = taken[:, :, byte]
    return turned.view(-1).view(_RUN)


def awq_to_file(plain: torch.Tensor) -> torch.Tensor:
    """Inverse of awq_from_file."""
    codes = codes_from_plain(plain, signed=False)
    num_rows, num_columns = codes.shape
    parts = codes.view(num_rows // 4, 4, num_columns // 64, 2, 4, 8).permute(0, 2, 1, 3, 4, 5)
    parts = parts.to(torch.int32)
    halves = torch.stack([parts[..., t, :] << (4 * t) for t in range(4)]).sum(0)
    # a 16-bit pattern above 32767 is a negative int16
    halves = torch.where(halves > 32767, halves - 65536, halves).to(torch.int16)
    return halves.contiguous().view(torch.int32).view(num_rows // 4, num_columns // 2)


def interleave(rows: torch.Tensor, num_chunks: int) -> torch.Tensor:
    """Row i*D + c -> row c*num_chunks + i: how a file stores a modulation layer."""
    parts = rows.reshape(num_chunks, rows.shape[0] // num_chunks, *rows.shape[1:])
    return parts.transpose(0, 1).reshape(rows.shape)


def deinterleave(rows: torch.Tensor, num_chunks: int) -> torch.Tensor:
    """Inverse of interleave."""
    parts = rows.reshape(rows.shape[0] // num_chunks, num_chunks, *rows.shape[1:])
    return parts.transpose(0, 1).reshape(rows.shape)


# ---- comfy-kitchen's tiles ----
def weight_from_tiles(tiles: torch.Tensor) -> torch.Tensor:
    """[N/128, K/64, 32, 128] -> plain bytes: tile[nt, kt, i, 32s+b] = plain[128nt+4i+s, 32kt+b]."""
    num_tiles, num_groups = tiles.shape[:2]
    parts = tiles.reshape(num_tiles, num_groups, 32, 4, 32).permute(0, 2, 3, 1, 4)
    return parts.reshape(num_tiles * TILE, num_groups * 32)


def weight_to_tiles(plain: torch.Tensor) -> torch.Tensor:
    """Inverse of weight_from_tiles."""
    num_rows, num_bytes = plain.shape
    parts = plain.reshape(num_rows // TILE, 32, 4, num_bytes // 32, 32).permute(0, 3, 1, 2, 4)
    return parts.reshape(num_rows // TILE, num_bytes // 32, 32, TILE)


def scales_from_tiles(tiles: torch.Tensor) -> torch.Tensor:
    """[N/128, K/64, 128] -> [K/64, N]."""
    return tiles.permute(1, 0, 2).reshape(tiles.shape[1], -1)


def scales_to_tiles(plain: torch.Tensor) -> torch.Tensor:
    """Inverse of scales_from_tiles."""
    num_groups, num_rows = plain.shape
    return plain.reshape(num_groups, num_rows // TILE, TILE).permute(1, 0, 2).contiguous()


def up_from_tiles(tiles: torch.Tensor) -> torch.Tensor:
    """[N/128, R, 128] -> [N, R]."""
    return tiles.permute(0, 2, 1).reshape(-1, tiles.shape[1])


def up_to_tiles(plain: torch.Tensor) -> torch.Tensor:
    """Inverse of up_from_tiles."""
    num_rows, rank = plain.shape
    return plain.reshape(num_rows // TILE, TILE, rank).permute(0, 2, 1).contiguous()
