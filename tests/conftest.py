"""Loads the pack once as `slipstream`; fixtures for the tiers that need a ComfyUI."""

import comfy_home
import pytest
import torch

comfy_home.load_pack()
torch.set_num_threads(2)


@pytest.fixture(scope="session")
def comfy():
    """ComfyUI in this process; skips without one."""
    root = comfy_home.in_process()
    if root is None:
        pytest.skip(comfy_home.NOT_FOUND)
    return root
