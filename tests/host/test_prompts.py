"""Every row of a batch of prompts gives what its prompt alone gives, in ComfyUI's own sampling.

With real tokenizers and small text encoders through the node; and with random prompts for every
family, as what a network does with padding is what backends/prompts/padding.py states.
"""

import functools
from types import SimpleNamespace

import core_nodes
import pytest
import tiny
import tiny_clip
import torch
from slipstream.backends.prompts.batches import join, plan
from slipstream.backends.prompts.padding import PADDING, Padding

pytestmark = pytest.mark.usefixtures("comfy")

SAME = 5e-6  # of the largest value: other GEMM shapes; fp32
SAME_BY = {"cosmos": 5e-5, "cosmos_predict2": 5e-5, "cogvideox": 2e-4}  # they amplify rounding
OTHER = 5e-4  # what a padded row without its mask differs by, at least
LENGTHS = (6, 4, 2)

# Families whose networks do not keep the rows of a batch apart, or take one row.
ONE_ROW = {"minimax_h3", "ace_step15", "hidream_o1_edit"}
MASKED = {"omnigen2", "boogu", "lumina2", "z_image", "ideogram4"}
FAMILIES = tuple(family for family in tiny.ALL if family not in ONE_ROW)
WAYS = {
    "sd15": "repeat", "sdxl": "repeat",
    "qwen_image": "mask", "mage_flow": "mask", "lens": "mask", "ideogram4": "mask", "ltxv": "mask",
    "flux2": "left",
}  # fmt: skip
QUICK = {"sdxl", "flux", "flux2", "qwen_image", "z_image", "wan", "ltxv"}


def families(names):
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.full) for name in names]


def parts(latent):
    return latent.unbind() if getattr(latent, "is_nested", False) else [latent]


def rows(latent, index):
    """A row of a latent, as an empty or noise latent of batch 1."""
    from comfy.nested_tensor import NestedTensor

    one = [part[index : index + 1] for part in parts(latent)]
    return NestedTensor(one) if getattr(latent, "is_nested", False) else one[0]


def noise_of(family, num_rows, seed=3):
    from comfy.nested_tensor import NestedTensor

    generator = torch.Generator().manual_seed(seed)
    shape = tiny.latent_shape(family)
    shapes = [shape] if isinstance(shape[0], int) else shape
    noise = [torch.randn((num_rows, *one[1:]), generator=generator) for one in shapes]
    return noise[0] if shapes[0] is shape else NestedTensor(noise)


def sampled(model, noise, positive, negative, *, cfg=2.0, sampler="euler", steps=2):
    """KSampler's latent for this noise."""
    import comfy.sample

    with torch.inference_mode():
        return comfy.sample.sample(
            model, noise, steps, cfg, sampler, "simple", positive, negative, noise * 0,
            disable_pbar=True, seed=1,
        )  # fmt: skip


def difference(batch, singles):
    """Largest difference of a row from its single run, of that run's largest value."""
    found = 0.0
    for index, single in enumerate(singles):
        for one, row in zip(parts(single), parts(rows(batch, index)), strict=True):
            assert torch.isfinite(row).all()
            found = max(found, ((one - row).abs().max() / one.abs().max()).item())
    return found


@functools.lru_cache(maxsize=4)
def run_of(family, lengths):
    """Prompts of these lengths, each sampled alone with its own row of noise."""
    model, noise = tiny.load(family), noise_of(family, len(lengths))
    negative = tiny.text(family, tokens=6, seed=99)
    prompts = [tiny.text(family, tokens=n, seed=10 + i) for i, n in enumerate(lengths)]
    shared = {k: v for k, v in prompts[0][0][1].items() if k in tiny.ALL[family].lists}
    for prompt in prompts:  # references are one for all rows; an encoder makes no lists
        prompt[0][1].update(shared)
    if family in MASKED:  # their encoders give a mask of ones
        for ((text, extra),) in (*prompts, negative):
            extra["attention_mask"] = torch.ones(text.shape[:2], dtype=torch.long)
    singles = [sampled(model, rows(noise, i), p, negative) for i, p in enumerate(prompts)]
    return SimpleNamespace(**locals())


