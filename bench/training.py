"""One training loop for the three networks of train_demo.py: by steps, seeded, resumable.

Step n draws its batch from a generator seeded by (seed, n) and its learning rate from n alone, so
a run that was interrupted and taken up again ends in the same weights as one that was not (on the
same machine and number of threads). A run taken up with another length follows the other schedule
from there; `lengths` tells. Checkpoints are safetensors: weights, average, AdamW's state.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

LossOf = Callable[[torch.Generator], Tensor]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How one network is trained; ema 0 keeps the last weights, else an average of all."""

    num_steps: int
    learning_rate: float
    seed: int
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    ema: float = 0.0
    num_warmup_steps: int = 100
    checkpoint_every: int = 100
    min_rate: float = 0.02

    def rate(self, step: int) -> float:
        """Linear warmup, then a cosine to min_rate of the peak."""
        warm = min(1.0, (step + 1) / self.num_warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.num_steps))
        return self.learning_rate * warm * (self.min_rate + (1 - self.min_rate) * cosine)


class Training:
    """A network on its way; run() goes on from the checkpoint at `path` if there is one."""

    def __init__(self, net: nn.Module, schedule: Schedule, path: Path):
        self.net, self.schedule, self.path = net, schedule, path
        self.step, self.spent_s, self.loss = 0, 0.0, 0.0
        self.lengths = [(0, schedule.num_steps)]  # (from step, schedule's length)
        self.parameters = dict(net.named_parameters())
        self.average = {key: value.detach().clone() for key, value in self.parameters.items()}
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(),
            lr=schedule.learning_rate,
            betas=schedule.betas,
            weight_decay=schedule.weight_decay,
        )
        if path.is_file():
            self._load()

    def run(
        self, loss_of: LossOf, *, label: str, at_checkpoint: Callable[[], None] | None = None
    ) -> None:
        """Train to the last step; the network ends with its averaged weights if there is an ema."""
        from tqdm import tqdm

        schedule = self.schedule
        started = time.monotonic() - self.spent_s
        bar = tqdm(total=schedule.num_steps, initial=self.step, desc=label, mininterval=5)
        while self.step < schedule.num_steps:
            value = self._one(loss_of)
            self.loss += (value - self.loss) * (0.01 if self.step > 100 else 0.1)
            self.step += 1
            bar.update()
            bar.set_postfix(loss=f"{self.loss:.4f}", refresh=False)
            if self.step % schedule.checkpoint_every == 0 or self.step == schedule.num_steps:
                self.spent_s = time.monotonic() - started
                self._save()
                tqdm.write(f"{label}: step {self.step} loss {self.loss:.4f} {self.spent_s:.0f} s")
                if at_checkpoint is not None:
                    at_checkpoint()
        bar.close()
        self.use_average()

    def use_average(self) -> None:
        """Give the network its averaged weights."""
        if self.schedule.ema:
            with torch.no_grad():
                for key, value in self.parameters.items():
                    value.copy_(self.average[key])

    def _one(self, loss_of: LossOf) -> float:
        """One step; its loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.rate(self.step)
        generator = torch.Generator().manual_seed(self.schedule.seed * 10_000_019 + self.step)
        loss = loss_of(generator)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        self.optimizer.step()
        if self.schedule.ema:
            decay = min(self.schedule.ema, (1 + self.step) / (10 + self.step))
            with torch.no_grad():
                torch._foreach_lerp_(
                    list(self.average.values()), list(self.parameters.values()), 1 - decay
                )
        return loss.item()

    def _save(self) -> None:
        kept = {f"net.{key}": value for key, value in self.net.state_dict().items()}
        kept |= {f"average.{key}": value for key, value in self.average.items()}
        names = list(self.parameters)
        for index, state in self.optimizer.state_dict()["state"].items():
            kept |= {f"adam.{names[index]}.{key}": value for key, value in state.items()}
        kept["lengths"] = torch.tensor(self.lengths)
        progress = torch.tensor([self.step, self.spent_s, self.loss], dtype=torch.float64)
        unfinished = self.path.with_suffix(".part")
        copies = {
            key: torch.empty(value.shape, dtype=value.dtype).copy_(value.detach())
            for key, value in kept.items()
        }
        save_file(copies | {"progress": progress}, unfinished)
        unfinished.replace(self.path)

    def _load(self) -> None:
        kept = load_file(self.path)
        step, self.spent_s, self.loss = kept.pop("progress").tolist()
        self.step = int(step)
        self.lengths = [(int(a), int(b)) for a, b in kept.pop("lengths").tolist()]
        if self.lengths[-1][1] != self.schedule.num_steps:
            self.lengths.append((self.step, self.schedule.num_steps))
        for name in self.average:
            self.average[name] = kept[f"average.{name}"]
        self.net.load_state_dict({k[4:]: v for k, v in kept.items() if k.startswith("net.")})
        state = self.optimizer.state_dict()
        for index, name in enumerate(self.parameters):
            keys = ("step", "exp_avg", "exp_avg_sq")
            state["state"][index] = {key: kept[f"adam.{name}.{key}"] for key in keys}
        self.optimizer.load_state_dict(state)
