"""Which inputs get a shadow, and how far their scales reach: chosen by measured effect.

The paper (llm.npu, section 3.3) ranks layers by their largest outlier over the scale and gives the
first 15 % a shadow. Here every site was rounded alone, in each way that it may be, and what that
did to the model's predictions decides.
"""

from __future__ import annotations

from dataclasses import dataclass

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
