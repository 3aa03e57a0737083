"""What a run takes from earlier runs and leaves to later ones: times, verdicts, a frozen plan."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .. import host
from .config import AttentionConfig
from .frozen import FrozenPlan
from .kernels.table import versions as kernel_versions
from .timings import Timings, machine_key
from .tuning import Budget
from .verdicts import Verdicts


@dataclass
class Kept:
    """frozen: the plan to repeat, if one is asked for; budget: of this run's timing."""

    timings: Timings
    verdicts: Verdicts
    machine: str = ""
    frozen: FrozenPlan | None = None
    budget: Budget = field(default_factory=Budget)

    def save(self, plan: Mapping[str, Any], *, is_complete: bool) -> list[str]:
        """Write everything; sentences for the report. plan: of this run (frozen.plan_of)."""
        sentences = [self.timings.save(), self.verdicts.save()]
        if self.frozen is not None:
            sentences += self._about(self.frozen)
            if is_complete:
                sentences.append(self.frozen.save(dict(plan)))
        return [sentence for sentence in sentences if sentence]

    def _about(self, frozen: FrozenPlan) -> list[str]:
        if frozen.is_new:
            return ["The kernel plan is new: this run's choices are frozen from now on"]
        remarks = []
        if frozen.machine and self.machine and frozen.machine != self.machine:
            remarks.append(
                f"The frozen kernel plan was made on another machine or with other versions "
                f"({frozen.machine}): the picture may differ"
            )
        if frozen.num_missing:
            remarks.append(
                f"{frozen.num_missing} calls are not in the frozen kernel plan (another size or "
                "policy): they were decided as usual"
            )
        return remarks


def kept_for(patcher: Any, config: AttentionConfig) -> Kept:
    """What is kept for this MODEL on this machine."""
    folder, versions = host.user_folder(), kernel_versions()
    device: torch.device = patcher.load_device
    name = host.device_name(device) if device.type == "cuda" else ""
    frozen = FrozenPlan(config.freeze, folder, forget=config.retune) if config.freeze else None
    verdicts = Verdicts(folder, _fingerprint(patcher), versions, forget=config.retune)
    timings = Timings(folder, versions, forget=config.retune)
    return Kept(timings, verdicts, machine_key(name, versions), frozen)


def _fingerprint(patcher: Any) -> str:
    """Which weights a MODEL has: its class, its file, and what is patched onto them."""
    network = host.diffusion_model(patcher)
    identity = [type(network).__name__, host.model_file(patcher) or _sampled(network)]
    patches = getattr(patcher, "patches", None) or {}
    identity += sorted(f"{key} {[entry[0] for entry in found]}" for key, found in patches.items())
    digest = hashlib.blake2b("\n".join(identity).encode(), digest_size=8).hexdigest()
    return f"{type(network).__name__} {digest}"


def _sampled(network: torch.nn.Module) -> str:
    """A few values of the first weights of a model that comes from no file."""
    values = []
    for parameter in network.parameters():
        # A quantised weight is another class, which may not be cut.
        is_plain = type(parameter.data) is torch.Tensor and parameter.is_floating_point()
        if not is_plain or parameter.device.type == "meta":
            continue
        values.append(parameter.detach().flatten()[:8].float().cpu().tolist())
        if len(values) == 4:
            break
    return str(values)
