"""What docs/sanity.md says in words. Numbers come from what was measured, by the names of the rows."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping
from statistics import mean
from typing import Any

from benchmarks.sanity.bench import DRAWS, RANDOMISED_SLOW
from benchmarks.sanity.bench import RANDOMISED as CASES
from benchmarks.sanity.patches import OF_EACH_CLASS, REAL, SHIFT

Numbers = Mapping[str, Mapping[str, Any]]

OCCLUSION, ABLATION = "Occlusion sensitivity, windows of 10 mm", "Supervoxel ablation, 10 mm"
LIME, RISE = "LIME, 12.5 mm, 128 samples", "RISE, 128 masks"
KERNEL_SHAP, PERMUTATION_SHAP = "Kernel SHAP, 12.5 mm, 128 samples", "Permutation SHAP, 12.5 mm, one order"
DIFFERENCE = "Prediction difference, windows of 12.5 mm, one draw"

INTRODUCTION = f"""# Which maps can be trusted?

Two questions to every method, about the demo network `lung_nodule` and cases of which the right explanation is
known ([demo-networks.md](demo-networks.md)): is the map **where the nodule is**, and does it **depend on what the
network learnt**? A map can be in the right place and still not be about the network.

`python -m benchmarks.sanity` measures what is missing and writes this page; `--only lrp` measures a method again,
`--all` all of them. This is one small network, and most of its nodules were computed: the numbers show how methods
differ here. They are no marks for methods in general, and say nothing about patients.

## Where is the map?

{2 * OF_EACH_CLASS} nodules, computed into the lung of a patient whom the network has not seen, half of them benign;
and {REAL} patches of that patient's own, real nodule. The network is right about all of them, and the class it names
is explained. In the middle of the patch a nodule would be found by whoever points at the middle. So all of them lie at
random up to {SHIFT} of the patch's 40 voxels (15 of 50 mm) off the middle, along each axis.

- **peak**: in what share of the patches the map's highest value lies in the nodule (the pointing game); the middle of
  the highest part where many voxels have the same value.
- **mass**: what share of the positive relevance lies in the nodule, on average.
- **untrained: peak**: the same for networks that learnt nothing, on {CASES} of the synthetic nodules. It should be near
  chance. For methods that ask the network about a hundred scans or so for each map, from occlusion on, it is
  {RANDOMISED_SLOW} of them, here and below.

The first rows know nothing of the network: an even map, a Gaussian of 8 voxels (10 mm) in the middle of the patch, the
scan itself, and an edge detector (how steep the scan is). Names say what differs from a method's defaults; where that
is a smaller number of copies, steps, points, clusters, samples or orders, or larger parts, it is to save time.
`counterfactual_infill` is not here: it answers about the one region that a person names, and its map lies there
whatever the network.
"""

RANDOMISED = f"""## Does it depend on what was learnt?

The weights are re-drawn layer by layer from the output back, each layer with a seed of its own, until nothing is left
of what the network learnt (cascading randomisation, Adebayo et al. 2018). The maps of {CASES} of the synthetic
nodules, for the same class as before, are compared with those of the trained network; means over {DRAWS} cascades.
Re-drawn layers are as before a training; their batch normalisation takes its statistics from the patches. Similarities
are 1 for the same map and 0 where one says nothing of the other:

- **correlation**: of the voxels, sign aside: the same picture, be it with red and blue exchanged. **signed**: with it.
- **rank**: Spearman's rank correlation of the absolute values.
- **overlap**: the share of the strongest twentieth of the voxels that is the same.

A method **fails** where its similarity is nearer to that of an edge detector than to chance, by more than two standard
errors of the cascades; within them it is **undecided**. An edge detector does not ask the network, so it has to fail:
its similarity is 1. Chance is how alike the gradients of two untrained networks are, which share the scan and the way
the network is built, and no weight. Half-way is {{correlation:.2f}} for correlation and {{rank:.2f}} for rank.

### The upper layers

`class_head` says which evidence counts for which class, `evidence` what counts as evidence. With both re-drawn, a map
that stays the same is not about the decision: the verdict is about these two. The table has the correlation after each
layer, starting at the output, and the mean of them; the trained network itself is not in it. That two layers are
judged, and sign aside, was settled after a first look at the numbers; the table is there to judge otherwise.
"""

CLASS_HEAD = """How alike the maps are with a new `class_head` alone tells less: the evidence is where it was, and it is
right for a map to stay there. What ought to change is its sign, because it is now a matter of chance whether the same
evidence speaks for the class or against it. With sign, the correlation of methods that have one is near 0; that of
deconvolution and guided backpropagation is not.

What does not pass, and what that means for a reader:
"""

ALL_NEW = """### Everything new

The same once nothing is left of what the network learnt, by ranks as Adebayo et al. have it. "Cascade" is the mean of
the rank correlations after each layer; "two untrained" compares the maps of two networks that share no weight.
"""

WIDER = """### Wider networks

