"""The stand-in for ComfyUI's patcher and sampler under the names that tests use.

It exists once, in bench/ (the standalone mode of ./run samples with it too).
"""

from slipstream.bench.reference import (
    Executor,
    copy_containers,
)
from slipstream.bench.reference import (
    ReferenceBlock as FakeBlock,
)
from slipstream.bench.reference import (
    ReferenceDiT as FakeNet,
)
from slipstream.bench.reference import (
    ReferenceModel as FakeModel,
)
from slipstream.bench.reference import (
    ReferencePatcher as FakePatcher,
)
from slipstream.bench.reference_sampler import Guider, sample

__all__ = [
    "Executor",
    "FakeBlock",
    "FakeModel",
    "FakeNet",
    "FakePatcher",
    "Guider",
    "copy_containers",
    "sample",
]
