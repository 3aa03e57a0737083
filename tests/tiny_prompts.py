"""Our example workflows on the tiny models: the same graph, with loaders and sizes replaced.

What ComfyUI's own nodes need real files for is cut out: prompts become random conditioning, and
where no tiny VAE exists the graph ends at the latent.
"""

import copy
from typing import Any

Prompt = dict[str, dict[str, Any]]

MODELS = {
    "flux1-dev.safetensors": "flux",
    "wan2.1_t2v_1.3B_fp16.safetensors": "wan",
    "wan2.1_t2v_14B_fp8_scaled.safetensors": "wan",
    "svdq-int4_r32-flux.1-dev.safetensors": "flux_svdquant",
}
VAES = {"ae.safetensors": "taef1"}
TEXT_ENCODERS = {"CLIPLoader", "DualCLIPLoader", "SlipstreamSVDQuantCLIPLoader"}
TINY_CLIPS = {"flux"}
SIZES = {"width": 128, "height": 128, "length": 5}


def on_tiny_models(prompt: Prompt, *, seed: int, steps: int = 4) -> Prompt:
    """`prompt` as it runs on tests/server's models folder; raises KeyError for an unknown file."""
    tiny = copy.deepcopy(prompt)
    for node_id, node in tiny.items():
        kind, inputs = node["class_type"], node["inputs"]
        if kind == "UNETLoader":
            inputs["unet_name"] = f"tiny_{MODELS[inputs['unet_name']]}.safetensors"
        elif kind.startswith("SlipstreamSVDQuant") and "model_name" in inputs:
            inputs["model_name"] = f"tiny_{MODELS[inputs['model_name']]}.safetensors"
        elif kind == "CLIPTextEncode":
            node["class_type"] = "SlipstreamTestConditioning"
            node["inputs"] = {"tokens": 8, "dim": 768, "seed": int(node_id)}
        elif kind == "DualCLIPLoader" and inputs["type"] in TINY_CLIPS and _batches(tiny):
            node["class_type"], node["inputs"] = "SlipstreamTestClip", {"kind": inputs["type"]}
        elif kind == "KSampler":
            inputs.update(seed=seed, steps=steps)
        elif kind.startswith("Empty"):
            inputs.update({name: size for name, size in SIZES.items() if name in inputs})
        elif kind == "VAELoader" and inputs["vae_name"] in VAES:
            inputs["vae_name"] = VAES[inputs["vae_name"]]
    absent = {i for i, n in tiny.items() if _needs_a_real_file(n)}
    while following := {i for i, n in tiny.items() if i not in absent and absent & _sources(n)}:
        absent |= following
    return {i: n for i, n in tiny.items() if i not in absent}


def _batches(prompt: Prompt) -> bool:
    """Whether the prompt has our own text encoding, which runs on a tiny text encoder."""
    return any(node["class_type"] == "SlipstreamPromptBatch" for node in prompt.values())


def _needs_a_real_file(node: dict[str, Any]) -> bool:
    if node["class_type"] in TEXT_ENCODERS:
        return True
    return node["class_type"] == "VAELoader" and node["inputs"]["vae_name"] not in VAES.values()


def _sources(node: dict[str, Any]) -> set[str]:
    return {value[0] for value in node["inputs"].values() if isinstance(value, list)}
