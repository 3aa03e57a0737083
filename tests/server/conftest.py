"""One ComfyUI server for the whole tier: our pack, the test pack, tiny model files."""

from collections.abc import Iterator
from pathlib import Path

import comfy_home
import pytest
from isolated_server import Server, isolated_server

FILES = ("flux", "wan")  # <models>/diffusion_models/tiny_<family>.safetensors


@pytest.fixture(scope="session")
def models(comfy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models folder: tiny Flux and Wan for UNETLoader, "taef1" for VAELoader."""
    import tiny

    folder = tmp_path_factory.mktemp("models")
    for family in FILES:
        tiny.write(folder / "diffusion_models", family)
    tiny.write_preview_vae(folder / "vae_approx", "taef1", latent_channels=16)
    return folder


@pytest.fixture(scope="session")
def server(models: Path) -> Iterator[Server]:
    """The running server. Vary the seed between prompts that must both run: equal ones are cached.

    With the fixture `comfy` this process holds ComfyUI's modules too, but only to write files.
    """
    assert comfy_home.find() is not None
    with isolated_server(models=models) as running:
        yield running
