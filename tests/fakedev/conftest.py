"""ComfyUI on the fake accelerator for this whole process; SLIPSTREAM_FAKE_MANAGER says how."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import comfy_home
import fake_comfy
import fake_models
import fake_vbar
import pytest
import torch

comfy_home.in_process()
torch.set_num_threads(1)  # the matrices are tiny


@pytest.fixture(scope="session")
def env():
    for family in (*fake_models.FAMILIES, *fake_models.QUEUE_OWNERS, "sd3", "sd15"):
        fake_models.weights(family)
    return fake_comfy.start(os.environ["SLIPSTREAM_FAKE_MANAGER"])


@pytest.fixture(autouse=True)
def clean_device(env):
    """Every check begins and ends with nothing loaded."""
    env.device.total_bytes = 10**12
    yield
    env.device.total_bytes, fake_vbar.Room.headroom_bytes = 10**12, 0
    env.end_node()
    import comfy.model_management

    comfy.model_management.unload_all_models()
