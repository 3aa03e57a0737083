"""All kernels, and which of them each policy may try.

The order of KERNELS is the order of the node's options and of reports. Adding a kernel is its file
and one line here, plus its id in the policies that may try it.
"""

from .base import Kernel
from .ck_int8 import CkInt8
from .cudnn import Cudnn
from .efficient import Efficient
from .flash2 import Flash2
from .flash3 import Flash3
from .flash4 import Flash4
from .flash_sdpa import FlashSdpa
from .math import Math
from .sage1 import Sage1
from .sage2 import Sage2
from .sage3 import Sage3
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
)
KERNELS: dict[str, Kernel] = {kernel.id: kernel for kernel in _ALL}

# Best guess first; timing decides where it may run. 'math' is no competitor: it is the last resort
# on a GPU, and on a CPU ComfyUI's own function is the same thing.
FUSED = ("cudnn", "flash_sdpa", "efficient", "flash2", "flash3", "flash4", "xformers")
EXACT_ORDER = (*FUSED, "math")
POLICIES: dict[str, tuple[str, ...]] = {
    "exact": FUSED,
    "balanced": ("sage2", "ck_int8", "sage1"),
    "fastest": ("sparge", "sage3", "sage2", "ck_int8", "sage1"),
}
