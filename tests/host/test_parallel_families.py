"""Every token plan on its live network: several ranks give what one rank gives."""

import pytest
from shared_calls import assert_same, record

pytestmark = pytest.mark.usefixtures("comfy")

PLANNED = (
    "wan", "wan_i2v", "wan_vace", "wan_5b", "wan_camera", "wan_s2v",
    "flux", "flux_schnell", "flux2", "chroma", "hunyuan_video",
    "qwen_image", "mage_flow", "ltxv", "ltxav", "sd3", "sd35", "lumina2", "z_image", "hidream",
    "cosmos_predict2", "minimax_h3", "krea2", "kandinsky5", "cogvideox", "ideogram4", "lens",
    "joyimage", "omnigen2",
)  # fmt: skip


@pytest.mark.parametrize("family", PLANNED)
def test_ranks_agree_with_one(family):
    assert_same(record(family))
