"""Loads the pack once as `slipstream`; fixtures for the tiers that need a ComfyUI."""

from pathlib import Path

import comfy_home
import pytest
import torch

comfy_home.load_pack()
torch.set_num_threads(2)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests in host/ carry the marker `host`; a few in unit/ say themselves that they do."""
    host = Path(__file__).resolve().parent / "host"
    for item in items:
        if host in item.path.parents:
            item.add_marker(pytest.mark.host)


@pytest.fixture(scope="session")
def comfy():
    """ComfyUI in this process; skips without one."""
    root = comfy_home.in_process()
    if root is None:
        pytest.skip(comfy_home.NOT_FOUND)
    return root
