"""Every architecture file against the real ComfyUI class: signatures, one watched model call."""

import functools
import importlib
import pkgutil
from dataclasses import replace
from unittest import mock

import architecture_guard as guard
import pytest
import tiny
import torch
from architecture_recording import record
from slipstream.backends.architectures import (
    ARCHITECTURES,
    JOIN_CAT,
    Binding,
    Carry,
    called_modules,
    drift,
    find,
    stack_blocks,
    whole_sequence,
)

pytestmark = pytest.mark.usefixtures("comfy")

# Watched by tests of their own: one adds to the stream only with a face video, one has no stack.
SPECIAL = ("wan_animate", "wan_animate2")
# ComfyUI's subclasses of a listed class that no tiny model stands for, and why that is safe.
UNWATCHED = {
    "Anima",  # inherits _forward; its text adapter is 1,024 wide whatever the config says
    "ControlNetFlux",  # a ControlNet: never the network of a MODEL
    "QwenImageControlNetModel",
    "ControlledUnetModel",
}


@functools.cache
def watched(family):
    """(architecture, network, recording of one call) of a tiny model."""
    # SD3 has as many blocks as heads
    patcher = tiny.load(family, heads=3 if family.startswith("sd3") else 1)
    network = patcher.model.diffusion_model
    architecture = find(network)
    assert architecture is not None, f"{type(network).__name__} is in no architecture file"
    positive = None
    if family == "ltxav":  # a raw prompt, so that the text connectors run too
        positive = [[torch.randn(1, 8, 64), {}]]
    return architecture, network, record(patcher, family, architecture, positive)


@pytest.mark.parametrize("family", [name for name in tiny.ALL if name not in SPECIAL])
def test_claims_hold(family):
    architecture, network, recording = watched(family)
    assert drift(architecture, network) == []
    assert recording.visits
    assert guard.mismatches(architecture, recording) == []


def test_every_architecture_is_watched():
    assert {watched(family)[0].class_name for family in tiny.ALL} == set(ARCHITECTURES)


def test_animate_adds_between_blocks():
    """Its face encoder is replaced: only the host's own loop and adapters are of interest."""
    patcher = tiny.load("wan_animate")
    network = patcher.model.diffusion_model
    architecture = find(network)
    positive = tiny.text("wan_animate")
    positive[0][1]["face_video_pixels"] = torch.zeros(1, 3, 5, 8, 8)

    def motion(pixels):
        return torch.ones(len(pixels), 512)

    with mock.patch.object(network.motion_encoder, "get_motion", motion):
        recording = record(patcher, "wan_animate", architecture, positive)
    assert drift(architecture, network) == []
    assert guard.mismatches(architecture, recording) == []
    without = replace(architecture, notes=replace(architecture.notes, adds_between=False))
    assert any("did not get what came before" in s for s in guard.mismatches(without, recording))


def test_animate2_never_calls_its_blocks():
    patcher = tiny.load("wan_animate2")
    architecture = find(patcher.model.diffusion_model)
    assert architecture.stacks == ()
    as_wan = replace(architecture, stacks=ARCHITECTURES["SCAILWanModel"].stacks)
    recording = record(patcher, "wan_animate2", as_wan)
    assert recording.num_override > 0
    assert recording.visits == []


@pytest.mark.parametrize("family", [name for name in tiny.ALL if name not in SPECIAL])
def test_every_call_runs_the_whole_sequence(family):
    """A host that keeps keys and values of the prompt runs fewer tokens in later calls."""
    patcher = tiny.load(family, heads=3 if family.startswith("sd3") else 1)
    architecture = find(patcher.model.diffusion_model)
    as_is = first_shapes(patcher, family, architecture)
    if family != "hidream_o1_edit":  # pictures are new tensors in every call, so nothing is kept
        assert (len(set(as_is)) > 1) == bool(architecture.notes.whole_sequence)
    options = patcher.model_options["transformer_options"]
    patcher.model_options["transformer_options"] = whole_sequence(architecture, options)
    assert len(set(first_shapes(patcher, family, architecture))) == 1


