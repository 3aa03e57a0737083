"""All kernels in the order reports list them, and what each policy may try."""

from .base import Kernel
from .math import Math

KERNELS: dict[str, Kernel] = {k.id: k for k in (Math(),)}
POLICIES: dict[str, tuple[str, ...]] = {"exact": (), "balanced": (), "fastest": ()}