def batch_of(run, way, prompts=None):
    joined = join(prompts or run.prompts, Padding(way=way, why="a test", up_to=512))
    return sampled(run.model, run.noise, joined, run.negative)


@pytest.mark.parametrize("family", families(FAMILIES))
def test_rows_of_equal_prompts(family):
    run = run_of(family, (8, 8, 8))
    found = difference(batch_of(run, "none"), run.singles)
    assert found <= SAME_BY.get(family, SAME)
    if family == "hidream_o1":  # reads its prompt from token numbers, which are no random text
        return
    swapped = [run.prompts[i] for i in (1, 0, 2)]
    assert difference(batch_of(run, "none", swapped), run.singles) > 10 * SAME, "the test is blind"


@pytest.mark.parametrize("family", families(WAYS))
def test_rows_of_unequal_prompts(family):
    run = run_of(family, LENGTHS)
    assert difference(batch_of(run, WAYS[family]), run.singles) <= SAME


@pytest.mark.parametrize("family", families(WAYS))
def test_padding_without_its_way_is_another_picture(family):
    """Negative control: zeros behind the prompt, and no mask."""
    run = run_of(family, LENGTHS)
    padded = [
        [[torch.nn.functional.pad(text, (0, 0, 0, max(LENGTHS) - text.shape[1])), dict(extra)]]
        for ((text, extra),) in run.prompts
    ]
    for ((_, extra),) in padded:
        if "attention_mask" in extra:
            extra["attention_mask"] = torch.ones(1, max(LENGTHS), dtype=torch.long)
    assert difference(batch_of(run, "none", padded), run.singles) > OTHER


@pytest.mark.parametrize("way", ["repeat", "mask", "left"])
@pytest.mark.parametrize("family", ["flux", "z_image", pytest.param("sd3", marks=pytest.mark.full)])
def test_families_without_a_way_need_batches_of_their_own(family, way):
    run = run_of(family, LENGTHS)
    assert difference(batch_of(run, way), run.singles) > OTHER


def test_hunyuan_video_takes_a_mask_for_one_row_only():
    run = run_of("hunyuan_video", LENGTHS)
    assert difference(batch_of(run, "repeat"), run.singles) > OTHER
    with pytest.raises(RuntimeError, match="expanded size of the tensor"):
        batch_of(run, "mask")


@pytest.mark.full
@pytest.mark.parametrize("tokens", [(8, 6, 3), (5, 5, 5)])
def test_mochi_counts_the_tokens_of_all_rows(tokens):
    """Prompts that are masked alike share a batch; others get their own."""
    run = run_of("mochi", (8, 8, 8))
    prompts = []
    for ((text, extra),), count in zip(run.prompts, tokens, strict=True):
        mask = torch.tensor([[1] * count + [0] * (8 - count)])
        prompts.append([[text, extra | {"attention_mask": mask}]])
    singles = [
        sampled(run.model, rows(run.noise, i), p, run.negative) for i, p in enumerate(prompts)
    ]
    found = difference(batch_of(run, "none", prompts), singles)
    is_alike = len(set(tokens)) == 1
    assert found <= SAME if is_alike else found > OTHER
    planned = plan(prompts, PADDING["comfy.text_encoders.genmo.MochiT5Tokenizer"], 4)
    assert planned == ([[0, 1, 2]] if is_alike else [[0], [1], [2]])


@pytest.mark.full
def test_ace_step_15_does_not_keep_rows_apart():
    run = run_of("ace_step15", (8, 8, 8))
    assert difference(batch_of(run, "none"), run.singles) > OTHER


def test_minimax_h3_takes_one_row():
    run = run_of("minimax_h3", (8, 8, 8))
    with pytest.raises(ValueError, match="batch size 1"):
        batch_of(run, "none")


def test_the_table_names_classes_that_exist():
    import importlib

    for name in PADDING:
        module, _, kind = name.rpartition(".")
        assert hasattr(importlib.import_module(module), kind), name


