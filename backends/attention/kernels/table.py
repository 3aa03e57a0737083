"""All kernels, and which of them each policy may try.

The order of KERNELS is the order of the node's options, which saved workflows count on: a new one
goes to the end. Adding a kernel is its file and one line here, plus its id in the policies that may
try it.
"""

import torch

from .base import Kernel
from .ck_int8 import CkInt8
from .cudnn import Cudnn
from .efficient import Efficient
from .flash2 import Flash2
from .flash3 import Flash3
from .flash4 import Flash4
from .flash_sdpa import FlashSdpa
from .math import Math
from .package import PackageKernel, versions_of
from .sage1 import Sage1
from .sage2 import Sage2, Sage2Fp16Accum, Sage2Fp32Accum
from .sage2_triton import Sage2Triton
from .sage3 import Sage3
from .sol import SolAttn
from .sparge import Sparge
from .xformers import Xformers

_ALL: tuple[Kernel, ...] = (
    Cudnn(),
    FlashSdpa(),
    Efficient(),
    Math(),
    Flash2(),
    Flash3(),
    Flash4(),
    Xformers(),
    CkInt8(),
    Sage1(),
    Sage2(),
    Sage3(),
    Sparge(),
    Sage2Fp16Accum(),
    Sage2Fp32Accum(),
    Sage2Triton(),
    SolAttn(),
)
KERNELS: dict[str, Kernel] = {kernel.id: kernel for kernel in _ALL}

# Best guess first; timing decides where it may run. 'math' is no competitor: it is the last resort
# on a GPU, and on a CPU ComfyUI's own function is the same thing.
FUSED = ("cudnn", "flash_sdpa", "efficient", "flash2", "flash3", "flash4", "xformers")
EXACT_ORDER = (*FUSED, "math")
EIGHT_BIT = (
    "sage2",
    "sage2_fp16_accum",
    "sage2_fp32_accum",
    "ck_int8",
    "sage1",
    "sage2_triton",
)
POLICIES: dict[str, tuple[str, ...]] = {
    "exact": FUSED,
    "balanced": EIGHT_BIT,
    "fastest": ("sol_attn", "sparge", "sage3", *EIGHT_BIT),
}


def versions() -> dict[str, str]:
    """Versions of what kernels run on, by pip's names: what a measured time depends on."""
    found: dict[str, str] = {"torch": str(torch.__version__)}
    if torch.version.cuda and torch.cuda.is_available():
        found["cuda"] = torch.version.cuda
        found["cudnn"] = str(torch.backends.cudnn.version())
    names = (n for k in _ALL if isinstance(k, PackageKernel) for n in k.distributions)
    return found | versions_of(tuple(dict.fromkeys(names)))
