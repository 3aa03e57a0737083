"""Makes workflows/*.json and their .jpg from the API twins, through ComfyUI's own frontend.

    python tests/author_workflows.py [NAME ...]

Needs a ComfyUI, chromium and playwright-core. tests/browser/layouts/<NAME>.json has the places of
the nodes, the notes and the links to model files. The picture shows the graph with the outputs of
a real run on the tiny models, so its colours are random and its report is a CPU's.
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

WORKFLOWS = comfy_home.PACK_ROOT / "workflows"
LAYOUTS = browser_home.FOLDER / "layouts"
STEPS = 20  # of the run in the picture, unless the layout says "steps"
PICTURE_SIZE = (1200, 1200)  # at most; the template browser shows squares
FILE_INPUTS = {"model_name", "unet_name", "clip_name", "clip_name1", "clip_name2", "vae_name"}


def write_models(folder: Path, twins: list[dict[str, Any]]) -> None:
    """The tiny models, and empty files under every name in `twins`: no node shows as broken."""
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
    steps = json.loads((LAYOUTS / f"{name}.json").read_text()).get("steps", STEPS)
    prompt = on_tiny_models(json.loads(twin.read_text()), seed=42, steps=steps)
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
        with isolated_server.isolated_server(models=folder / "models") as server:
            for name in names:
                author(server, name, folder)
                print(f"workflows/{name}.json, workflows/{name}.jpg")


if __name__ == "__main__":
    main(sys.argv[1:])