Why does guided backpropagation change at all once everything is new, when it is known for hardly doing so (Adebayo et
al. 2018)? Nie et al. 2018 showed that it restores the scan, the better the more filters there are, and the demo network
has few: 16 in the first layer, of 64 voxels each. The table has untrained networks of the same build with more of them:
the correlation of the maps of two networks that share no weight, and of a map and the scan (4 patches, 3 networks of
each width).
"""

MEASURED = """## Measured
"""

REFUSED = """## Not possible on this network
"""


def where(numbers: Numbers) -> str:
    """What the first table shows."""

    def mass(name: str) -> str:
        return f"{numbers[name]['synthetic']['mass']:.2f}"

    def peak(name: str, part: str) -> str:
        return f"{numbers[name][part]['peak']:.0%}"

    missed = 1 - numbers["Grad-CAM"]["synthetic"]["peak"]
    return _filled(f"""What knows nothing of the network does not find the nodule, so the cases give it away to nobody.
        The peak of nearly every method that looks inside the network does. That of Grad-CAM is elsewhere in
        {missed:.0%} of the synthetic ones: it weighs a channel by its mean gradient, and this network also uses the
        channel's maximum, which has its gradient at a single place. In the share of relevance methods differ more:
        {mass("HiResCAM")} of HiResCAM and {mass("Layer-wise relevance propagation, epsilon-plus")} of LRP epsilon-plus
        lie in the nodule, {mass("Gradient")} of the gradient, which is noisy, and {mass("Grad-CAM++")} of Grad-CAM++,
        which spreads over all tissue. LRP epsilon is gradient times input in a network of ReLUs: the rows are the
        same.

        Methods that take parts away are as coarse as their parts, and windows that lie on a fixed grid rarely fit the
        nodule: those of 10 mm have their peak in {peak(OCCLUSION, "synthetic")} of the synthetic nodules and in
        {peak(OCCLUSION, "real")} of the patches of the real one; supervoxels of that size, which follow its edge, in
        {peak(ABLATION, "synthetic")} and {peak(ABLATION, "real")}. RISE, whose masks lie elsewhere each time, has its
        peak there in {peak(RISE, "synthetic")} and {peak(RISE, "real")}, but spreads the rest ({mass(RISE)}). What is
        put in the place of a part counts, too: for most of these methods it is the scan's mean, which in dark lung is
        something grey ([infills.md](infills.md)).

        The right place is not enough. Guided backpropagation looks better than the gradient here
        ({mass("Guided backpropagation")} against {mass("Gradient")}), and fails what follows.""")


def failing(numbers: Numbers, verdicts: Mapping[str, str]) -> str:
    """A paragraph about each method that did not pass the upper layers."""
    told = [(name, text) for name, text in FAILS.items() if verdicts[name] != "passes"]
    return "\n".join(_filled(f"**{name}** ({verdicts[name].strip('*')}). {text(numbers)}") for name, text in told)


def all_new(numbers: Numbers) -> str:
    """What the table of networks with nothing but new weights shows."""

    def rank(name: str) -> str:
        return f"{mean(draw[-1]['rank'] for draw in numbers[name]['cascade']):.2f}"

    return _filled(f"""Nothing fails here but what does not ask the network. Nearest to it are Grad-CAM++
        ({rank("Grad-CAM++")}) and LayerCAM ({rank("LayerCAM")}), whose maps are maps of tissue once the knowledge is
        gone, and integrated gradients ({rank("Integrated gradients, 15 steps")}): what is multiplied with the scan has
        in part the ranks of the scan, whatever the network. The same holds, less so, for gradient times input, LRP
        epsilon, DeepLIFT and Gradient SHAP. That any two untrained networks have such like ranks is the demo network's
        own doing: it lets evidence count in proportion to tissue, so whatever the weights, it looks at tissue.""")


def wider(found: Mapping[str, Any]) -> str:
    """What the table of wider networks shows."""
    guided = [each for each in found["found"] if each["method"] == "guided_backprop"]
    few, many = guided[0], guided[-1]
    return _filled(f"""The gradients of such networks have nothing in common. The maps of guided backpropagation become
        alike as the networks become wider ({few["correlation"]:.2f} to {many["correlation"]:.2f}), and they become
        alike because they become the scan ({few["scan"]:.2f} to {many["scan"]:.2f}). So the table above lets guided
        backpropagation off lightly: on a wider network expect less to change. For deconvolution there is no such trend
        here.""")


def _guided(numbers: Numbers) -> str:
    return f"""With these two layers new, its maps correlate with the old ones by
        {_top(numbers, "Guided backpropagation")}, those of the gradient by {_top(numbers, "Gradient")}. On the way back
        it drops, at every ReLU, whatever speaks against the target. So it matters little what the layers above want:
        what arrives is what the lower filters can see in the scan. That is what makes its maps so clean, and why they
        must not be read as reasons for a decision. That Guided Grad-CAM passes ({_top(numbers, "Guided Grad-CAM")}) it
        owes to the Grad-CAM in it; the fine structure that it adds is of the same kind."""


def _deconvolution(numbers: Numbers) -> str:
    return f"""The same, less so ({_top(numbers, "Deconvolution")}): it, too, drops what speaks against the target,
        and it does not ask which units were active."""


def _vargrad(numbers: Numbers) -> str:
    return f"""It has no sign ({_top(numbers, "VarGrad, 8 copies")}), and the absolute value of the gradient, which has
        none either, is not far from it ({_top(numbers, "Gradient, absolute")}). Read it as where the network is
        sensitive; it does not say to what."""


def _absolute(numbers: Numbers) -> str:
    return f"""Without its sign much more of the gradient stays ({_top(numbers, "Gradient, absolute")} against
        {_top(numbers, "Gradient")}): it says where the network is sensitive, and not to what."""


def _plus_plus(numbers: Numbers) -> str:
    return f"""Only positive gradients count ({_top(numbers, "Grad-CAM++")}). Nearly every channel has some, so the map
        ends near the sum of all activations, whatever the class. Read it as where something is, not as what speaks for
        the class; HiResCAM ({_top(numbers, "HiResCAM")}) is the better choice on this network."""


def _layercam(numbers: Numbers) -> str:
    return f"""For the same reason ({_top(numbers, "LayerCAM")}), but place by place, which keeps it in the nodule: as
        long as the lower layers respond there, any evidence with a positive weight will do."""


def _z_plus(numbers: Numbers) -> str:
    return f"""Only positive contributions are followed, so a layer shares out relevance in much the same proportions
        whatever the layer above it says ({_top(numbers, "Layer-wise relevance propagation, z+")}; Sixt et al. 2020
        explain why). With a new class head it keeps its picture and changes at most its sign. The composites with
        another rule for the upper layers pass: epsilon-plus
        ({_top(numbers, "Layer-wise relevance propagation, epsilon-plus")}) and epsilon-plus-flat, the default."""


def _alpha_beta(numbers: Numbers) -> str:
    return f"""With beta, negative contributions are followed too, and less of the map stays than of z+
        ({_top(numbers, "Layer-wise relevance propagation, alpha-beta, beta 1")}), but by the measure of its spread not
        clearly little enough."""


def _lime(numbers: Numbers) -> str:
    return f"""{_top(numbers, LIME)}, in {DRAWS} cascades of {RANDOMISED_SLOW} nodules: too few, or too near to the
        limit, to decide. Nearly all of a map of parts of 12.5 mm lies in a few of them, so that maps become alike
        easily, and networks with no weight in common agree about these (correlation {_untrained(numbers, LIME)}, of
        gradients {_untrained(numbers, "Gradient")}): presumably they are the ones with most tissue. Before reading such
        a map as reasons, ask for smaller parts and more samples."""


def _as_lime(name: str) -> Callable[[Numbers], str]:
    return lambda numbers: (
        f"""As LIME: {_top(numbers, name)}, and untrained networks agree by
        {_untrained(numbers, name)}."""
    )


def _difference(numbers: Numbers) -> str:
    found = numbers[DIFFERENCE]
    return f"""{_top(numbers, DIFFERENCE)}, against {_top(numbers, OCCLUSION)} of occlusion, in so few nodules; and it
        has its peak in the nodule in {found["synthetic"]["peak"]:.0%} of the synthetic ones and in
        {found["real"]["peak"]:.0%} of the patches of the real one. A single draw of a Gaussian field in large windows
        is far from the method's defaults, and what it draws has the contrast of the whole patch, chest wall included,
        so that it looks like another nodule ([infills.md](infills.md)). In these settings, do not rely on it here."""


FAILS: dict[str, Callable[[Numbers], str]] = {
    "Guided backpropagation": _guided,
    "Deconvolution": _deconvolution,
    "VarGrad, 8 copies": _vargrad,
    "Gradient, absolute": _absolute,
    "Grad-CAM++": _plus_plus,
    "LayerCAM": _layercam,
    "Layer-wise relevance propagation, z+": _z_plus,
    "Layer-wise relevance propagation, alpha-beta, beta 1": _alpha_beta,
    LIME: _lime,
    KERNEL_SHAP: _as_lime(KERNEL_SHAP),
    PERMUTATION_SHAP: _as_lime(PERMUTATION_SHAP),
    DIFFERENCE: _difference,
}
"""Why methods do not pass, and what follows for a reader."""


def _top(numbers: Numbers, name: str) -> str:
    return f"{mean(draw[1]['correlation'] for draw in numbers[name]['cascade']):.2f}"


def _untrained(numbers: Numbers, name: str) -> str:
    return f"{numbers[name]['untrained']['correlation']:.2f}"


def _filled(text: str) -> str:
    paragraphs = [" ".join(paragraph.split()) for paragraph in text.split("\n\n")]
    return "\n".join(f"{textwrap.fill(p, 120, break_on_hyphens=False)}\n" for p in paragraphs)