# Through the node, with ComfyUI's tokenizers and text encoders

SHORT, LONG = "a red fox in the (snow:1.3)", "a lighthouse, " + "very " * 90 + "tall"
MIDDLE = "two small boats on a calm sea at night"


@pytest.fixture
def node(comfy, tmp_path):
    """execute() as ComfyUI calls it, with an input folder of its own."""
    import folder_paths
    from slipstream.nodes.prompts import SlipstreamPromptBatch

    was = folder_paths.get_input_directory()
    folder_paths.set_input_directory(str(tmp_path))
    prepared = SlipstreamPromptBatch.PREPARE_CLASS_CLONE({"hidden_inputs": {}})

    def execute(kind, prompts, **widgets):
        clip = tiny_clip.load(kind) if isinstance(kind, str) else kind
        out = prepared.execute(clip=clip, text="\n".join(prompts), **widgets)
        return SimpleNamespace(
            **dict(zip(("conditioning", "count", "prompts", "names"), out.result, strict=True))
        )

    yield execute
    folder_paths.set_input_directory(was)


def encoded(clip, text):
    return core_nodes.run("CLIPTextEncode", clip=clip, text=text)


# kind -> prompts of each batch
SHARED = {
    "sd15": [3], "sdxl": [3], "flux": [3], "qwen_image": [3], "ltxv": [3],
    "pixart": [1, 1, 1], "z_image": [1, 1, 1],
}  # fmt: skip


@pytest.mark.parametrize("cfg", [pytest.param(1.0, marks=pytest.mark.full), 7.0])
@pytest.mark.parametrize(
    "kind", [k if k != "sd15" else pytest.param(k, marks=pytest.mark.full) for k in SHARED]
)
def test_every_picture_is_its_prompts(kind, cfg, node):
    texts = [SHORT, LONG, MIDDLE]
    out = node(kind, texts)
    assert out.count == SHARED[kind]
    assert out.prompts == texts
    clip, model = tiny_clip.load(kind), tiny_clip.model(kind)
    noise, negative = noise_of(tiny_clip.family(kind), 3), encoded(clip, "blurry")
    singles = [
        sampled(model, rows(noise, i), encoded(clip, text), negative, cfg=cfg)
        for i, text in enumerate(texts)
    ]
    start = 0
    for conditioning, count in zip(out.conditioning, out.count, strict=True):
        batch = sampled(model, noise[start : start + count], conditioning, negative, cfg=cfg)
        assert batch.shape[0] == count
        assert difference(batch, singles[start : start + count]) <= SAME
        start += count
    assert start == 3
    assert difference(torch.cat([singles[1], singles[0]]), singles[:2]) > 100 * SAME


def test_equal_lengths_share_a_batch_where_lengths_matter(node):
    out = node("z_image", ["a red fox", LONG, "a red dog", "a big red dog"], prompts_per_batch=2)
    assert out.count == [2, 1, 1]
    assert out.prompts == ["a red fox", "a red dog", LONG, "a big red dog"]
    assert [name[:3] for name in out.names] == ["001", "003", "002", "004"]
    assert [c[0][0].shape[0] for c in out.conditioning] == [2, 1, 1]


def test_t5_tokenizer_options_give_one_length(node):
    """What the summary advises for Chroma and PixArt."""
    clip = tiny_clip.load("pixart")
    assert node(clip, [SHORT, LONG, MIDDLE]).count == [1, 1, 1]
    padded = core_nodes.run("T5TokenizerOptions", clip=clip, min_padding=0, min_length=128)
    assert node(padded, [SHORT, LONG, MIDDLE]).count == [3]


def test_weights_and_clip_skip_are_the_clips(node):
    clip = core_nodes.run("CLIPSetLastLayer", clip=tiny_clip.load("sd15"), stop_at_clip_layer=-2)
    out = node(clip, [SHORT, "a red fox in the snow"])
    for row, text in enumerate(out.prompts):
        ((alone, extra),) = encoded(clip, text)
        assert torch.equal(out.conditioning[0][0][0][row], alone[0])
        assert torch.equal(
            out.conditioning[0][0][1]["pooled_output"][row], extra["pooled_output"][0]
        )
    assert not torch.equal(*out.conditioning[0][0][0])


