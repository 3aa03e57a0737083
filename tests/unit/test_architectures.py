"""The vocabulary of architectures, without ComfyUI: lookup, bindings, drift on dummy networks."""

from dataclasses import replace

import pytest
import torch
from comfy_home import PACK_ROOT
from slipstream.backends.architectures import (
    ARCHITECTURES,
    Architecture,
    Binding,
    Carry,
    Notes,
    Stack,
    called_modules,
    drift,
    find,
    inconsistencies,
    stack_blocks,
    whole_sequence,
)


class Attention(torch.nn.Module):
    def forward(self, x, transformer_options):
        return x


class Dual(torch.nn.Module):
    """Returns text first, as Qwen-Image does."""

    def forward(self, img, txt, vec=None, transformer_options=None):
        return txt + 1, img + 2


class Single(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = Attention()

    def forward(self, x, vec, transformer_options):
        return x * 2


class Variadic(torch.nn.Module):
    def forward(self, *args, **kwargs):
        return args


class Pair(torch.nn.Module):
    def forward(self, x, vec=None, transformer_options=None):
        return x[0] + 1, x[1] + 2


class DummyNet(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.double_blocks = torch.nn.ModuleList([Dual(), Dual()])
        self.single_blocks = torch.nn.ModuleList([Single()])
        self.absent = None
        self.levels = torch.nn.Sequential(Single(), torch.nn.Conv2d(1, 1, 1))


DUAL = Carry(streams=("img", "txt"), args=("img", "txt"), returns=("txt", "img"))
DUMMY = Architecture(
    class_name="DummyNet",
    name="Dummy",
    stacks=(
        Stack(blocks="double_blocks", block_type="double", carry=DUAL),
        Stack(blocks="single_blocks", block_type="single", joins="txt,img"),
    ),
)


def named(class_name, module, base=object):
    return type(class_name, (base,), {"__module__": module})()


def test_find_by_class_and_base():
    wan = named("WanModel", "comfy.ldm.wan.model")
    camera = named("CameraWanModel", "comfy.ldm.wan.model", type(wan))
    assert find(wan) is find(camera) is ARCHITECTURES["WanModel"]
    own = named("VaceWanModel", "comfy.ldm.wan.model", type(wan))
    assert find(own) is ARCHITECTURES["VaceWanModel"]
    patched = named("PatchedWan", "some_pack.wan", type(wan))
    assert find(patched) is ARCHITECTURES["WanModel"]


def test_find_knows_only_comfyui_classes():
    assert find(named("WanModel", "some_pack.wan")) is None
    assert find(object()) is None
    aura = named("MMDiT", "comfy.ldm.aura.mmdit")
    sd3_base = named("MMDiT", "comfy.ldm.modules.diffusionmodules.mmdit")
    assert find(aura) is ARCHITECTURES["MMDiT"]
    assert find(sd3_base) is None


def test_the_table_is_consistent():
    assert len(ARCHITECTURES) > 30
    assert {name: list(inconsistencies(a)) for name, a in ARCHITECTURES.items()} == {
        name: [] for name in ARCHITECTURES
    }


def test_stack_blocks_and_called_modules():
    network = DummyNet()
    blocks = Stack(blocks="double_blocks", block_type="double")
    assert stack_blocks(network, blocks) == list(network.double_blocks)
    assert stack_blocks(network, Stack(blocks="absent", block_type="x")) == []
    network.named = torch.nn.ModuleDict({"block0": Single(), "block1": Single()})
    assert stack_blocks(network, Stack(blocks="named", block_type="x")) == [*network.named.values()]
    assert called_modules(network.double_blocks[0], blocks) == [network.double_blocks[0]]
    levels = Stack(blocks="levels", block_type="input", children=True)
    assert stack_blocks(network, levels) == [network.levels]
    assert called_modules(network.levels, levels) == list(network.levels)
    with pytest.raises(AttributeError):
        stack_blocks(network, Stack(blocks="missing.blocks", block_type="x"))


@pytest.mark.parametrize("num_positional", [0, 1, 2, 3])
def test_binding_reads_and_writes_by_position_or_keyword(num_positional):
    img, txt, vec = torch.zeros(2), torch.ones(3), torch.ones(1)
    values = {"img": img, "txt": txt, "vec": vec}
    args = tuple(values.values())[:num_positional]
    kwargs = dict(list(values.items())[num_positional:])
    binding = Binding(Dual(), DUAL)
    assert binding.read(args, kwargs) == (img, txt)
    new_img, new_txt = torch.full((2,), 5.0), torch.full((3,), 6.0)
    new_args, new_kwargs = binding.write(args, kwargs, (new_img, new_txt))
    result = Dual()(*new_args, **new_kwargs)
    assert torch.equal(result[0], new_txt + 1)
    assert torch.equal(result[1], new_img + 2)
    assert (len(new_args), set(new_kwargs)) == (len(args), set(kwargs))
    assert binding.read(args, kwargs) == (img, txt)  # the given call did not change


def test_binding_orders_outputs_as_streams():
    binding = Binding(Dual(), DUAL)
    img, txt = torch.zeros(2), torch.ones(3)
    assert binding.outputs((txt, img)) == (img, txt)
    assert binding.result((img, txt)) == (txt, img)
    single = Binding(Single(), Carry())
    assert single.outputs(img) == (img,)
    assert single.result((img,)) is img


def test_binding_of_other_conventions():
    img, txt = torch.zeros(2), torch.ones(3)
    packed = Carry(streams=("v", "a"), args=("x",), returns=("v", "a"), packed=True)
    binding = Binding(Pair(), packed)
    assert binding.read(((img, txt),), {}) == (img, txt)
    assert binding.write((), {"x": (img, txt)}, (txt, img)) == ((), {"x": (txt, img)})

    positional = Carry(streams=("txt", "img"), args=("context", "x"), returns=("txt", "img"))
    assert Binding(Variadic(), positional).read((txt, img), {"c": 0}) == (txt, img)

    first = Binding(torch.nn.Conv2d(1, 1, 1), Carry(args=("",)))
    assert first.read((img,), {}) == (img,)
    assert first.write((img, 7), {}, (txt,)) == ((txt, 7), {})

    extra = Binding(Dual(), Carry(streams=("img",), args=("img",), returns=("skip", "img")))
    assert extra.outputs((txt, img)) == (img,)
    with pytest.raises(ValueError, match="also returns skip, img"):
        extra.result((img,))


def test_a_block_that_is_left_out_returns_nothing_for_what_nobody_reads():
    img, txt = torch.zeros(2), torch.ones(3)
    carry = Carry(streams=("img",), args=("img",), returns=("img", "kv"), ignored=("kv",))
    assert Binding(Dual(), carry).result((img,)) == (img, None)
    assert Binding(Dual(), carry).outputs((img, txt)) == (img,)


def test_options_of_the_whole_sequence_are_merged_into_those_of_the_call():
    kept = {"patches_replace": {"dit": {"ours": None}, "new": {}}, "cache": {"device": "off"}}
    keeping = replace(DUMMY, notes=Notes(whole_sequence=kept))
    options = {"sigmas": 1, "patches_replace": {"dit": {("double_block", 0): len}}}
    assert whole_sequence(keeping, options) == {
        "sigmas": 1,
        "patches_replace": {"dit": {("double_block", 0): len, "ours": None}, "new": {}},
        "cache": {"device": "off"},
    }
    assert options == {"sigmas": 1, "patches_replace": {"dit": {("double_block", 0): len}}}
    assert whole_sequence(None, options) == whole_sequence(DUMMY, options) == options


def test_binding_sees_through_a_replaced_forward():
    block = Dual()
    block.forward = lambda *args, **kwargs: None
    assert Binding(block, DUAL).positions == {"img": 0, "txt": 1}
    with pytest.raises(ValueError, match=r"forward has no 'image' \(it takes img, txt, vec"):
        Binding(block, replace(DUAL, args=("image", "txt")))


def test_drift_finds_nothing_on_a_true_file():
    assert drift(DUMMY, DummyNet()) == []


def stacks(*changed):
    return replace(DUMMY, stacks=changed)


DOUBLE, SINGLE = DUMMY.stacks


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (replace(DUMMY, class_name="Other"), "Other is not a class of DummyNet"),
        (stacks(DOUBLE), "'single_blocks' has attention and is in no stack"),
        (stacks(replace(DOUBLE, blocks="blocks"), SINGLE), "DummyNet has no 'blocks'"),
        (stacks(DOUBLE, replace(SINGLE, carry=Carry(args=("h",)))), "forward has no 'h'"),
        (stacks(SINGLE, DOUBLE), "single_blocks joins 'txt,img', but before it run []"),
        (stacks(DOUBLE, replace(SINGLE, block_type="double")), "two stacks share a block_type"),
        (
            stacks(replace(DOUBLE, carry=replace(DUAL, args=("img",))), SINGLE),
            "double_blocks: 1 args for 2 streams",
        ),
        (
            stacks(replace(DOUBLE, carry=replace(DUAL, returns=("img",))), SINGLE),
            "a stream is not among the returns",
        ),
        (
            stacks(replace(DOUBLE, carry=replace(DUAL, dropped=("audio",))), SINGLE),
            "tails and dropped must be streams",
        ),
        (
            stacks(replace(DOUBLE, carry=replace(DUAL, ignored=("img",))), SINGLE),
            "what is ignored must be returned, and be no stream",
        ),
        (replace(DUMMY, side=(replace(SINGLE, block_type="s"),)), "which joins nothing"),
    ],
)
def test_drift_reports(wrong, sentence):
    assert any(sentence in found for found in drift(wrong, DummyNet()))


def test_drift_reports_blocks_that_cannot_reach_the_override():
    levels = Stack(blocks="levels", block_type="input", carry=Carry(args=("",)), children=True)
    wrong = stacks(DOUBLE, SINGLE, levels)
    assert any("forward takes no transformer_options" in s for s in drift(wrong, DummyNet()))
    silent = replace(wrong, notes=Notes(reaches_override=False))
    assert drift(silent, DummyNet()) == []


def test_the_guide_shows_the_real_file():
    guide = (PACK_ROOT / "docs" / "adding-an-architecture.md").read_text()
    example = (PACK_ROOT / "backends" / "architectures" / "aura_flow.py").read_text()
    tiny = (PACK_ROOT / "tests" / "tiny_more.py").read_text()
    blocks = [block.partition("\n")[2] for block in guide.split("```python")[1:]]
    facts, model, plan = (block.partition("```")[0] for block in blocks)
    assert facts == example
    assert model in tiny
    assert plan in (PACK_ROOT / "backends" / "architectures" / "plans_image.py").read_text()
    assert len(facts.splitlines()) + 2 + len(model.splitlines()) < 40
