"""Constant conditioning, tiny models without a file, and a digest of a latent."""

import functools
import hashlib
import importlib
import sys
from pathlib import Path
from types import ModuleType

import torch
from comfy_api.latest import ComfyExtension, io, ui

CATEGORY = "slipstream/testing"
TESTS = Path(__file__).resolve().parents[1]


@functools.cache
def neighbour(name: str) -> ModuleType:
    """A module of tests/. The folder is on sys.path for the import only."""
    sys.path.insert(0, str(TESTS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(TESTS))


def tiny() -> ModuleType:
    return neighbour("tiny")


class SlipstreamTestConditioning(io.ComfyNode):
    """Seeded random text: saves every server test a random CLIP-L of 246 MB."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SlipstreamTestConditioning",
            display_name="Test Conditioning",
            category=CATEGORY,
            is_dev_only=True,
            inputs=[
                io.Int.Input("tokens", default=8, min=1, max=1024),
                io.Int.Input("dim", default=768, min=1, max=16384),
                io.Int.Input("seed", default=0, min=0, max=2**31),
            ],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(cls, tokens: int, dim: int, seed: int) -> io.NodeOutput:
        generator = torch.Generator().manual_seed(seed)
        pooled = torch.randn(1, 768, generator=generator)
        text = torch.randn(1, tokens, dim, generator=generator)
        return io.NodeOutput([[text, {"pooled_output": pooled}]])


class SlipstreamTestClip(io.ComfyNode):
    """A tiny text encoder with ComfyUI's real tokenizer."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SlipstreamTestClip",
            display_name="Test CLIP",
            category=CATEGORY,
            is_dev_only=True,
            inputs=[io.Combo.Input("kind", options=["flux", "sd15", "sdxl"])],
            outputs=[io.Clip.Output()],
        )

    @classmethod
    def execute(cls, kind: str) -> io.NodeOutput:
        return io.NodeOutput(neighbour("tiny_clip").load(kind))


class DemoClip:
    """Encodes a prompt as the class of the demo model that it names, such as "a red heart"."""

    tokenizer = None

    def tokenize(self, text: str) -> str:
        classes = set(self._node().GET_SCHEMA().inputs[0].options)
        return next(word for word in text.split() if word in classes)

    def encode_from_tokens_scheduled(self, tokens: str, show_pbar: bool = True) -> list:
        return self._node().execute(tokens).result[0]

    def _node(self):
        import nodes

        return nodes.NODE_CLASS_MAPPINGS["SlipstreamDemoClass"]


class SlipstreamTestDemoClip(io.ComfyNode):
    """For pictures of workflows, with the demo pack beside this one."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SlipstreamTestDemoClip",
            display_name="Test Demo CLIP",
            category=CATEGORY,
            is_dev_only=True,
            outputs=[io.Clip.Output()],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(DemoClip())


class SlipstreamTestModel(io.ComfyNode):
    """A tiny model, for families whose detection accepts no small file too."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        families = sorted((*tiny().FAMILIES, *tiny().IN_MEMORY))
        return io.Schema(
            node_id="SlipstreamTestModel",
            display_name="Test Model",
            category=CATEGORY,
            is_dev_only=True,
            inputs=[
                io.Combo.Input("family", options=families),
                io.Int.Input("heads", default=1, min=1, max=16),
                io.Int.Input("seed", default=0, min=0, max=2**31),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, family: str, heads: int, seed: int) -> io.NodeOutput:
        return io.NodeOutput(tiny().load(family, heads=heads, seed=seed))


class SlipstreamTestDigest(io.ComfyNode):
    """What a latent is, bit for bit: equality over the API without downloading files."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SlipstreamTestDigest",
            display_name="Test Digest",
            category=CATEGORY,
            is_dev_only=True,
            is_output_node=True,
            inputs=[io.Latent.Input("samples")],
            outputs=[io.String.Output()],
        )

    @classmethod
    def execute(cls, samples: dict) -> io.NodeOutput:
        latent = samples["samples"]
        parts = latent.unbind() if latent.is_nested else [latent]
        whole = hashlib.sha256()
        for part in parts:
            whole.update(part.detach().float().cpu().contiguous().numpy().tobytes())
        text = (
            f"{whole.hexdigest()[:16]} shape={[tuple(part.shape) for part in parts]} "
            f"finite={all(bool(torch.isfinite(part).all()) for part in parts)} "
            f"std={parts[0].std():.4f}"
        )
        return io.NodeOutput(text, ui=ui.PreviewText(text))


class SlipstreamTestFault(io.ComfyNode):
    """Raises in the last block of the network in this process, at the given call of it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SlipstreamTestFault",
            display_name="Test Fault",
            category=CATEGORY,
            is_dev_only=True,
            inputs=[io.Model.Input("model"), io.Int.Input("call", default=1, min=0, max=1000)],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model, call: int) -> io.NodeOutput:
        patched, calls = model.clone(), []

        def fail(module, args):
            calls.append(1)
            if len(calls) > call:
                raise RuntimeError(f"test fault in call {call}")

        def around(executor, *args, **kwargs):
            network = patched.model.diffusion_model
            lists = [m for m in network.children() if isinstance(m, torch.nn.ModuleList)]
            handle = lists[-1][-1].register_forward_pre_hook(fail)
            try:
                return executor(*args, **kwargs)
            finally:
                handle.remove()

        patched.add_wrapper_with_key("outer_sample", "slipstream_test_fault", around)
        return io.NodeOutput(patched)


class TestPackExtension(ComfyExtension):
    """The nodes above."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            SlipstreamTestConditioning,
            SlipstreamTestDigest,
            SlipstreamTestFault,
            SlipstreamTestClip,
            SlipstreamTestDemoClip,
            SlipstreamTestModel,
        ]