def test_embeddings_are_read_from_the_folder(node, tmp_path):
    from safetensors.torch import save_file

    save_file({"emb_params": torch.ones(3, 768)}, tmp_path / "shape.safetensors")
    clip = tiny_clip.load("sd15")
    was = clip.tokenizer.clip_l.embedding_directory
    clip.tokenizer.clip_l.embedding_directory = [str(tmp_path)]
    try:
        out = node(clip, ["a fox, embedding:shape", "a fox"])
        ((alone, _),) = encoded(clip, "a fox, embedding:shape")
    finally:
        clip.tokenizer.clip_l.embedding_directory = was
    assert torch.equal(out.conditioning[0][0][0][0], alone[0])
    assert not torch.equal(*out.conditioning[0][0][0])


def test_file_then_text(node, tmp_path):
    (tmp_path / "list.txt").write_text("\ufeff# foxes\na red fox\n\na grey fox\n", "utf-8")
    out = node("sd15", ["a dog # with spots"], file="list.txt", first=2)
    assert out.prompts == ["a grey fox", "a dog # with spots"]
    assert out.names == ["002_a_grey_fox", "003_a_dog_with_spots"]
    assert out.count == [2]


def test_file_is_checked_and_watched(node, tmp_path):
    from slipstream.nodes.prompts import SlipstreamPromptBatch as Node

    assert Node.validate_inputs(file="none") is True
    assert Node.validate_inputs(file=None) is True
    assert "outside" in Node.validate_inputs(file="../x.txt")
    (tmp_path / "list.txt").write_text("a")
    assert Node.validate_inputs(file="list.txt") is True
    assert "list.txt" in Node.GET_SCHEMA().inputs[2].options
    before = Node.fingerprint_inputs(file="list.txt", text="b", clip=None)
    (tmp_path / "list.txt").write_text("b")
    assert Node.fingerprint_inputs(file="list.txt", text="b", clip=None) != before
    assert Node.fingerprint_inputs(text="b") == ""


@pytest.mark.parametrize(("num_prompts", "num_rows"), [(9, 4), (4, 9), (1, 3)])
def test_core_takes_the_first_rows_or_repeats_them(num_prompts, num_rows, node):
    """What happens where count is not wired to the latent: the docs say it."""
    texts = [f"a fox in the year {2000 + n}" for n in range(num_prompts)]
    out = node("sdxl", texts, prompts_per_batch=16)
    clip, model, noise = tiny_clip.load("sdxl"), tiny_clip.model("sdxl"), noise_of("sdxl", num_rows)
    negative = encoded(clip, "")
    batch = sampled(model, noise, out.conditioning[0], negative)
    singles = [
        sampled(model, noise[i : i + 1], encoded(clip, texts[i % num_prompts]), negative)
        for i in range(num_rows)
    ]
    assert difference(batch, singles) <= SAME


SIDE = "a stone bridge"


@functools.cache
def changed(name):
    """Core's own changes to CONDITIONING, by name: for a batch, and for one prompt."""
    clip = tiny_clip.load("sdxl")
    return {
        "area": lambda c: core_nodes.run(
            "ConditioningSetArea", conditioning=c, width=64, height=128, x=64, y=0, strength=1.0
        ) + encoded(clip, SIDE),
        "combine": lambda c: core_nodes.run(
            "ConditioningCombine", conditioning_1=c, conditioning_2=encoded(clip, SIDE)
        ),
        "average": lambda c: core_nodes.run(
            "ConditioningAverage", conditioning_to=c, conditioning_from=encoded(clip, SIDE),
            conditioning_to_strength=0.7,
        ),
        "range": lambda c: core_nodes.run(
            "ConditioningSetTimestepRange", conditioning=c, start=0.0, end=0.5
        ) + encoded(clip, SIDE),
        "mask": lambda c: core_nodes.run(
            "ConditioningSetMask", conditioning=c, mask=torch.eye(16)[None], strength=1.0,
            set_cond_area="default",
        ) + encoded(clip, SIDE),
    }[name]  # fmt: skip


