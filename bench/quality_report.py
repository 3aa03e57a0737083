"""What the parts of the quality lab share: the model, how much to sample, where pictures go."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .scores import sample_singly
from .trained import TrainedModel


@dataclass
class Lab:
    """num_seeds: pictures of a timed point; folder: for contact sheets; bar: a tqdm."""

    demo: TrainedModel
    num_seeds: int
    folder: Path
    bar: Any

    def that_run(self, models: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
        """(the models that can be sampled, why the others cannot); also warms them up."""
        works, failed = {}, {}
        for name, model in models.items():
            try:
                sample_singly(self.demo, model, 0)
            except (RuntimeError, ValueError) as error:
                failed[name] = f"{type(error).__name__}: {error}"
                print(f"\n{name} FAILED: {error}")
            else:
                works[name] = model
        return works, failed
