"""Patches as terms against the patched dense weight, without ComfyUI; refusals by name."""

from types import SimpleNamespace

import pytest
import torch
from slipstream.backends.svdquant.kernels import Dequant
from slipstream.backends.svdquant.layouts import plain_from_codes
from slipstream.backends.svdquant.linear import linear
from slipstream.backends.svdquant.lora import compile_terms, refused_types
from slipstream.backends.svdquant.quantize import quantise
from slipstream.backends.svdquant.weight import (
    Facts,
    Segment,
    effective,
    stack_columns,
    unsigned_output,
    whole,
)

N, K = 256, 128


def randn(*shape, by=0.1):
    return torch.randn(*shape, generator=GENERATOR) * by


GENERATOR = torch.Generator().manual_seed(0)


def segment(n=N, k=K, unsigned=False):
    q = quantise(randn(n, k), rank=16, smooth=torch.rand(k) + 0.5, dtype=torch.float32)
    facts = Facts("int4", 0, n, 0, k, unsigned=unsigned)
    scale = q.codes.scale.t().contiguous()
    return Segment(facts, plain_from_codes(q.codes.codes), scale, q.smooth, q.down, q.up)


WEIGHTS = {
    "one": lambda: whole(segment()),
    "unsigned": lambda: whole(segment(unsigned=True)),
    "two columns": lambda: stack_columns([segment(k=K // 2 * 2), segment(k=K, unsigned=True)]),
}


def adapter(name, *weights):
    return SimpleNamespace(name=name, weights=weights)


def lora(n, k, r=5, dora=None, alpha=2.0):
    return adapter("lora", randn(n, r), randn(r, k), alpha, None, dora, None)


def delta(patch):
    """The fp32 matrix that a plain patch adds."""
    strength, value = patch[:2]
    if isinstance(value, tuple):
        return strength * value[-1][0] if len(value) == 2 else strength * value[0]
    w = value.weights
    if value.name == "lora":
        return strength * (w[0] @ w[1]) * (w[2] / w[1].shape[0])
    if value.name == "loha":
        return strength * (w[0] @ w[1]) * (w[3] @ w[4]) * (w[2] / w[1].shape[0])
    return strength * torch.kron(w[0], w[5] @ w[6]) * (w[2] / w[6].shape[0])


def patches(k):
    return [
        (0.7, lora(N, k), 1.0, None, None),
        (-0.3, ("diff", (randn(N, k),)), 1.0, None, None),
        (0.5, (randn(N, k),), 1.0, None, None),
        (
            0.4,
            adapter(
                "loha", randn(N, 3), randn(3, k), 1.5, randn(N, 3), randn(3, k), None, None, None
            ),
            1.0,
            None,
            None,
        ),
        (
            0.6,
            adapter(
                "lokr", randn(8, 4), None, 2.0, None, None, randn(N // 8, 3), randn(3, k // 4),
                None, None,
            ),
            1.0,
            None,
            None,
        ),
    ]  # fmt: skip


@pytest.mark.parametrize("kind", WEIGHTS)
def test_terms_are_the_patched_weight(kind):
    weight = WEIGHTS[kind]()
    k = weight.shape[1]
    x, bias = randn(9, k, by=1.0), randn(N)
    chosen = patches(k)
    terms, refused = compile_terms(chosen, weight)
    assert refused == ()
    dense = effective(weight) + sum(delta(p) for p in chosen)
    y = linear(x, weight, bias, lambda *_: Dequant(), terms=terms)
    wanted = x @ dense.t() + bias + unsigned_output(weight)
    assert torch.allclose(y, wanted, atol=2e-4)
    base = linear(x, weight, bias, lambda *_: Dequant())
    assert (y - base).abs().max() > 0.1


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("axis", ["rows", "columns"])
def test_dora_after_other_patches(kind, axis):
    weight = WEIGHTS[kind]()
    k = weight.shape[1]
    first = patches(k)
    scale = randn(N, 1) + 1 if axis == "rows" else randn(1, k) + 1
    dora = lora(N, k, dora=scale)
    before = effective(weight) + sum(delta(p) for p in first)
    diff = (dora.weights[0] @ dora.weights[1]) * (2.0 / 5)
    calc = before + diff
    norm = before.norm(dim=1, keepdim=True) if axis == "rows" else calc.norm(dim=0, keepdim=True)
    after = before + 0.8 * (calc * scale / norm - before)
    terms, _ = compile_terms([*first, (0.8, dora, 1.0, None, None)], weight)
    x, bias = randn(9, k, by=1.0), randn(N)
    y = linear(x, weight, bias, lambda *_: Dequant(), terms=terms)
    # the shift of an unsigned layer is not part of the weight: the bias takes it out
    assert torch.allclose(y, x @ after.t() + bias + unsigned_output(weight), atol=1e-3)


def test_offsets_take_some_rows_or_columns():
    weight = whole(segment())
    x = randn(9, K, by=1.0)
    rows, columns = lora(64, K), lora(N, 32)
    terms, _ = compile_terms(
        [(1.0, rows, 1.0, (0, 128, 64), None), (1.0, columns, 1.0, (1, 96, 32), None)], weight
    )
    dense = effective(weight)
    dense[128:192] += delta((1.0, rows))
    dense[:, 96:] += delta((1.0, columns))
    y = linear(x, weight, None, lambda *_: Dequant(), terms=terms)
    assert torch.allclose(y, x @ dense.t(), atol=1e-4)
    assert terms.pair.down.shape[1] == 16  # padded


def test_ranks_of_loha_stay_exact_or_dense():
    weight = whole(segment())
    for rank, is_pair in ((4, True), (12, False)):
        loha = adapter(
            "loha",
            randn(N, rank), randn(rank, K), None, randn(N, rank), randn(rank, K), None, None, None,
        )  # fmt: skip
        terms, _ = compile_terms([(1.0, loha, 1.0, None, None)], weight)
        assert (terms.pair is not None) == is_pair
        assert bool(terms.others) == (not is_pair)


REFUSED = [
    (adapter("glora", None), "glora"),
    (adapter("oft", None), "oft"),
    (("set", (torch.zeros(N, K),)), "set"),
    (("model_as_lora", (torch.zeros(N, K),)), "model_as_lora"),
    (("diff", (torch.zeros(N, K), {"pad_weight": True})), "diff with padding"),
    ([("another", None)], "a model merge (another model's weights)"),
    (adapter("lora", None, None, None, torch.zeros(1), None, None), "lora with a Tucker core"),
    (adapter("lora", None, None, None, None, None, [1]), "a LoRA that resizes the layer"),
]


@pytest.mark.parametrize(("value", "name"), REFUSED)
def test_what_cannot_be_applied_is_named(value, name):
    weight = whole(segment())
    patch = (1.0, value, 1.0, None, None)
    assert refused_types([patch]) == (name,)
    assert compile_terms([patch], weight) == (None, (name,))
    assert refused_types([(0.0, value, 1.0, None, None)]) == ()


def test_shapes_that_do_not_fit_are_named():
    weight = whole(segment())
    terms, refused = compile_terms([(1.0, lora(N, K // 2), 1.0, None, None)], weight)
    assert terms is None
    assert refused == ("lora of shape [256, 64] for a layer [256, 128]",)
    _, refused = compile_terms([(1.0, lora(N, K), 1.0, None, lambda w: w)], weight)
    assert refused == ("a LoRA that reorders rows",)


def test_a_merge_scales_the_base_weight():
    with pytest.raises(ValueError, match="model merge scales the weights"):
        compile_terms([(0.5, lora(N, K), 0.5, None, None)], whole(segment()))


def test_terms_move_and_cast():
    terms, _ = compile_terms(patches(K), whole(segment()))
    half = terms.to(torch.device("cpu"), torch.bfloat16)
    assert half.pair.up.dtype == torch.bfloat16
    assert all(t.dense().matrix.dtype == torch.bfloat16 for t in half.others)
    assert terms.pair.up.dtype == torch.float32
