"""The recipes of `lung_nodule_captioning` and `lung_nodule_visual_captioning`: what a patch shows, in words."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from MedXAILib.errors import MedXAIError
from MedXAILib.generator import BEAMS, spoken
from MedXAILib.networks.captioner import END, Captioner
from MedXAILib.synthetic.lung_nodules import SIZE, Backgrounds, Nodules
from MedXAILib.synthetic.sentences import (
    FINDINGS,
    WORDINGS,
    Facts,
    facts_of,
    read,
    references,
    sentence,
    vocabulary,
)
from MedXAILib.tokens import tokens
from MedXAILib.training.bundle import write_bundle
from MedXAILib.training.lung_nodule import begin_as_shipped
from MedXAILib.training.own_bundle import told_of
from MedXAILib.training.table import Patches, Table, augmented
from MedXAILib.training.trainer import Recipe
from MedXAILib.trust.wording import wording

_FINDING_WEIGHT, _VISUAL_WEIGHT, _SENTINEL_WEIGHT = 0.5, 0.5, 0.2
_WITHOUT_FINDINGS = 0.5
"""The share of patches of which the words have to be told from the image alone."""
_AT_ONCE = 2
"""The wordings of a patch that are learnt from in one step."""
_SIGNS = frozenset("$%@#")
"""No words of a network: in a bundle's configuration, which holds them, they mean something else."""

Sentence = tuple[list[str], list[str | None]]


def build(attention: bool, word_vectors: Path | None = None) -> Captioner:
    """An untrained network whose trunk is that of the shipped classifier, as Vinyals et al. began with a trained one.

    `word_vectors` is a text file in the format of GloVe (a word and its numbers a line) to begin with, too: the
    embedding is as wide as they are.
    """
    words = vocabulary()
    vectors = {} if word_vectors is None else read_word_vectors(word_vectors, words)
    width = {"hidden": len(next(iter(vectors.values())))} if vectors else {}
    network = Captioner(words, FINDINGS, attention, **width)
    begin_as_shipped(network)
    with torch.no_grad():
        for word, vector in vectors.items():
            network.words.weight[1 + words.index(word)] = vector
    return network


def read_word_vectors(path: Path, words: list[str]) -> dict[str, Tensor]:
    """The vectors of those of `words` that a GloVe file has.

    Raises:
        MedXAIError: when a line is no word with numbers, or of another length, or none of `words` is there.
    """
    found: dict[str, Tensor] = {}
    wanted, length = set(words), 0
    with Path(path).open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            word, *numbers = line.split()
            length = length or len(numbers)
            if len(numbers) != length or not numbers:
                raise MedXAIError(f"Line {number} of '{path}' has {len(numbers)} numbers, not {length}: mend the file.")
            if word in wanted:
                try:
                    found[word] = torch.tensor([float(value) for value in numbers])
                except ValueError as error:
                    raise MedXAIError(f"Line {number} of '{path}' is no word with numbers: mend the file.") from error
    if not found:
        raise MedXAIError(f"'{path}' has none of the words of the captions: give a file of English word vectors.")
    return found


@dataclass(frozen=True)
class Said:
    """Sentences as numbers: `words` (N, T), filled up with `END`, and what each states, both of T + 1 with the last:
    `finding` (N, T + 1) an index into `FINDINGS`, -1 for none, -2 where it is neither; `real` (N, T + 1) whether it is
    of the sentence, its end included."""

    words: Tensor
    finding: Tensor
    real: Tensor

    @classmethod
    def of(cls, sentences: list[Sentence], known: tuple[str, ...]) -> Said:
        """Of sentences as `sentence` makes them, in a vocabulary."""
        number = {word: i + 1 for i, word in enumerate(known)}
        code: dict[str | None, int] = {None: -2, "": -1}
        code |= {finding: i for i, finding in enumerate(FINDINGS)}
        count, longest = len(sentences), max(len(words) for words, _ in sentences)
        words = torch.full((count, longest), END)
        finding = torch.full((count, longest + 1), -1)
        real = torch.zeros(count, longest + 1, dtype=torch.bool)
        for i, (text, stated) in enumerate(sentences):
            words[i, : len(text)] = torch.tensor([number[word] for word in text])
            finding[i, : len(text)] = torch.tensor([code[f] for f in stated])
            real[i, : len(text) + 1] = True
        return cls(words, finding, real)

    def to(self, device: torch.device) -> Said:
        """The same on a device."""
        return Said(self.words.to(device), self.finding.to(device), self.real.to(device))


