"""Where every element of a file tensor lives, as plain integer arithmetic: the layouts' test.

Written from the index rules of docs/svdquant.md alone; nothing is shared with
backends/svdquant/layouts.py, so that agreement of the two means something.
"""

import hashlib

import torch

SHAPE = {"num_rows": 256, "num_columns": 384, "rank": 32}
# Hash of the bytes of each tensor packed from `values` at SHAPE. All seven equal what nunchaku's
# own packers give for the same input.
GOLDEN = {
    "qweight": ((256, 192), "8b35e08b36e19b46", "9911fb89564d0bd3"),
    "vector": ((256,), "2ba16e78475b8a32", "306d66afba87f1ea"),
    "wscales": ((6, 256), "2ba138d79651a387", "f3d759b762c4e477"),
    "wscales_fp8": ((24, 256), "6f6052431d0f0075", "0bd04a039c5d170f"),
    "down": ((384, 32), "2ba16e78475b8a32", "758f71b5e43b6834"),
    "up": ((256, 32), "2ba138d79651a387", "a31424310a5719fb"),
    "awq": ((64, 192), "6bb0389e056be338", "279f31175056ec53"),
}


def value(i, j):
    """Deterministic 16-bit test value of element (i, j)."""
    return (((i * 1000003 + j * 7919 + 12345) * 2654435761) % 2**32) >> 16


def grid(num_rows, num_columns):
    return torch.meshgrid(torch.arange(num_rows), torch.arange(num_columns), indexing="ij")


def mixed(first, *digits):
    """The number whose digits, most significant first, are `first` and (digit, base) pairs."""
    for digit, base in digits:
        first = first * base + digit
    return first


def address_qweight(n, k, num_columns):
    """(byte, bit shift) of weight (n, k)."""
    word = mixed(
        n // 128 * (num_columns // 64) + k // 64,
        (n % 128 // 16, 8),
        (n % 8, 8),
        (k % 32 // 8, 4),
        (n % 16 // 8, 2),
        (k % 64 // 32, 2),
    )
    return word * 4 + k % 8 // 2, 4 * (k % 2)


def address_vector(n):
    lane = 4 * (n % 128 // 16) + n % 8 // 2
    return n // 128 * 128 + lane * 4 + 2 * (n % 16 // 8) + n % 2


def address_wscales(g, n, num_columns):
    return (n // 128 * (num_columns // 64) + g) * 128 + address_vector(n % 128)


def address_wscales_fp8(g, n, num_columns):
    tile = n // 128 * (num_columns // 64) + g // 4
    return mixed(tile, (n % 8, 8), (n % 32 // 8, 4), (n % 128 // 32, 4), (g % 4, 4))


def address_down(k, r, rank):
    block = k // 16 * (rank // 16) + r // 16
    return mixed(block, (r % 8, 8), (k % 8 // 2, 4), (r % 16 // 8, 2), (k % 16 // 8, 2), (k % 2, 2))


def address_up(n, r, rank):
    block = n // 16 * (rank // 16) + r // 16
    return mixed(block, (n % 8, 8), (r % 8 // 2, 4), (n % 16 // 8, 2), (r % 16 // 8, 2), (r % 2, 2))


def address_awq(n, k, num_columns):
    """(byte, bit shift) of modulation weight (n, k)."""
    half = mixed(n // 4 * (num_columns // 64) + k // 64, (n % 4, 4), (k % 64 // 32, 2), (k % 8, 8))
    return half * 2 + k % 32 // 16, 4 * (k % 16 // 8)


def scatter(plain, at):
    packed = torch.empty(plain.numel(), dtype=plain.dtype)
    packed[at.reshape(-1)] = plain.reshape(-1)
    return packed


def scatter_nibbles(codes, byte, shift):
    packed = torch.zeros(codes.numel() // 2, dtype=torch.int32)
    nibbles = (codes.to(torch.int32) & 15) << shift.to(torch.int32)
    return packed.index_add_(0, byte.reshape(-1), nibbles.reshape(-1)).to(torch.uint8)


def pack_qweight(codes):
    packed = scatter_nibbles(codes, *address_qweight(*grid(*codes.shape), codes.shape[1]))
    return packed.view(torch.int8).view(codes.shape[0], -1)


def pack_vector(plain):
    return scatter(plain, address_vector(torch.arange(plain.numel())))


def pack_wscales(plain):
    return scatter(plain, address_wscales(*grid(*plain.shape), plain.shape[0] * 64)).view_as(plain)


def pack_wscales_fp8(plain):
    at = address_wscales_fp8(*grid(*plain.shape), plain.shape[0] * 16)
    raw = scatter(plain.contiguous().view(torch.uint8), at)
    return raw.view(plain.shape).view(torch.float8_e4m3fn)


def pack_down(plain):
    return scatter(plain, address_down(*grid(*plain.shape), plain.shape[1])).view_as(plain)


def pack_up(plain):
    return scatter(plain, address_up(*grid(*plain.shape), plain.shape[1])).view_as(plain)


def pack_awq(codes):
    num_rows, num_columns = codes.shape
    packed = scatter_nibbles(codes, *address_awq(*grid(num_rows, num_columns), num_columns))
    return packed.view(torch.int32).view(num_rows // 4, num_columns // 2)


PACK = {
    "qweight": pack_qweight,
    "vector": pack_vector,
    "wscales": pack_wscales,
    "wscales_fp8": pack_wscales_fp8,
    "down": pack_down,
    "up": pack_up,
    "awq": pack_awq,
}


def values(num_rows, num_columns, rank):
    """Plain test tensors by layout; 16-bit ones are raw patterns (a permutation sees no dtype)."""

    def of(rows, columns):
        return value(*grid(rows, columns))

    def bits(plain):
        return plain.to(torch.int32).to(torch.int16)

    fp8 = (of(num_columns // 16, num_rows) % 127).to(torch.uint8)
    return {
        "qweight": (of(num_rows, num_columns) % 16).to(torch.int8),
        "vector": bits(of(num_rows, 1)).view(-1),
        "wscales": bits(of(num_columns // 64, num_rows)),
        "wscales_fp8": fp8.view(torch.float8_e4m3fn),
        "down": bits(of(num_columns, rank)),
        "up": bits(of(num_rows, rank)),
        "awq": (of(num_rows, num_columns) % 16).to(torch.int8),
    }


def digest(packed):
    """(first 8 bytes, start of the SHA-256) of a tensor's bytes."""
    data = bytes(packed.contiguous().view(torch.uint8).reshape(-1).tolist())
    return data[:8].hex(), hashlib.sha256(data).hexdigest()[:16]