def first_shapes(patcher, family, architecture):
    """Shapes of the streams that enter the first block, call by call."""
    stack = architecture.stacks[0]
    block = stack_blocks(patcher.model.diffusion_model, stack)[0]
    module = called_modules(block, stack)[0]
    binding, shapes = Binding(module, stack.carry), []
    handle = module.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(x.shape for x in binding.read(args, kwargs))),
        with_kwargs=True,
    )
    try:
        tiny.sample(patcher, family, steps=3, cfg=1.0)
    finally:
        handle.remove()
    return shapes


def test_unet_levels_are_never_called():
    patcher = tiny.load("sdxl")
    architecture = find(patcher.model.diffusion_model)
    levels = tuple(replace(stack, children=False) for stack in architecture.stacks)
    recording = record(patcher, "sdxl", replace(architecture, stacks=levels))
    assert recording.num_override > 0
    assert recording.visits == []


def test_varying_attention_calls_vary():
    """attention_calls=None is for stacks of which two blocks, or two models, differ."""
    counts = {}
    for family in tiny.ALL:
        architecture, _, recording = watched(family)
        for stack in architecture.stacks:
            if stack.attention_calls is None:
                found = guard.attention_counts(stack, recording).values()
                counts.setdefault((architecture.class_name, stack.blocks), set()).update(found)
    humo = ARCHITECTURES["HumoWanModel"]
    silent = tiny.text("wan_humo")
    del silent[0][1]["audio_embed"]
    recording = record(tiny.load("wan_humo"), "wan_humo", humo, silent)
    counts["HumoWanModel", "blocks"].update(
        guard.attention_counts(humo.stacks[0], recording).values()
    )
    causal = counts.pop(("CausalWanModel", "blocks"))  # as WanModel, whose two kinds it can load
    assert causal < counts["WanModel", "blocks"]
    middle = counts.pop(("UNetModel", "middle_block"))  # one block: it varies between the models
    assert middle == {2, 4}
    assert {key: found for key, found in counts.items() if len(found) < 2} == {}


def test_subclasses_are_known():
    """A new subclass in ComfyUI may have a loop of its own: watch it before `find` accepts it."""
    found = {type(watched(family)[1]).__name__ for family in tiny.ALL}
    new = {
        f"{cls.__module__}.{cls.__name__}"
        for cls in _network_classes()
        if cls.__name__ not in found | UNWATCHED
        and any(base.__name__ in ARCHITECTURES for base in cls.__mro__[1:])
        and find(cls.__new__(cls)) is not None
    }
    # SD3 and the base of Ideogram 4 are listed by the class ComfyUI builds
    assert new == set()


def test_anima_inherits_the_loop():
    from comfy.ldm.anima.model import Anima
    from comfy.ldm.cosmos.predict2 import MiniTrainDIT

    assert Anima._forward is MiniTrainDIT._forward
    assert find(Anima.__new__(Anima)) is ARCHITECTURES["MiniTrainDIT"]


def _network_classes():
    import comfy.ldm
    import comfy.model_base  # imports every network that a MODEL can hold

    loaded = {
        name
        for _, name, _ in pkgutil.walk_packages(comfy.ldm.__path__, "comfy.ldm.")
        if name in importlib.sys.modules
    }
    for name in loaded:
        for cls in vars(importlib.sys.modules[name]).values():
            if isinstance(cls, type) and cls.__module__ == name:
                yield cls


def notes(**changes):
    return lambda a: replace(a, notes=replace(a.notes, **changes))


def stack(index, **changes):
    def change(architecture):
        stacks = list(architecture.stacks)
        stacks[index] = replace(stacks[index], **changes)
        return replace(architecture, stacks=tuple(stacks))

    return change


def carry(index, **changes):
    return lambda a: stack(index, carry=replace(a.stacks[index].carry, **changes))(a)


