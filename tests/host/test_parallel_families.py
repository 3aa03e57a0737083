"""Every token plan on its live network: several ranks give what one rank gives.

Three heads and token counts that nothing divides; odd prompts, masks, references, control and
per-token timesteps where a family has them; negative controls that must fail.
"""

import functools
from dataclasses import replace

import pytest
import tiny
import torch
from forked_ranks import RankFailed
from shared_calls import (
    FEW,
    HYBRID,
    LAYOUTS,
    MANY,
    R4,
    U2,
    U3,
    U4,
    assert_same,
    differences,
    record,
)
from slipstream.backends.architectures.plans import PLANS, find_plan
from slipstream.backends.architectures.tokens import Tok
from slipstream.parallel import attention
from slipstream.parallel.mesh import Layout

pytestmark = pytest.mark.usefixtures("comfy")

PLANNED = (
    "wan", "wan_i2v", "wan_vace", "wan_5b", "wan_camera", "wan_s2v",
    "flux", "flux_schnell", "flux2", "chroma", "hunyuan_video",
    "qwen_image", "mage_flow", "ltxv", "ltxav", "sd3", "sd35", "lumina2", "z_image", "hidream",
    "cosmos_predict2", "minimax_h3", "krea2", "kandinsky5", "cogvideox", "ideogram4", "lens",
    "joyimage", "omnigen2", "aura_flow", "wan_scail", "mochi",
    "hidream_o1", "hidream_o1_edit",
)  # fmt: skip


def randn(*shape, seed=7):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


SIX = ("wan", "flux", "qwen_image", "ltxav", "sd3", "z_image")
plain = functools.cache(record)


@pytest.mark.parametrize("family", PLANNED)
def test_ranks_agree_with_one(family):
    assert_same(plain(family), MANY if family in SIX else LAYOUTS)


def test_every_plan_is_run_here():
    ours = set(PLANS) - {"FakeTokenNet"}  # the fake workers of other tests bring that one
    assert {type(plain(family).network).__name__ for family in PLANNED} == ours


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("ace_step", "its self attention is linear, without ComfyUI's hook"),
        ("ace_step15", "its attention does not pass transformer_options"),
        ("cosmos", "it adds positions to the whole sequence between its blocks"),
        ("qwen_image21", "it attends part by part, by positions in the whole sequence"),
        ("ernie", "its attention does not pass transformer_options"),
    ],
)
def test_a_family_that_cannot_be_shared_says_why(family, why):
    network = tiny.load(family).model.diffusion_model
    assert f"No token plan for class {type(network).__name__} ({why})" in find_plan(network)


@pytest.mark.parametrize("heads", [2, 5])
@pytest.mark.parametrize("family", ["wan", "flux"])
def test_other_head_counts(family, heads):
    assert_same(record(family, heads=heads), (U2, U3, U4, HYBRID))


@pytest.mark.parametrize("tokens", [1, 2, 3, 64])
def test_prompt_lengths(tokens):
    layouts = (U2, U4, R4, HYBRID)
    assert_same(record("flux", tokens=tokens), layouts)


def test_more_ranks_than_tokens_of_a_row():
    shape = (1, 16, 1, 4, 14)  # 2 rows of 7 patches: fewer rows than ranks
    assert_same(record("cosmos_predict2", shape=shape), (U3, U4, HYBRID))