def loss(network: Captioner, patches: Nodules) -> Tensor:
    """Cross-entropy of every next word in two wordings, and of the findings in the patch as a whole; with attention, of
    those in what a word that states one looks at, which may not be the sentinel, as it has to be for the others."""
    device = network.words.weight.device
    facts = [facts_of(attributes) for attributes in patches.attributes]
    wordings = torch.randperm(WORDINGS)[:_AT_ONCE].tolist()
    said = Said.of([sentence(f, w) for f in facts for w in wordings], network.vocabulary).to(device)
    features = network(patches.images.to(device))
    every = features.repeat_interleave(_AT_ONCE, 0)
    second = (torch.rand(len(every), device=device) > _WITHOUT_FINDINGS).float()
    scores, attention = network.attended(every, said.words, second)
    spoken = F.pad(said.words, (0, 1), value=END)
    total = F.nll_loss(scores[said.real], spoken[said.real])
    truth = {name: _truth(facts, name, device) for name in FINDINGS}
    for name, found in network.finding_scores(features).items():
        known = truth[name] >= 0
        total = total + _FINDING_WEIGHT * F.cross_entropy(found[known], truth[name][known])
    if attention is None:
        return total
    for i, (name, seen) in enumerate(network.by_finding(network.seen_head(attention.seen)).items()):
        rows, at = (said.finding == i).nonzero(as_tuple=True)
        total = total + _VISUAL_WEIGHT * F.cross_entropy(seen[rows, at], truth[name][rows // _AT_ONCE])
    decided = said.real & (said.finding >= -1)
    blind = (said.finding == -1).float()
    # In full precision the sentinel's share may round to 0 or 1.
    share = attention.sentinel.clamp(1e-6, 1 - 1e-6)
    return total + _SENTINEL_WEIGHT * F.binary_cross_entropy(share[decided], blind[decided])


def _truth(facts: list[Facts], name: str, device: torch.device) -> Tensor:
    """The value of a finding in each patch, as an index; -1 where there is none."""
    values = [FINDINGS[name].index(f[name]) if name in f else -1 for f in facts]
    return torch.tensor(values, device=device)


def measure(network: Captioner, patches: Nodules) -> dict[str, float]:
    """How good the captions are (see `MedXAILib.trust.wording`), and where their words look.

    All wordings of a patch are its references. Of words that state a finding of a nodule, `gradient_pointing` is the
    share whose map peaks in the mask, the map being HiResCAM at `evidence` of the word's log-probability; `pointing`
    that of the attention; `sentinel_finding` and `sentinel_function` the mean share of the sentinel of these words and
    of those that state nothing.
    """
    facts = [facts_of(attributes) for attributes in patches.attributes]
    captions: list[list[str]] = []
    looks: dict[str, list[float]] = {}
    for images, masks in zip(patches.images.split(50), patches.masks[:, 0].split(50), strict=True):
        with torch.no_grad():
            features = network(images.to(network.words.weight.device))
        said = [spoken(network, row) for row in network.beam(features, BEAMS)]
        # Where a word should look is known of our own wordings only, and of a nodule that is there.
        told = {i: made for i, words in enumerate(said) if masks[i].any() and (made := _recognised(words)) is not None}
        if told:
            rows = list(told)
            for name, values in _looks(network, features[rows], list(told.values()), masks[rows]).items():
                looks[name] = looks.get(name, []) + values
        captions += said
    return wording(captions, [references(f) for f in facts], read) | {
        name: mean(value) for name, value in looks.items()
    }


def _recognised(words: list[str]) -> Sentence | None:
    """The sentence about a nodule that these words are, if it is one of ours."""
    facts = read(words)
    if len(facts) < len(FINDINGS):
        return None
    return next((made for w in range(WORDINGS) if (made := sentence(facts, w))[0] == words), None)


def _looks(network: Captioner, features: Tensor, told: list[Sentence], masks: Tensor) -> dict[str, list[float]]:
    """Where the words of captions look: 1 where a map peaks in the mask of its patch (M, D, H, W) and 0 where not, and
    the share of the sentinel."""
    said = Said.of(told, network.vocabulary).to(features.device)
    stated = said.finding[:, :-1] >= 0
    features = features.detach().requires_grad_()
    with torch.enable_grad():
        scores, attention = network.attended(features, said.words)
    maps = []
    for t in range(said.words.shape[1]):
        value = scores[:, t].gather(1, said.words[:, t, None]).sum()
        (gradient,) = torch.autograd.grad(value, features, retain_graph=True)
        maps.append((gradient * features).sum(1).detach())
    found = {"gradient_pointing": _hits(torch.stack(maps, 1), stated, masks)}
    if attention is not None:
        sentinel = attention.sentinel.detach()
        found["pointing"] = _hits(attention.grid[:, :-1].detach(), stated, masks)
        found["sentinel_finding"] = sentinel[:, :-1][stated].tolist()
        found["sentinel_function"] = sentinel[(said.finding == -1) & said.real].tolist()
    return found


def _hits(maps: Tensor, stated: Tensor, masks: Tensor) -> list[float]:
    """1 where a map of (M, T, *grid), of the words `stated` (M, T), peaks in the mask of its patch (M, D, H, W)."""
    # Without aligned corners unit i lands on voxel 4 i + 1.5, the middle of what it looks at.
    fine = F.interpolate(maps[stated][:, None], size=(SIZE,) * 3, mode="trilinear").flatten(1)
    of_patch = masks.flatten(1)[stated.nonzero()[:, 0].cpu()]
    return of_patch.gather(1, fine.argmax(1, keepdim=True).cpu())[:, 0].float().tolist()


@torch.no_grad()
def real(network: Captioner, scan: Backgrounds) -> dict[str, float]:
    """Whether the caption of the scan's own lesion says that there is a nodule (1 or 0), and how many findings it
    states."""
    words = network.beam(network(scan.lesion_patch()[0].to(network.words.weight.device)), BEAMS)[0]
    facts = read(spoken(network, words))
    return {"nodule": float(facts.get("nodule") == "present"), "stated": float(len(facts))}


def publish(network: Captioner, metrics: dict[str, float], folder: Path) -> None:
    """Write the bundle."""
    about = {
        "name": (_ATTENTION if network.attention else _PLAIN)["title"],
        "task": "Captioning of lung patches of 50 mm: what is to be seen of a nodule, in a sentence or two",
        "description": "A demonstration network for explanations, trained on template sentences about computed "
        "nodules.",
        "intended_use": "Demonstration, teaching and tests of explanation methods. Not for diagnosis.",
    }
    write_captioner(folder, network, about=about, card=_card(network, metrics), metrics=metrics)


def write_captioner(folder: Path, network: Captioner, size: int = SIZE, **told: Any) -> None:
    """Write the bundle of a network that sees `size` voxels a side (see `write_bundle`)."""
    write_bundle(
        folder,
        network,
        definition={
            "_target_": "MedXAILib.networks.captioner.Captioner",
            "vocabulary": list(network.vocabulary),
            "findings": {name: list(values) for name, values in network.findings.items()},
            "attention": network.attention,
            "hidden": network.words.embedding_dim,
        },
        inferer={"_target_": "SimpleInferer"},
        postprocessing=[],
        handlers=[],
        output={
            "type": "feature",
            "format": "features, which the network's method `beam` puts in words",
            "num_channels": network.evidence.block[0].out_channels,
            "spatial_shape": [size // 4] * 3,
            "dtype": "float32",
            "value_range": [],
            "is_patch_data": True,
            "channel_def": {},
        },
        layers=["evidence"],
        **told,
    )


def _card(network: Captioner, metrics: dict[str, float]) -> str:
    rows = [
        ("BLEU-1, -2, -3", "bleu_1", "bleu_2", "bleu_3"),
        ("**BLEU-4**", "bleu_4"),
        ("ROUGE-L", "rouge_l"),
        ("METEOR-es (exact and stem matches only)", "meteor_es"),
        ("CIDEr-D", "cider_d"),
        *((f"F1 of {name} (macro)", f"f1_{name}") for name in FINDINGS),
        ("F1 of all findings", "f1_all"),
        ("BLEU-4 of another patch's caption", "shuffled_bleu_4"),
        ("F1 of all findings of another patch's caption", "shuffled_f1_all"),
        ("BLEU-4 of the commonest sentence", "most_frequent_bleu_4"),
        ("F1 of all findings of the commonest sentence", "most_frequent_f1_all"),
        ("words that state a finding: gradient map peaks in the nodule", "gradient_pointing"),
        ("... attention peaks in the nodule", "pointing"),
        ("... share of the sentinel", "sentinel_finding"),
        ("words that state none: share of the sentinel", "sentinel_function"),
    ]
    columns = ("", "borderline_")
    lines = []
    for what, *keys in rows:
        told = [", ".join(f"{metrics[c + k]:.3f}" if c + k in metrics else "-" for k in keys) for c in columns]
        if any(cell.strip("-, ") for cell in told):
            lines.append(f"| {what} | {told[0]} | {told[1]} |")
    how = _ATTENTION if network.attention else _PLAIN
    parameters = sum(p.numel() for p in network.parameters())
    return _CARD.format(**metrics, **how, parameters=parameters, rows="\n".join(lines))


_PLAIN = {
    "title": "Lung nodule captions",
    "recipe": "lung-nodule-captioning",
    "how": """
The mean and the maximum of the features over the patch are the first thing that an LSTM reads, and the only that it
ever sees of the image (Vinyals et al., "Show and tell", 2015). So no word looks anywhere in particular; where it comes
from can be told by its gradient.""",
    "taught": "\nThe loss is the cross-entropy of the next word, and of the findings in the patch as a whole.",
    "limit": "",
}
_ATTENTION = {
    "title": "Lung nodule captions with attention",
    "recipe": "lung-nodule-visual-captioning",
    "how": """
Before each word it looks at places of a 10 x 10 x 10 grid or at a sentinel (Lu et al., "Knowing when to look", 2017),
and a second time at what a linear layer finds in the patch as a whole (dual attention, as in Zhang et al., "TandemNet",
2017). The LSTM sees the words alone.""",
    "taught": """
The loss is the cross-entropy of the next word, half of the time without the second look; of the findings, from the
patch as a whole and from what each word that states one looks at (visual-word constraint); and of the share of the
sentinel, which is to be 0 at these words and 1 at those that state nothing.""",
    "limit": """
- That words without a finding look at the sentinel was taught, word by word: it is no discovery.
- Because of the second look attention is not all that a word comes from. The deletion check beside a map says how much
  it is.""",
}
_CARD = """# {title}

Looks at a cube of 50 mm of chest CT and says in a sentence or two whether there is a nodule, and how large, how dense,
calcified and spiculated it is. It exists so that explanations of words can be tried, taught and tested. Never use it
for a patient.

## How{how}
{parameters:,} parameters.

## Trained on
Nodules computed into one real chest CT (`chest_ct_mass.nrrd`, scan lung2 of pyradiomics 3.0.1, BSD 3-Clause), its own
48 mL mass left out; every batch freshly computed, clear cases only. The sentences are templates in four wordings,
filled in from the known attributes: below 11 mm small, below 17 mm medium-sized, else large; a solidity below 0.1
ground-glass, above 0.9 solid. No radiologist wrote or read them. The trunk began with the weights of `lung_nodule`,
which saw the same patient.{taught}
No mask was shown to the network. `medxai train {recipe}` makes this bundle again ({seconds:.0f} s when this
one was made).

## Measured
On computed nodules in the CT of another patient (`chest_ct_nodule.nrrd`, lung1), 450 patches each, with 3 beams. All
four wordings of the truth are references, so that choosing another wording is no error. Findings are read off the
captions by rules; F1 is the mean over a finding's values.

| | clear cases | with borderline cases |
|---|---|---|
{rows}

The real nodule of lung1 (1.36 mL), which no training saw: called a nodule {real_nodule:.0f} (1 yes, 0 no).

## Limits
- Template sentences: a BLEU of this height says nothing of reports that people write.
- One patient to train on, one to test on, one real nodule: an illustration, not a performance claim.
- Nodules of 7 to 24 mm in lung.
- Lobulated margins can hardly be seen at 1.25 mm, so that nothing is said of them.{limit}

## Reading it
Input: CT in RAS orientation at 1.25 mm, -1000..400 HU to 0..1, 40 x 40 x 40 voxels. Output: 64 features on a grid of 10
x 10 x 10, unit i at voxel 4 i + 1.5, which the network's method `beam` puts in words.
"""


def own(attention: bool, recipe: Recipe, table: Table) -> Recipe:
    """`recipe` for the reports of a person's own table, in the words that are said in at least two of them.

    Raises:
        MedXAIError: for a row without a report, when no word is said twice, and when there is but one report to
            validate or test with.
    """
    table.require("report")
    reports = [tokens(case.row["report"]) for case in table.of("train")]
    count = Counter(word for words in reports for word in set(words))
    words = sorted(word for word, times in count.items() if times > 1 and word not in _SIGNS)
    if not words:
        raise MedXAIError(f"No word is in two reports of '{table.path.name}': give more reports.")
    for split in ("validation", "test"):
        if len(table.of(split)) < 2:
            raise MedXAIError(
                f"'{table.path.name}' has one report in the split '{split}', where captions are compared with those of "
                "other patches: give two or more."
            )
    return replace(
        recipe,
        network=partial(Captioner, words, {}, attention),
        loss=loss_own,
        measure=measure_own,
        publish=partial(publish_own, table, recipe.name),
        score="bleu_4",
        synthesise=augmented,
    )


def loss_own(network: Captioner, patches: Patches) -> Tensor:
    """Cross-entropy of every next word of the reports; words that are not in the vocabulary are left out."""
    device = network.words.weight.device
    known = set(network.vocabulary)
    reports = [[word for word in tokens(report) if word in known] for report in patches.reports]
    said = Said.of([(words, [None] * len(words)) for words in reports], network.vocabulary).to(device)
    scores = network.log_probabilities(network(patches.images.to(device)), said.words)
    return F.nll_loss(scores[said.real], F.pad(said.words, (0, 1), value=END)[said.real])


@torch.no_grad()
def measure_own(network: Captioner, patches: Patches) -> dict[str, float]:
    """How near the captions are to the reports (see `MedXAILib.trust.wording`)."""
    device = network.words.weight.device
    found = [network.beam(network(images.to(device)), BEAMS) for images in patches.images.split(50)]
    captions = [spoken(network, row) for words in found for row in words]
    return wording(captions, [[tokens(report)] for report in patches.reports])


def publish_own(table: Table, recipe: str, network: Captioner, metrics: dict[str, float], folder: Path) -> None:
    """Write the bundle of a network that learnt from `table`."""
    told = told_of(table, recipe, folder.name, metrics, "Captioning", "says what a report would", _OWN)
    write_captioner(folder, network, size=table.grid.size, **told)


_OWN = """Captions are held against the one report of each patch. `shuffled_...` is the same for another patch's caption
and `most_frequent_...` for the commonest report: what is not clearly better has not looked at the image. Whether a
caption is right is nothing that these numbers say. The output is features, which the network's method `beam` puts in
words."""


def _recipe(attention: bool) -> Recipe:
    return Recipe(
        name=(_ATTENTION if attention else _PLAIN)["recipe"],
        network=partial(build, attention),
        loss=loss,
        measure=measure,
        real=real,
        score="f1_all",
        publish=publish,
        own=partial(own, attention),
        epochs=12,
        steps=90,
        batch=15,
        learning_rate=4e-3,
        validation=90,
    )


RECIPE = _recipe(attention=False)
VISUAL_RECIPE = _recipe(attention=True)