WRONG = [
    # family, a wrong file made from the right one, what must be said about it
    ("flux", stack(0, blocks="double_block"), "has no 'double_block'"),
    ("flux", lambda a: replace(a, class_name="Flax"), "Flax is not a class of Flux"),
    (
        "flux",
        lambda a: replace(a, stacks=a.stacks[:1]),
        "'single_blocks' has attention and is in no stack",
    ),
    ("flux", lambda a: replace(a, stacks=a.stacks[::-1]), "joins 'txt,img', but before it run []"),
    ("flux", stack(0, block_type="triple"), "has the id ('double', 0)"),
    ("flux", stack(1, block_type="double"), "two stacks share a block_type"),
    ("flux", stack(0, attention_calls=2), "made 1 attention calls, claimed 2"),
    ("flux", stack(1, joins="img,txt"), "did not get what came before"),
    ("flux", stack(1, joins="img,text"), "joins 'img,text', but before it run"),
    ("flux", carry(0, args=("img", "text")), "forward has no 'text'"),
    ("flux", carry(0, args=("txt", "img")), "took (1, 8, 128) for img"),
    ("flux", carry(0, args=("img", "vec")), "for txt and returned"),
    ("flux", carry(0, args=("img",)), "1 args for 2 streams"),
    ("flux", carry(0, args=("img", "attn_mask")), "got no tensor for each of ('img', 'txt')"),
    ("flux", carry(0, dropped=("txt",)), "returned a tensor for txt"),
    ("flux", carry(0, tails=("txt",)), "did not get what came before"),
    ("flux", notes(adds_between=True), "adds_between is True, but"),
    ("flux", notes(in_place=False), "notes.in_place is False"),
    ("flux", notes(block_ids=False), "claimed ('double', None)"),
    ("flux", notes(prefetches=True), "notes.prefetches is True"),
    ("flux", notes(unet=True), "notes.unet is True"),
    ("flux", notes(diffusion_model_wrappers=False), "notes.diffusion_model_wrappers is False"),
    ("flux", notes(reaches_override=False), "notes.reaches_override is False"),
    ("qwen_image", carry(0, returns=("img", "txt")), "for img and returned"),
    (
        "qwen_image",
        carry(0, returns=("img",), streams=("img",), args=("hidden_states",)),
        "returned 2 values, claimed ('img',)",
    ),
    ("qwen_image", notes(in_place=True), "notes.in_place is True"),
    ("wan", carry(0, args=("e",)), "for x and returned"),
    ("wan_vace", notes(adds_between=False), "did not get what came before"),
    ("wan_vace", lambda a: replace(a, side=()), "'vace_blocks' has attention"),
    (
        "wan_vace",
        lambda a: replace(a, side=(replace(a.side[0], carry=Carry(args=("c",))),)),
        "returned 2 values, claimed ('x',)",
    ),
    ("sd35", carry(0, dropped=()), "returned None for txt"),
    ("sd35", carry(0, returns=("img", "txt")), "for txt and returned"),
    ("sd35", notes(diffusion_model_wrappers=True), "diffusion_model_wrappers is True"),
    ("sd35", notes(block_ids=True), "claimed (None, 0)"),
    ("hidream", carry(0, tails=()), "did not get what came before"),
    ("hidream", stack(1, joins=JOIN_CAT), "did not get what came before"),
    ("hidream_o1", stack(0, bypasses=0), "that do not reach the override, claimed 0"),
    (
        "hidream_o1",
        notes(options_through="transformer_options"),
        "forward takes no transformer_options",
    ),
    ("ltxav", carry(0, packed=False, args=("x", "v_context")), "got no tensor"),
    ("ltxav", notes(prefetches=False), "notes.prefetches is False"),
    ("cosmos_predict2", notes(block_types=True), "claimed ('double', 0)"),
    ("ernie", notes(reaches_override=True), "notes.reaches_override is True"),
    ("sd15", lambda a: replace(a, stacks=a.stacks[::-1]), "blocks ran in the order"),
    ("sd15", stack(2, joins=""), "did not get what came before"),
    ("sd15", stack(0, children=False), "blocks ran in the order"),
    ("sd15", stack(0, block_type="down"), "has the id ('input', 1)"),
    ("lumina2", lambda a: replace(a, side=a.side[1:]), "'context_refiner' has attention"),
    (
        "omnigen2",
        lambda a: replace(a, side=(*a.side, replace(a.side[0], blocks="siglip", block_type="s"))),
        "has no 'siglip'",
    ),
]


@pytest.mark.parametrize(("family", "change", "sentence"), WRONG)
def test_a_wrong_claim_is_reported(family, change, sentence):
    architecture, network, recording = watched(family)
    wrong = change(architecture)
    said = drift(wrong, network) or guard.mismatches(wrong, recording)
    assert any(sentence in s for s in said), said
