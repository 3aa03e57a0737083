"""From a 16-bit weight to 4-bit codes, group scales and a low-rank branch; pure torch.

Method: SVDQuant, arXiv 2411.05007: scale the input channels by `smooth`, take the best rank-R part
of the weight out into 16 bits, round what is left. Everything is deterministic: the same weight
gives the same bytes. The fp32 mathematics uses the values as they are stored (16 bit).
"""

from dataclasses import dataclass

import torch

from .layouts import GROUP, UNSIGNED_SHIFT, fp4_codes, fp4_values

FP8_MAX, FP4_MAX = 448.0, 6.0
_SEARCH = (1.0, 0.95, 0.9, 0.85, 0.8)  # shares of the largest value that a group scale may cover
_BLOCK_ELEMENTS = 1 << 17  # half a MB of fp32
_OVERSAMPLING, _POWER_ITERATIONS = 16, 2


@dataclass(frozen=True)
class Codes:
    """4-bit codes of a weight [N, K] and its scales: weight = value(code) * scale (* tensor).

    codes: int8 [N, K], int4 -8..7 or E2M1 codes 0..15; scale: [N, K/group] 16-bit or fp8;
    tensor: fp32 factor of nvfp4, 1 for int4.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    tensor: float = 1.0

    def dense(self) -> torch.Tensor:
        """The fp32 weight [N, K] that the codes stand for."""
        is_fp4 = self.scale.element_size() == 1
        dense = torch.empty(self.codes.shape, device=self.codes.device)
        for rows in _row_blocks(self.codes):
            codes = self.codes[rows]
            values = fp4_values(codes) if is_fp4 else codes.float()
            factor = (self.scale[rows].float() * self.tensor).unsqueeze(-1)
            dense[rows] = (values.view(*factor.shape[:2], -1) * factor).flatten(1)
        return dense


@dataclass(frozen=True)
class Quantised:
    """A quantised layer: down [K, R] is already divided by smooth [K]; up [N, R]."""

    codes: Codes
    smooth: torch.Tensor
    down: torch.Tensor
    up: torch.Tensor

    def dense(self) -> torch.Tensor:
        """The fp32 weight [N, K] that acts on an input that was not smoothed."""
        return self.codes.dense() / self.smooth.float() + self.up.float() @ self.down.float().t()


def _row_blocks(weight: torch.Tensor) -> list[slice]:
    """Ranges of rows that fit a CPU's cache: several passes over each are then cheap."""
    height = max(_BLOCK_ELEMENTS // weight.shape[1], 1) if weight.device.type == "cpu" else 1 << 30
    return [slice(start, start + height) for start in range(0, weight.shape[0], height)]


def round_int4(
    weight: torch.Tensor, *, search: bool = False, dtype: torch.dtype = torch.bfloat16
) -> Codes:
    """Nearest int4 codes in groups of 64 input channels. search: also tries smaller scales per
    group, which clip the largest values, and keeps the best."""
    blocks = [_round_int4(weight[rows], search, dtype) for rows in _row_blocks(weight)]
    return Codes(torch.cat([codes for codes, _ in blocks]), torch.cat([s for _, s in blocks]))


def _round_int4(
    weight: torch.Tensor, search: bool, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    groups = weight.view(weight.shape[0], -1, GROUP["int4"])
    largest = groups.abs().amax(-1).clamp(min=1e-8)
    best: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
    for share in _SEARCH if search else (1.0,):
        scale = (largest * (share / 7)).to(dtype).float().clamp(min=1e-12)
        codes = (groups / scale.unsqueeze(-1)).round_().clamp_(-8, 7)
        if not search:
            return codes.view_as(weight).to(torch.int8), scale.to(dtype)
        error = (codes * scale.unsqueeze(-1)).sub_(groups).square_().sum(-1)
        if best is None:
            best = error, codes, scale
            continue
        better = error < best[0]
        best = (
            torch.where(better, error, best[0]),
            torch.where(better.unsqueeze(-1), codes, best[1]),
            torch.where(better, scale, best[2]),
        )
    assert best is not None
    return best[1].view_as(weight).to(torch.int8), best[2].to(dtype)


def round_nvfp4(weight: torch.Tensor) -> Codes:
    """Nearest E2M1 codes in groups of 16 with fp8 scales and one factor."""
    largest = torch.tensor(max(float(weight.abs().amax()), 1e-12) / (FP8_MAX * FP4_MAX))
    tensor = float(largest.bfloat16())  # some files hold it in 16 bits
    codes, scales = [], []
    for rows in _row_blocks(weight):
        groups = weight[rows].reshape(-1, weight.shape[1] // GROUP["nvfp4"], GROUP["nvfp4"])
        scale = (groups.abs().amax(-1) / (FP4_MAX * tensor)).clamp(max=FP8_MAX)
        scale = scale.to(torch.float8_e4m3fn)
        unit = (scale.float() * tensor).clamp(min=1e-12).unsqueeze(-1)
        codes.append(fp4_codes(groups / unit).flatten(1))
        scales.append(scale.view(torch.uint8))
    return Codes(torch.cat(codes), torch.cat(scales).view(torch.float8_e4m3fn), tensor)


def round_awq(
    weight: torch.Tensor, dtype: torch.dtype = torch.bfloat16
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes 0..15 [N, K], scales and zeros [K/64, N]: weight = code * scale + zero."""
    num_rows, num_columns = weight.shape
    groups = weight.view(num_rows, num_columns // GROUP["awq"], GROUP["awq"])
    zeros = groups.amin(-1).to(dtype)
    scale = ((groups.amax(-1) - zeros.float()) / 15).clamp(min=1e-8).to(dtype)
    codes = (groups - zeros.float().unsqueeze(-1)) / scale.float().unsqueeze(-1)
    codes = codes.round_().clamp_(0, 15).view(num_rows, num_columns).to(torch.int8)
    return codes, scale.t().contiguous(), zeros.t().contiguous()


def low_rank(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """down [K, R] and up [N, R] of nearly the best rank-R approximation up @ down^T.

    Randomised subspace iteration (Halko, Martinsson, Tropp, arXiv 0909.4061) from a fixed seed.
    """
    num_rows, num_columns = weight.shape
    generator = torch.Generator().manual_seed(0)
    size = min(rank + _OVERSAMPLING, num_rows, num_columns)
    probe = torch.randn(num_columns, size, generator=generator).to(weight.device)
    basis = torch.linalg.qr(weight @ probe).Q
    for _ in range(_POWER_ITERATIONS):
        basis = torch.linalg.qr(weight @ torch.linalg.qr(weight.t() @ basis).Q).Q
    small_u, values, vh = torch.linalg.svd(basis.t() @ weight, full_matrices=False)
    kept = min(rank, size)
    root = values[:kept].sqrt()
    pad = (0, rank - kept)
    up = torch.nn.functional.pad((basis @ small_u[:, :kept]) * root, pad)
    down = torch.nn.functional.pad(vh[:kept].t() * root, pad)
    return down, up


def quantise(
    weight: torch.Tensor,
    *,
    rank: int,
    precision: str = "int4",
    smooth: torch.Tensor | None = None,
    search: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> Quantised:
    """A layer's weight [N, K] (fp32) as 4-bit codes and a low-rank branch.

    smooth: [K], what inputs are divided by (ones if None).
    """
    if smooth is None:
        smooth = torch.ones(weight.shape[1], device=weight.device)
    smooth = smooth.to(dtype)
    scaled = weight * smooth.float()
    down, up = low_rank(scaled, rank)
    down, up = (down / smooth.float().unsqueeze(1)).to(dtype), up.to(dtype)
    rest = scaled - up.float() @ (down.float() * smooth.float().unsqueeze(1)).t()
    if precision == "nvfp4":
        return Quantised(round_nvfp4(rest), smooth, down, up)
    return Quantised(round_int4(rest, search=search, dtype=dtype), smooth, down, up)


def quantise_inputs(
    inputs: torch.Tensor, precision: str = "int4", *, unsigned: bool = False
) -> torch.Tensor:
    """What a kernel's 4-bit quantisation leaves of smoothed inputs [M, K], in fp32.

    int4: per row and 64 channels, signed to largest / 7 or unsigned to largest / 15, scales in
    bf16; nvfp4: per row and 16 channels with fp8 scales.
    """
    num_rows, num_columns = inputs.shape
    groups = inputs.float().view(num_rows, num_columns // GROUP[precision], GROUP[precision])
    largest = groups.abs().amax(-1, keepdim=True)
    if precision == "nvfp4":
        scale = (largest / FP4_MAX).clamp(max=FP8_MAX).to(torch.float8_e4m3fn).float()
        values = groups / scale.clamp(min=1e-12)
        return (fp4_values(fp4_codes(values)) * scale).view(num_rows, num_columns)
    low, high = (0, 15) if unsigned else (-7, 7)
    scale = (largest / high).bfloat16().float().clamp(min=1e-10)
    codes = (groups / scale).round().clamp(low, high)
    return (codes * scale).view(num_rows, num_columns)


def output_error(
    weight: torch.Tensor,
    quantised: Quantised,
    inputs: torch.Tensor,
    *,
    precision: str = "int4",
    unsigned: bool = False,
) -> float:
    """Relative error of the layer's output on `inputs` [M, K] with 4-bit weights and inputs."""
    wanted = inputs @ weight.t()
    shift = UNSIGNED_SHIFT if unsigned else 0.0
    smooth, dense = quantised.smooth.float(), quantised.codes.dense()
    rounded = quantise_inputs((inputs + shift) / smooth, precision, unsigned=unsigned)
    got = rounded @ dense.t() - (shift / smooth) @ dense.t() if shift else rounded @ dense.t()
    got = got + (inputs @ quantised.down.float()) @ quantised.up.float().t()
    return float((got - wanted).norm() / wanted.norm().clamp(min=1e-12))
