"""Loads the pack once as `slipstream`; fixtures for the tiers that need a ComfyUI."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

# Torch's threads spin while they wait, and take the processor from the processes that they wait
# for: tests with workers take ten times as long on a busy machine. Read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import comfy_home
import pytest
import torch

comfy_home.load_pack()
torch.set_num_threads(2)

MODEL_FILES = ("flux", "wan")  # <models>/diffusion_models/tiny_<family>.safetensors


def pytest_configure() -> None:
    """A shell starts background jobs with SIGINT ignored, which programs under test inherit."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="tests marked `full` too (./test full)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests in host/ carry the marker `host`; those marked `full` need --full."""
    if not config.getoption("--full"):
        longer = [item for item in items if item.get_closest_marker("full")]
        config.hook.pytest_deselected(items=longer)
        items[:] = [item for item in items if not item.get_closest_marker("full")]
    host = Path(__file__).resolve().parent / "host"
    for item in items:
        if host in item.path.parents:
            item.add_marker(pytest.mark.host)


@pytest.fixture(autouse=True)
def _nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs measure stays out of the checkout's user folder, and out of the next test."""
    from slipstream.backends import host
    from slipstream.backends.svdquant import host_cache

    monkeypatch.setattr(host, "user_folder", lambda: None)
    monkeypatch.setattr(host_cache, "cache_folder", lambda: None)


@pytest.fixture(scope="session")
def comfy() -> Path:
    """ComfyUI in this process; skips without one."""
    root = comfy_home.in_process()
    if root is None:
        pytest.skip(comfy_home.NOT_FOUND)
    return root


@pytest.fixture(scope="session")
def models(comfy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models folder: tiny Flux and Wan for UNETLoader, a 4-bit Flux, "taef1" for VAELoader."""
    import svdquant_models
    import tiny

    folder = tmp_path_factory.mktemp("models")
    for family in MODEL_FILES:
        tiny.write(folder / "diffusion_models", family)
    svdquant_models.write_tiny(folder / "diffusion_models")
    tiny.write_preview_vae(folder / "vae_approx", "taef1", latent_channels=16)
    return folder


@pytest.fixture(scope="session")
def server(models: Path) -> Iterator["isolated_server.Server"]:  # noqa: F821 - imported when used
    """A running ComfyUI with our pack, the test pack and `models`: one for the whole session.

    Vary the seed between prompts that must both run: ComfyUI answers equal ones from its cache.
    """
    import isolated_server

    with isolated_server.isolated_server(models=models) as running:
        yield running