JOINT_MASK = torch.zeros(2, 1, 43, 43)
JOINT_MASK[..., :3] = -1e4
TEXT_MASK = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
FIRST = {  # HunyuanVideo takes these with a batch of one only
    "x": randn(1, 16, 3, 14, 10), "timestep": torch.tensor([700.0]), "context": randn(1, 8, 768),
    "y": randn(1, 768), "guidance": torch.tensor([6000.0]),
}  # fmt: skip
VARIANTS = {
    "flux mask": ("flux", {"attention_mask": JOINT_MASK}),
    "flux reference": ("flux", {"ref_latents": [randn(2, 16, 6, 8)]}),
    "flux control": ("flux", {"control": {
        "input": [randn(2, 35, 384), None], "output": [None, randn(2, 35, 384)]}}),
    "flux control of the first tokens": ("flux", {
        "ref_latents": [randn(2, 16, 6, 8)],
        "control": {"input": [], "output": [randn(2, 40, 384)]}}),
    "flux2 reference": ("flux2", {"ref_latents": [randn(2, 128, 4, 5)]}),
    "flux2 reference, own timestep": ("flux2", {
        "guidance": None, "ref_latents": [randn(2, 128, 4, 5)],
        "ref_latents_method": "index_timestep_zero"}),
    "chroma mask and control": ("chroma", {
        "attention_mask": JOINT_MASK,
        "control": {"input": [randn(2, 35, 384)], "output": [randn(2, 35, 384)]}}),
    "hunyuan text mask": ("hunyuan_video", {**FIRST, "attention_mask": TEXT_MASK[1:]}),
    "hunyuan guiding frame": ("hunyuan_video", {"guiding_frame_index": torch.tensor([0])}),
    "hunyuan reference": ("hunyuan_video", {**FIRST, "ref_latent": randn(1, 16, 1, 14, 10)}),
    "hunyuan control": ("hunyuan_video", {"control": {
        "input": [randn(2, 105, 384)], "output": [randn(2, 105, 384)]}}),
    "qwen text mask": ("qwen_image", {"attention_mask": TEXT_MASK}),
    "qwen edit and control": ("qwen_image", {
        "ref_latents": [randn(2, 16, 1, 6, 8)], "control": {"input": [randn(2, 35, 384)]}}),
    "qwen edit, own timestep": ("qwen_image", {
        "ref_latents": [randn(2, 16, 1, 6, 8)], "ref_latents_method": "index_timestep_zero"}),
    "qwen short prompt, mask": ("qwen_image", {
        "context": randn(2, 3, 768), "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])}),
    "mage-flow mask and reference": ("mage_flow", {
        "attention_mask": TEXT_MASK, "ref_latents": [randn(2, 128, 4, 5)]}),
    "wan timestep per frame": ("wan_5b", {"timestep": torch.tensor([[0.0, 700, 700]] * 2)}),
    "wan extra reference": ("wan", {"context_latents": [randn(2, 16, 1, 6, 8)]}),
    "ltxv timestep per token": ("ltxv", {"timestep": randn(2, 105).abs()}),
    "ltxav timestep per frame": ("ltxav", {"timestep": (
        torch.tensor([0.0, 0.7, 0.7]).repeat_interleave(35)[None].repeat(2, 1),
        torch.tensor([[0.7]] * 2))}),
    "z-image references": ("z_image", {
        "ref_latents": [randn(2, 16, 8, 8)], "ref_contexts": [randn(2, 5, 768)]}),
    "krea2 reference, own timestep": ("krea2", {
        "ref_latents": [randn(2, 16, 6, 8)], "ref_latents_method": "index_timestep_zero"}),
    "cosmos image": ("cosmos_predict2", {"x": randn(2, 16, 1, 14, 10)}),
    "ideogram without a prompt": ("ideogram4", {"context": None}),
    "ideogram mask": ("ideogram4", {"attention_mask": TEXT_MASK}),
    "lens mask": ("lens", {"attention_mask": TEXT_MASK}),
    "sd3 control": ("sd3", {"control": {"output": [randn(2, 35, 192)]}}),
    "joyimage reference": ("joyimage", {"ref_latents": [randn(2, 16, 1, 6, 8)]}),
    "mochi padded text": ("mochi", {"attention_mask": TEXT_MASK, "num_tokens": 5}),
    "minimax denoise mask": ("minimax_h3", {"denoise_mask": torch.cat(
        (torch.full((1, 1, 1, 7, 5), 0.5), torch.ones(1, 1, 2, 7, 5)), 2)}),
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_what_a_family_takes_besides(name):
    family, changes = VARIANTS[name]
    usual = plain(family)
    if changes.get("x") is FIRST["x"]:
        usual = usual.with_(**FIRST)
    changed = usual.with_(**changes)
    assert_same(changed, FEW)
    pairs = zip(usual.run({}), changed.run({}), strict=True)
    reads = any(a.shape != b.shape or not torch.equal(a, b) for a, b in pairs)
    assert reads, "the network does not read this"


# --- what must fail


@pytest.mark.parametrize("family", ["wan", "flux", "qwen_image", "sd3", "z_image", "mochi"])
def test_without_the_exchange_the_result_is_wrong(family, monkeypatch):
    def without_exchange(self, inner, q, k, v, mask, options):
        heads = (t.transpose(1, 2) for t in (q, k, v))
        out = inner(
            *heads, q.shape[2], mask=None, skip_reshape=True, skip_output_reshape=True, **options
        )
        return out.transpose(1, 2)

    monkeypatch.setattr(attention.SharedAttention, "_shared", without_exchange)
    assert differences(plain(family), (U2,))[str(U2)] > 1e-2


def test_with_other_keys_or_rope_hidream_o1_is_wrong():
    """Its keys are all tokens; most of what it returns is the noise it got, hence the low bar."""
    recorded = plain("hidream_o1")
    plan = find_plan(recorded.network).for_call(recorded.arguments)
    (path,) = plan.attention_layouts
    wrong = replace(plan, attention_layouts={path: (("x",), ("x",))})
    with pytest.raises(RankFailed, match="fits none of the layouts"):
        differences(recorded, (U2,), plan=wrong)
    (blocks,) = plan.blocks
    first_rows = Tok(fn=lambda shards, t: [x[..., : shards.local(("txt", "x")), :] for x in t])
    args = {**blocks.args, "freqs_cis": first_rows}
    wrong = replace(plan, blocks=(replace(blocks, args=args),))
    assert differences(recorded, (U2,), plan=wrong)[str(U2)] > 1e-3


def test_with_rope_of_other_tokens_the_result_is_wrong():
    recorded = plain("wan")
    plan = find_plan(recorded.network)
    (blocks,) = plan.blocks
    first_rows = Tok(fn=lambda shards, freqs: freqs[:, : shards.local(("x",))])
    wrong = replace(plan, blocks=(replace(blocks, args={**blocks.args, "freqs": first_rows}),))
    assert differences(recorded, (U2,), plan=wrong)[str(U2)] > 1e-2


def test_bf16_differs_as_much_as_bf16_does():
    """Not more than twice what bf16 differs from fp32 on one rank."""
    recorded = record("flux")
    expected = recorded.run({})[0]
    recorded.network.to(torch.bfloat16)
    half = recorded.with_(**{
        k: v.bfloat16() if torch.is_tensor(v) and v.is_floating_point() and k != "timestep" else v
        for k, v in recorded.arguments.items()
    })  # fmt: skip
    own = (half.run({})[0].float() - expected).abs().max() / expected.abs().max()
    assert own > 1e-3
    assert max(differences(half, (U3, Layout(ring=3), HYBRID)).values()) < 2 * own


def test_the_benchmarks_ceiling_computes_what_ranks_do():
    """Shares of a call without peers run to their end, with every rank's own part of the work."""
    from slipstream.bench.parallel_ceiling import share
    from slipstream.bench.parallel_models import Subject

    network = plain("wan").network
    subject = Subject({}, 48, 32, 9)
    x = torch.zeros(1, network.in_dim, 3, 4, 6)
    context = torch.zeros(1, 2, network.text_dim)
    inputs = {"x": x, "timestep": torch.tensor([500.0]), "context": context}
    lengths = []
    handle = network.blocks[0].ffn.register_forward_pre_hook(
        lambda module, args: lengths.append(args[0].shape[1])
    )
    try:
        for rank, world in ((0, 1), (0, 2), (1, 2), (2, 4)):
            share(network, inputs, rank, world)()
    finally:
        handle.remove()
    assert lengths == [subject.num_tokens, 9, 9, 4]