@pytest.mark.parametrize("name", ["area", "combine", "average", "range", "mask"])
def test_what_core_does_to_conditioning_happens_to_every_row(name, node):
    texts = [SHORT, MIDDLE, "a dog"]
    change, clip, model = changed(name), tiny_clip.load("sdxl"), tiny_clip.model("sdxl")
    noise, negative = noise_of("sdxl", 3), encoded(clip, "blurry")
    batch = sampled(model, noise, change(node("sdxl", texts).conditioning[0]), negative)
    singles = [
        sampled(model, noise[i : i + 1], change(encoded(clip, text)), negative)
        for i, text in enumerate(texts)
    ]
    assert difference(batch, singles) <= SAME


@pytest.mark.parametrize("sampler", ["euler_ancestral", "dpmpp_2m", "uni_pc"])
def test_samplers(sampler, node):
    """Ancestral noise is drawn for the whole batch: rows are compared within one batch size."""
    texts = [SHORT, LONG, MIDDLE]
    clip, model, noise = tiny_clip.load("sdxl"), tiny_clip.model("sdxl"), noise_of("sdxl", 3)
    negative = encoded(clip, "blurry")
    batch = sampled(
        model, noise, node("sdxl", texts).conditioning[0], negative, sampler=sampler, steps=3
    )
    for index, text in enumerate(texts):  # one prompt for all rows; the row of it must be the same
        same = sampled(model, noise, encoded(clip, text), negative, sampler=sampler, steps=3)
        found = (batch[index] - same[index]).abs().max() / same[index].abs().max()
        assert found <= 10 * SAME


def attention(model):
    from slipstream.backends.attention.apply import apply_attention
    from slipstream.backends.attention.config import AttentionConfig

    config = AttentionConfig(policy="manual", backend="math", min_tokens=0, strict=True)
    return apply_attention(model, config)


def cache(model):
    from slipstream.backends.cache.apply import apply_cache
    from slipstream.backends.cache.config import CacheConfig

    config = CacheConfig.from_ratio(0.8, strategy="scm", engine="builtin")  # reuses by schedule
    return apply_cache(model, config.with_(front_blocks=1))


def parallel(model):
    from slipstream.parallel.apply import apply_parallel
    from slipstream.parallel.config import SequenceParallelConfig

    return apply_parallel(model, SequenceParallelConfig(workers=2, devices="cpu,cpu"))


@pytest.fixture(scope="module")
def no_workers_left():
    from slipstream.parallel.apply import pool

    yield
    pool().close()


@pytest.mark.parametrize("technique", [attention, cache, parallel], ids=lambda one: one.__name__)
def test_slipstream_nodes_sample_every_row(technique, node, no_workers_left):
    """A masked batch: each row is what its prompt gives under the same technique."""
    texts = [SHORT, "a lighthouse, " + "very " * 150 + "tall", MIDDLE]
    out, clip = node("ltxv", texts), tiny_clip.load("ltxv")
    ((_, extra),) = out.conditioning[0]
    assert len(set(extra["attention_mask"].sum(1).tolist())) == 3
    model, noise = tiny.load("ltxv", heads=2), noise_of("ltxv", 3)
    negative = encoded(clip, "blurry")
    batch = sampled(technique(model), noise, out.conditioning[0], negative, steps=6)
    alone = technique(model) if technique is cache else model
    singles = [
        sampled(alone, noise[i : i + 1], encoded(clip, text), negative, steps=6)
        for i, text in enumerate(texts)
    ]
    assert difference(batch, singles) <= SAME
    if technique is cache:
        plain = sampled(model, noise, out.conditioning[0], negative, steps=6)
        assert not torch.equal(plain, batch), "nothing was reused"
