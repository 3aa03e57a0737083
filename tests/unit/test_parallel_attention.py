"""Shared attention and hooks on dummy blocks: heads, streams, masks, GQA, worlds 2, 3, 4 and 7."""

import pytest
import torch
from forked_ranks import RankFailed, run_ranks
from slipstream.backends.architectures.tokens import Blocks, Gather, GatherOut, Tok, TokenPlan
from slipstream.parallel.attention import SharedAttention, split_heads
from slipstream.parallel.bind import bind
from slipstream.parallel.engine import Call, EarlyExit
from slipstream.parallel.hooks import installed
from slipstream.parallel.mesh import Layout
from slipstream.parallel.shards import PlanError

OVERRIDE = "optimized_attention_override"
DIM = 8
JOINT = ("txt", "img")
LAYOUTS = [
    Layout(ulysses=2), Layout(ulysses=3), Layout(ulysses=4), Layout(ulysses=7), Layout(ring=2),
    Layout(ring=3), Layout(ulysses=2, ring=2), Layout(ulysses=3, ring=2),
]  # fmt: skip


def sdpa(q, k, v, heads, mask=None, skip_reshape=False, skip_output_reshape=False, **options):
    """ComfyUI's calling convention on torch's attention."""
    if not skip_reshape:
        rows = [t if t.ndim == 4 else t.view(*t.shape[:2], -1, DIM) for t in (q, k, v)]
        q, k, v = (t.transpose(1, 2) for t in rows)
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=options.get("scale"),
        enable_gqa=options.get("enable_gqa", False),
    )  # fmt: skip
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


class Block(torch.nn.Module):
    """A joint block: attention over text and image, then a residual on each."""

    def __init__(self, heads, kv_heads):
        super().__init__()
        self.heads, self.kv_heads = heads, kv_heads
        self.q = torch.nn.Linear(heads * DIM, heads * DIM)
        self.k = torch.nn.Linear(heads * DIM, kv_heads * DIM)
        self.v = torch.nn.Linear(heads * DIM, kv_heads * DIM)

    def forward(self, img, txt, pe, mask=None, transformer_options={}, bypass=False):  # noqa: B006
        x = torch.cat((txt, img), 1) + pe
        call = {"mask": mask, "scale": 0.4}
        if self.kv_heads != self.heads:
            call["enable_gqa"] = True
        override = transformer_options.get(OVERRIDE)
        if override is None or bypass:
            out = sdpa(self.q(x), self.k(x), self.v(x), self.heads, **call)
        else:
            out = override(sdpa, self.q(x), self.k(x), self.v(x), self.heads, **call)
        length = txt.shape[1]
        return img + torch.tanh(out[:, length:]), txt + torch.tanh(out[:, :length])


class Net(torch.nn.Module):
    """Two blocks and a final layer."""

    def __init__(self, heads=3, kv_heads=None):
        super().__init__()
        torch.manual_seed(heads)
        self.blocks = torch.nn.ModuleList(Block(heads, kv_heads or heads) for _ in range(2))
        self.final = torch.nn.Linear(heads * DIM, 4)

    def forward(self, img, txt, pe, mask=None, transformer_options={}, bypass=False):  # noqa: B006
        for block in self.blocks:
            img, txt = block(img, txt, pe=pe, mask=mask, bypass=bypass,
                             transformer_options=transformer_options)  # fmt: skip
        return self.final(img)


IMG, TXT = Tok(1, ("img",)), Tok(1, ("txt",))
PLAN = TokenPlan(
    blocks=(
        Blocks(
            path="blocks.*", layout=JOINT, define=("img", "txt"),
            args={"img": IMG, "txt": TXT, "pe": Tok(1, JOINT)},
        ),
    ),
    end=Gather(path="final", args={"input": IMG}),
)  # fmt: skip


def inputs(heads, *, txt=5, img=23, batch=2):
    generator = torch.Generator().manual_seed(1)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    return {
        "img": randn(batch, img, heads * DIM),
        "txt": randn(batch, txt, heads * DIM),
        "pe": randn(1, txt + img, heads * DIM),
    }


def shared(rank, layout, name, net, call_inputs, plan=PLAN):
    mesh = rank.links(layout, name).mesh
    call = Call(bind(plan, net), mesh, rank.clock)
    with torch.no_grad(), installed(call):
        try:
            out = net(**call_inputs, transformer_options={OVERRIDE: SharedAttention(call)})
        except EarlyExit:
            out = None
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules())
    assert hooks == 0, "hooks outlived the call"
    return out


def worst(net, call_inputs, layouts=LAYOUTS, plan=PLAN):
    """Largest difference to one rank over the layouts."""

    def body(rank):
        return [
            shared(rank, layout, f"l{i}", net, call_inputs, plan)
            for i, layout in enumerate(layouts)
            if rank.number < layout.world
        ]

    with torch.no_grad():
        expected = net(**call_inputs)
    outs = run_ranks(max(layout.world for layout in layouts), body)[0]
    return max((out - expected).abs().max().item() for out in outs)


