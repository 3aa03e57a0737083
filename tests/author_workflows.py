"""Makes workflows/*.json and their .jpg from the API twins, through ComfyUI's own frontend.

    python tests/author_workflows.py [NAME ...]

Needs a ComfyUI, chromium and playwright-core. tests/browser/layouts/<NAME>.json has the places of
the nodes, the notes and the links to model files. The picture shows the graph with the outputs of
a real run on a CPU: on the trained demo model if the layout's "draws" names one of its classes,
else on tiny random models, whose colours mean nothing.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import browser_home
import browser_page
import comfy_home
from PIL import Image
from tiny_prompts import on_tiny_models

comfy_home.load_pack()
comfy_home.in_process()

import isolated_server  # noqa: E402
import queue_client  # noqa: E402
import svdquant_models  # noqa: E402
import tiny  # noqa: E402
from slipstream.bench import demo, demo_models, draw  # noqa: E402

WORKFLOWS = comfy_home.PACK_ROOT / "workflows"
LAYOUTS = browser_home.FOLDER / "layouts"
STEPS = 20  # of the run in the picture, unless the layout says "steps"
PICTURE_SIZE = (1200, 1200)  # at most; the template browser shows squares
FILE_INPUTS = {"model_name", "unet_name", "clip_name", "clip_name1", "clip_name2", "vae_name"}


def on_trained_model(prompt: dict[str, Any], class_name: str) -> dict[str, Any]:
    """A prompt that `on_tiny_models` made of a Flux one, on the demo model: draws `class_name`."""
    for node_id, node in prompt.items():
        kind, inputs = node["class_type"], node["inputs"]
        if kind == "UNETLoader":
            inputs["unet_name"] = demo_models.FLUX
        elif kind == "VAELoader":
            inputs["vae_name"] = demo_models.VAE
        elif kind == "SlipstreamTestConditioning":
            prompt[node_id] = _class_node(class_name)
        elif kind == "SlipstreamTestClip":  # draws what the prompts name
            prompt[node_id] = {"class_type": "SlipstreamTestDemoClip", "inputs": {}}
        elif kind == "ConditioningZeroOut":
            prompt[node_id] = _class_node("none")
        elif kind.startswith("Empty"):
            inputs.update(width=draw.SIZE, height=draw.SIZE)
        elif kind == "KSampler":
            inputs["cfg"] = 3.0
    return prompt


def _class_node(class_name: str) -> dict[str, Any]:
    return {"class_type": "SlipstreamDemoClass", "inputs": {"class_name": class_name}}


def write_models(folder: Path, twins: list[dict[str, Any]]) -> None:
    """Demo and tiny models, and empty files under every name in `twins`: no node looks broken."""
    root = comfy_home.find()
    assert root is not None
    demo_models.write(root, folder)
    for family in ("flux", "wan"):
        tiny.write(folder / "diffusion_models", family)
    svdquant_models.write_tiny(folder / "diffusion_models")
    tiny.write_preview_vae(folder / "vae_approx", "taef1", latent_channels=16)
    inputs = [(n, v) for t in twins for node in t.values() for n, v in node["inputs"].items()]
    for name, value in inputs:
        if name in FILE_INPUTS:
            models = "diffusion_models"
            places = {"unet_name": models, "model_name": models, "vae_name": "vae"}
            place = places.get(name, "text_encoders")
            (folder / place).mkdir(parents=True, exist_ok=True)
            (folder / place / value).touch()


def author(server: isolated_server.Server, name: str, folder: Path) -> None:
    """workflows/<name>.json and .jpg."""
    twin = WORKFLOWS / "api" / f"{name}.json"
    layout = json.loads((LAYOUTS / f"{name}.json").read_text())
    prompt = on_tiny_models(json.loads(twin.read_text()), seed=42, steps=layout.get("steps", STEPS))
    if "draws" in layout:
        prompt = on_trained_model(prompt, layout["draws"])
    outputs, picture = folder / "outputs.json", folder / "picture.png"
    outputs.write_text(json.dumps(queue_client.run(server, prompt).outputs))
    browser_page.run_script(
        "author.mjs",
        server.port,
        twin,
        LAYOUTS / f"{name}.json",
        outputs,
        WORKFLOWS / f"{name}.json",
        picture,
    )
    shrunk = Image.open(picture).convert("RGB")
    shrunk.thumbnail(PICTURE_SIZE, Image.Resampling.LANCZOS)
    shrunk.save(WORKFLOWS / f"{name}.jpg", quality=85, optimize=True)


def main(names: list[str]) -> None:
    names = names or sorted(path.stem for path in LAYOUTS.glob("*.json"))
    twins = [json.loads((WORKFLOWS / "api" / f"{name}.json").read_text()) for name in names]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_models(folder / "models", twins)
        packs = {**isolated_server.PACKS, "slipstream_demo": demo.DEMO_PACK}
        with isolated_server.isolated_server(models=folder / "models", packs=packs) as server:
            for name in names:
                author(server, name, folder)
                print(f"workflows/{name}.json, workflows/{name}.jpg")


if __name__ == "__main__":
    main(sys.argv[1:])
