"""Which inputs get a shadow, and how far their scales reach: chosen by measured effect.

The paper (llm.npu, section 3.3) ranks layers by their largest outlier over the scale and gives the
first 15 % a shadow. Here every site was rounded alone, in each way that it may be, and what that
did to the model's predictions decides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from elute.errors import ShapeError
from elute.npu.ranges import Range


@dataclass(frozen=True)
class Choice:
    """How a site's input is rounded.

    share   of the values that a calibration saw within the bound; 1: all
    shadow  values beyond the bound are added back by the CPU; else they are clipped
    """

    share: float
    shadow: bool

    def bound(self, seen: Range) -> float:
        """The largest |x| that the device gets whole: 127 steps. A channel that is 0 always: 1."""
        return (seen.maximum if self.share >= 1 else seen.quantile(self.share)) or 1.0

    def __str__(self) -> str:
        return f"{self.share:g}{'+shadow' if self.shadow else ''}"


PLAIN = (Choice(1.0, False), Choice(0.9999, False))
SHADOWED = (Choice(0.999, True), Choice(0.99, True))
CHOICES = PLAIN + SHADOWED


def choose(effects: Mapping[str, Mapping[Choice, float]], pruned: float) -> dict[str, Choice]:
    """For each site a choice, the share `pruned` of them without a shadow: those where it helps
    least. A shadow's bound is the wide one, which has a tenth of the outliers, unless the narrow
    one helps more than the least of these shadows does: the CPU's time goes where it does most.

    Raises ShapeError for a share outside 0..1.
    """
    check_pruned(pruned)
    plain = {name: min(PLAIN, key=of.__getitem__) for name, of in effects.items()}
    shadowed = {name: min(SHADOWED, key=of.__getitem__) for name, of in effects.items()}
    gains = {name: of[plain[name]] - of[shadowed[name]] for name, of in effects.items()}
    by_gain = sorted(gains, key=lambda name: gains[name])
    n_without = round(pruned * len(by_gain))
    without, within = set(by_gain[:n_without]), by_gain[n_without:]
    worth = max(gains[within[0]], 0.0) if within else 0.0
    return {
        name: plain[name] if name in without else _shadow(of, worth) for name, of in effects.items()
    }


def check_pruned(share: float) -> None:
    """Raises ShapeError outside 0..1."""
    if not 0 <= share <= 1:
        raise ShapeError(f"pruning: found {share}, wanted 0 to 1")


def _shadow(effects: Mapping[Choice, float], worth: float) -> Choice:
    wide, narrow = SHADOWED
    return narrow if effects[wide] - effects[narrow] > worth else wide
