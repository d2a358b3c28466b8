"""What the residuals of explanations mean, in words: for the page and for the panel, without PyTorch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Residual:
    """By how much an explanation misses something: `says` is a sentence about it with {missed} in it, `help` what that
    means. Less than `good` is good, less than `fair` fair."""

    says: str
    help: str
    good: float = 0.01
    fair: float = 0.05

    def sentence(self, value: float) -> str:
        """The sentence about a residual of this value."""
        missed = f"{value:.1%}" if value >= 0.001 else "less than 0.1%"
        return self.says.replace("{missed}", missed)


_KNOWN = {
    "completeness": Residual(
        "the values of the map should add up to the network's answer; they miss it by {missed}",
        "Completeness: what is shared out among the voxels is the difference between the answer to the scan and the "
        "answer to a baseline, no more and no less.",
    ),
    "conservation": Residual(
        "what is shared out should add up to the network's answer; it misses it by {missed}",
        "Conservation: on the way back through the network nothing of the answer is made or lost; constants of the "
        "network keep a part, which a note tells.",
    ),
    "efficiency": Residual(
        "the shares of all parts should add up to what taking all of them away changes; they miss it by {missed}",
        "Efficiency: Shapley values share out the whole difference between the answer to the scan and the answer "
        "to one from which every part was taken away.",
    ),
    "pooling": Residual(
        "the parts of all places, pooled, should be the network's answer; they miss it by {missed}",
        "Pooling: the network makes its answer of what it says of each place, and of nothing else; the map is what it "
        "says there.",
    ),
    "unexplained": Residual(
        "the linear rule leaves {missed} of what the network said unexplained",
        "1 − R² of the fit: 0 % is a network that follows the linear rule exactly near this scan, 100 % a rule that "
        "says nothing about it. The greater, the less do the values of the map mean.",
        good=0.2,
        fair=0.5,
    ),
    "unforeseen": Residual(
        "the linear rule does not foresee {missed} of what the network says of scans it was not fitted to",
        "1 − R² where each changed scan is foreseen by a fit that does not know it. A rule that explains well what it "
        "was fitted to and foresees badly has too many parts for its samples.",
        good=0.2,
        fair=0.5,
    ),
    "remaining": Residual(
        "{missed} of the answer remains when what the map marks is taken away",
        "The less remains, the more of what the network needs has been found. It is a matter of the scan too: what is "
        "seen in many places cannot be taken away in a small one.",
        good=0.2,
        fair=0.5,
    ),
    "sum of map": Residual(
        "what each place adds should sum to the similarity of the two scans; at most it misses it by {missed} of that "
        "of a scan with itself",
        "Sum of map: a similarity is shared out among the places of a scan, no more and no less. Where it is missed by "
        "much, the scan of a case is no longer the one that is in the library, which a note tells.",
    ),
    "sum of points": Residual(
        "the points of all prototypes should add up to the network's answer; they miss it by {missed}",
        "Sum of points: the network makes its answer of how like the scan is to its prototypes, and of nothing else.",
    ),
    "reconstruction": Residual(
        "the generative network misses the scan by {missed} of its grey scale when it draws it",
        "Reconstruction: what the network cannot draw it cannot change either, so that the images say less about this "
        "scan. Of hardly any scan that the default generator learnt from does it miss more than 13 %.",
        good=0.06,
        fair=0.13,
    ),
}


def residual(name: str) -> Residual:
    """What a residual means; one that is not known goes by its name."""
    general = "By how much the explanation misses what theory demands of it."
    return _KNOWN.get(name) or Residual(f"{name}: {{missed}}", general)