@pytest.mark.parametrize("heads", [1, 2, 3, 5, 8])
def test_head_counts(heads):
    assert worst(Net(heads), inputs(heads)) < 1e-6


@pytest.mark.parametrize(("txt", "img"), [(1, 1), (1, 64), (2, 3), (64, 7), (13, 22)])
def test_stream_lengths(txt, img):
    few = [Layout(ulysses=3), Layout(ulysses=2, ring=2), Layout(ring=4)]
    assert worst(Net(3), inputs(3, txt=txt, img=img), few) < 1e-6


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_grouped_query_attention(kv_heads):
    assert worst(Net(4, kv_heads), inputs(4), LAYOUTS[:-1]) < 1e-6


@pytest.mark.parametrize("shape", ["[Nq,Nk]", "[B,Nq,Nk]", "[B,1,1,Nk]", "[B,H,Nq,Nk]"])
@pytest.mark.parametrize("kind", ["bias", "bool"])
def test_masks(shape, kind):
    lengths = {"B": 2, "H": 3, "Nq": 28, "Nk": 28, "1": 1}
    size = [lengths[name] for name in shape.strip("[]").split(",")]
    mask = torch.randn(size, generator=torch.Generator().manual_seed(3))
    if kind == "bool":
        mask = mask > -0.5
        mask[..., 0] = True
    if len(size) == 3:
        call_mask = mask.unsqueeze(1)  # torch's attention takes no 3-D mask as ComfyUI means it
    else:
        call_mask = mask
    few = [Layout(ulysses=3), Layout(ring=3), Layout(ulysses=2, ring=2)]
    assert worst(Net(3), {**inputs(3), "mask": call_mask}, few) < 1e-6


def test_replicated_text():
    plan = TokenPlan(blocks=PLAN.blocks, end=PLAN.end, replicate=("txt",))
    assert worst(Net(3), inputs(3), plan=plan) < 1e-6


def test_gathering_the_last_blocks_output():
    plan = TokenPlan(blocks=PLAN.blocks, end=GatherOut(path="blocks.*", tok=IMG, index=0))
    assert worst(Net(3), inputs(3), plan=plan) < 1e-6


def test_ulysses_of_one_batch_is_bit_identical():
    """Only the order of copies changes; every head is attended as on one rank."""
    net, call_inputs = Net(4), inputs(4, batch=1)
    assert worst(net, call_inputs, [Layout(ulysses=2), Layout(ulysses=4)]) < 1e-7


@pytest.mark.parametrize(
    ("heads", "kv", "parts", "expected"),
    [
        (40, 40, 4, ((10,) * 4, (10,) * 4)),
        (3, 3, 2, ((2, 1), (2, 1))),
        (3, 3, 4, ((1, 1, 1, 0), (1, 1, 1, 0))),
        (12, 3, 2, ((8, 4), (2, 1))),
    ],
)
def test_split_heads(heads, kv, parts, expected):
    assert split_heads(heads, kv, parts) == expected


# --- never a wrong image


def fails(sentence, net, call_inputs, plan=PLAN):
    with pytest.raises(RankFailed, match=sentence):
        worst(net, call_inputs, [Layout(ulysses=2)], plan)


def test_attention_that_bypasses_the_hook_is_noticed():
    fails("does not pass through ComfyUI's hook", Net(2), {**inputs(2), "bypass": True})


def test_an_argument_of_another_length_is_noticed():
    short = {**inputs(2), "pe": torch.zeros(1, 27, 2 * DIM)}
    net = Net(2)
    call = Call(bind(PLAN, net), FakeMesh(), None)
    with pytest.raises(PlanError, match="27 tokens"):
        call.enter_block(PLAN.blocks[0], "blocks.0", net.blocks[0], [], short)


class FakeMesh:
    rank, world, ulysses, ring = 0, 2, 2, 1


def test_a_renamed_block_or_argument_is_noticed():
    def plan(**changes):
        fields = {"path": "blocks.*", "layout": JOINT, "args": PLAN.blocks[0].args}
        return TokenPlan(blocks=(Blocks(**{**fields, **changes}),), end=PLAN.end)

    with pytest.raises(PlanError, match=r"Net has no 'layers.\*'"):
        bind(plan(path="layers.*"), Net())
    with pytest.raises(PlanError, match="forward has no 'rope'"):
        bind(plan(args={"rope": IMG}), Net())
    end = Gather(path="head", args={"input": IMG})
    with pytest.raises(PlanError, match="Net has no 'head'"):
        bind(TokenPlan(blocks=PLAN.blocks, end=end), Net())


def test_without_the_exchange_the_difference_is_large(monkeypatch):
    monkeypatch.setattr(Call, "attention_is_local", lambda self: True)
    monkeypatch.setattr(Call, "leave_block", lambda self, rule, path: None)
    assert worst(Net(2), inputs(2), [Layout(ulysses=2)]) > 1e-2
