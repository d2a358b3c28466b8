"""Networks that say what they see: their words, where each comes from, and where they look for it."""

from __future__ import annotations

import csv
import itertools
import json
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import SimpleITK as sitk
import torch
import torch.nn.functional as F
from conftest import make_model, oblique_affine
from torch import Tensor, nn

import MedXAILib as mx
from MedXAILib.generator import External, Token, numbered
from MedXAILib.grid import resample
from MedXAILib.networks.captioner import END, Attention, Captioner
from MedXAILib.request import _of_target
from MedXAILib.resources import path
from MedXAILib.synthetic.lung_nodules import Backgrounds, Nodules, synthesise
from MedXAILib.synthetic.sentences import FINDINGS, facts_of, read, sentence, vocabulary
from MedXAILib.target import from_spec
from MedXAILib.training import captioner, train
from MedXAILib.training.bundle import Grid
from MedXAILib.training.captioner import Said, build, read_word_vectors
from MedXAILib.training.table import read_table

WORDS = ("a", "large", "nodule")
SMALL = {"size": ("small", "large"), "calcification": ("absent", "present")}
KINDS = pytest.mark.parametrize("attention", [False, True], ids=["plain", "attention"])


def small(attention: bool, seed: int = 0) -> Captioner:
    """A network of a few random weights, whose words depend much on the image."""
    torch.manual_seed(seed)
    network = Captioner(WORDS, SMALL, attention, width=2, hidden=6).double().eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.startswith(("speak", "value", "image", "query", "key", "cell", "words")):
                parameter.mul_(3)
    return network


def image(count: int = 1, seed: int = 1) -> Tensor:
    return torch.rand(count, 1, 24, 24, 24, generator=torch.Generator().manual_seed(seed)).double()


def sequences(longest: int) -> list[tuple[int, ...]]:
    """All ways to speak: every caption of fewer than `longest` words with its end, and those that go on."""
    spoken = range(1, len(WORDS) + 1)
    ended = [(*words, END) for n in range(longest) for words in itertools.product(spoken, repeat=n)]
    return ended + list(itertools.product(spoken, repeat=longest))


def log_probability(network: Captioner, features: Tensor, said: Sequence[int]) -> float:
    """By one word after another."""
    total = 0.0
    for t, word in enumerate(said):
        total += float(network.log_probabilities(features, torch.tensor([said[:t]]).long())[0, -1, word])
    return total


@KINDS
def test_probabilities_of_words_and_of_captions_add_up_to_one(attention: bool) -> None:
    network = small(attention)
    with torch.no_grad():
        features = network(image(2))
        words = torch.tensor([[1, 2, 3], [3, 3, 0]])
        each = network.log_probabilities(features, words)
        assert each.shape == (2, 4, 4)
        torch.testing.assert_close(each.exp().sum(2), torch.ones(2, 4).double())
        # A caption is as probable as its words after each other, and all captions together are certain.
        total = sum(math.exp(log_probability(network, features[:1], said)) for said in sequences(3))
    assert total == pytest.approx(1, abs=1e-12)


@KINDS
def test_a_word_depends_on_the_words_before_and_not_on_those_after(attention: bool) -> None:
    network = small(attention)
    with torch.no_grad():
        features = network(image())
        first, other = (network.log_probabilities(features, torch.tensor([words])) for words in ([1, 2, 3], [1, 2, 1]))
    torch.testing.assert_close(first[:, :3], other[:, :3])
    assert not torch.allclose(first[:, 3], other[:, 3])


@KINDS
@pytest.mark.parametrize("seed", [0, 3, 7])
def test_a_wide_beam_finds_the_most_probable_of_all_captions(attention: bool, seed: int) -> None:
    network = small(attention, seed)
    with torch.no_grad():
        network.speak.bias[END] -= 1
        features = 6 * torch.randn(2, 8, 2, 2, 2, generator=torch.Generator().manual_seed(seed)).double()
        found = network.beam(features, width=4**4, longest=4)
        greedy = network.beam(features, width=1, longest=4)
        for i in range(2):
            best = max(sequences(4), key=lambda said: log_probability(network, features[i : i + 1], said))
            assert [w for w in found[i].tolist() if w] == [w for w in best if w]
            step: list[int] = []
            while len(step) < 4 and END not in step:
                step.append(
                    int(network.log_probabilities(features[i : i + 1], torch.tensor([step]).long())[0, -1].argmax())
                )
            assert [w for w in greedy[i].tolist() if w] == [w for w in step if w]


def test_attention_and_sentinel_share_what_there_is_to_look_at() -> None:
    network = small(True)
    with torch.no_grad():
        features = network(image(2))
        scores, looked = network.attended(features, torch.tensor([[1, 2], [3, 0]]))
        assert looked is not None and looked.grid.shape == (2, 3, 6, 6, 6)
        torch.testing.assert_close(looked.grid.flatten(2).sum(2) + looked.sentinel, torch.ones(2, 3).double())
        # What is seen is the features where it looks, as if nothing had gone to the sentinel.
        share = looked.grid / looked.grid.flatten(2).sum(2)[..., None, None, None]
        torch.testing.assert_close(looked.seen, torch.einsum("ntdhw,nkdhw->ntk", share, features))
        torch.testing.assert_close(scores, network.log_probabilities(features, torch.tensor([[1, 2], [3, 0]])))
    assert small(False).attended(features, torch.tensor([[1], [2]]))[1] is None


def test_attention_is_that_of_the_papers_word_by_word_and_place_by_place() -> None:
    # Lu et al. 2017, equations 9 to 12, with dot products, and a second attention over tokens of the findings.
    network, said = small(True), [END, 2, 3]
    with torch.no_grad():
        features = network(image())
        places = features[0].flatten(1).T
        ends = torch.cat([features[0].flatten(1).mean(1), features[0].flatten(1).amax(1)])
        size, calcified = network.finding_head(ends)[:2].softmax(0), network.finding_head(ends)[2:].softmax(0)
        tokens = torch.stack([size @ network.tokens[:2], calcified @ network.tokens[2:]])
        h = c = torch.zeros(1, 6).double()
        expected = []
        for word in said:
            x, before = network.words.weight[word][None], h
            h, c = network.cell(x, (h, c))
            s = network.gate(torch.cat([x, before], 1)).sigmoid() * c.tanh()
            q = network.query(h)[0]
            scores = [float(q @ network.key(v)) for v in places] + [float(q @ network.sentinel_key(s)[0])]
            *alpha, beta = (torch.tensor(scores).double() / math.sqrt(8)).softmax(0)
            seen = sum(a * v for a, v in zip(alpha, places, strict=True))
            second = torch.stack([network.token_query(h)[0] @ t for t in tokens]).div(math.sqrt(6)).softmax(0) @ tokens
            expected.append(network.speak(h[0] + network.value(seen) + beta * s[0] + second).log_softmax(0))
        found = network.log_probabilities(features, torch.tensor([said[1:]]))
    torch.testing.assert_close(found[0], torch.stack(expected))


def test_the_second_look_can_be_left_out_sample_by_sample() -> None:
    network, words = small(True), torch.tensor([[1, 2], [1, 2]])
    with torch.no_grad():
        features = network(image()).repeat(2, 1, 1, 1, 1)
        both, none = (network.log_probabilities(features, words, findings) for findings in (1.0, 0.0))
        mixed = network.log_probabilities(features, words, torch.tensor([1.0, 0.0]).double())
    torch.testing.assert_close(mixed[0], both[0])
    torch.testing.assert_close(mixed[1], none[1])
    assert not torch.allclose(mixed[0], mixed[1])


@KINDS
@pytest.mark.parametrize("word", [None, 1, "nodule"])
def test_the_gradient_of_a_word_is_that_of_finite_differences(attention: bool, word: str | int | None) -> None:
    network = small(attention)
    model = mx.Model(network, "captioning")
    x = image()
    target = mx.CaptionTarget(word, "a large nodule")
    with model.ready():
        bound = target.bind(model, network(x), [])

        def value(x: Tensor) -> Tensor:
            return bound.value(network(x))

        expected = {None: [1, 2, 3, END], 1: [1, 2], "nodule": [1, 2, 3]}[word]
        so_far = [] if word is None else expected[:-1]
        features = network(x).detach()
        chained = log_probability(network, features, expected) - (
            log_probability(network, features, so_far) if so_far else 0
        )
        assert float(value(x)) == pytest.approx(chained, abs=1e-10)
        direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(5)).double()
        x.requires_grad_()
        (gradient,) = torch.autograd.grad(value(x).sum(), x)
        step = 1e-6
        with torch.no_grad():
            difference = float(value(x + step * direction) - value(x - step * direction)) / (2 * step)
    assert abs(difference) > 1e-6
    assert float((gradient * direction).sum()) == pytest.approx(difference, rel=1e-4)


def test_changed_samples_are_asked_about_their_own_captions() -> None:
    # A perturbation method asks about the samples over and over, in their order.
    network = small(True)
    with torch.no_grad():
        features = network(image(2))
        bound = mx.CaptionTarget(caption=("a large", "nodule")).bind(mx.Model(network, "captioning"), features, [])
        own = bound.value(features)
        expected = [log_probability(network, features[i : i + 1], said) for i, said in enumerate(([1, 2, 0], [3, 0]))]
        torch.testing.assert_close(own, torch.tensor(expected).double())
        torch.testing.assert_close(bound.value(features.repeat(3, 1, 1, 1, 1)), own.repeat(3))


@pytest.mark.parametrize("method", ["hirescam", "integrated_gradients", "occlusion", "lrp"])
def test_every_method_explains_a_word(method: str) -> None:
    network = small(True).float()
    model = mx.Model(network, "captioning", layers=("evidence",))
    quick = {"occlusion": {"window": (12.0,)}}.get(method, {})
    made = mx.explain(model, image()[0].float(), method, mx.CaptionTarget("large", "a large nodule"), **quick)
    other = mx.explain(model, image()[0].float(), method, mx.CaptionTarget("nodule", "a large nodule"), **quick)
    assert made.provenance.target_label == "“large”"
    assert made.data.abs().max() > 0 and not torch.allclose(made.data, other.data)
    assert all(missed < 0.05 for missed in made.residual.values())


class Looker(nn.Module):
    """Says "the left right ." and means by the second word what is at one place, by the third what is at another.

    Unit i of its features is centred at voxel 2 i + 1. Where it says that it looks is `looks`.
    """

    vocabulary = ("the", "left", "right", ".")
    places: ClassVar = {1: (2, 3, 4), 2: (7, 12, 10)}
    sentinel = (1.0, 0.1, 0.3, 0.9)

    def __init__(self, looks: dict[int, tuple[int, int, int]] | None = None) -> None:
        super().__init__()
        self.looks = looks or self.places
        self.grid = nn.AvgPool3d(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.grid(x)

    def beam(self, features: Tensor, width: int = 3) -> Tensor:
        return torch.tensor([[1, 2, 3, 4]]).expand(len(features), -1)

    def log_probabilities(self, features: Tensor, words: Tensor) -> Tensor:
        scores = features.new_zeros(len(features), words.shape[1] + 1, 5)
        for t in range(words.shape[1] + 1):
            place = self.places.get(t)
            scores[:, t, t + 1 if t < 4 else END] = 3.0 if place is None else features[(slice(None), 0, *place)]
        return scores.log_softmax(2)

    def attended(self, features: Tensor, words: Tensor) -> tuple[Tensor, Attention]:
        sentinel = features.new_tensor([*self.sentinel, 1.0])[: words.shape[1] + 1].expand(len(features), -1)
        grid = features.new_zeros(len(features), words.shape[1] + 1, *features.shape[2:])
        for t, place in self.looks.items():
            grid[(slice(None), t, *place)] = 1 - self.sentinel[t]
        return self.log_probabilities(features, words), Attention(grid, sentinel, features.new_zeros(0))


def looker(looks: dict[int, tuple[int, int, int]] | None = None) -> mx.Model:
    return mx.Model(Looker(looks), "captioning", layers=("grid",))


def spotted() -> mx.Volume:
    """An oblique, anisotropic volume that is bright at both places of `Looker`."""
    data = torch.rand(1, 19, 33, 27, generator=torch.Generator().manual_seed(3))
    for place in Looker.places.values():
        data[(0, *(slice(2 * i, 2 * i + 3) for i in place))] += 4
    return mx.Volume(data, oblique_affine())


class Chooser(Looker):
    """Says "right ." where it is dark to the left."""

    def beam(self, features: Tensor, width: int = 3) -> Tensor:
        bright = features[(slice(None), 0, *self.places[1])] > 2
        return torch.where(bright[:, None], torch.tensor([1, 2, 3, 4]), torch.tensor([3, 4, 0, 0]))


def test_a_target_is_bound_at_each_samples_own_caption() -> None:
    model = mx.Model(Chooser(), "captioning")
    bright = spotted().data
    x = torch.stack([bright, bright - 4, bright * 1.5, bright / 3])
    said = ["the left right .", "right .", "the left right .", "right ."]
    both = mx.explain(model, x, "gradient")
    assert list(both.provenance.target["caption"]) == said
    assert both.provenance.target_label == "“the left right .”, “right .”"
    for i in range(4):
        alone = mx.explain(model, x[i], "gradient")
        assert alone.provenance.target == {"kind": "CaptionTarget", "caption": said[i]}
        torch.testing.assert_close(alone.data, both.data[i])
    # In chunks it is the same, and can be computed again.
    halves = [mx.CaptionTarget("right", tuple(said)).part(start, start + 2) for start in (0, 2)]
    assert [half.caption for half in halves] == [tuple(said[:2]), tuple(said[2:])]  # type: ignore[attr-defined]
    torch.testing.assert_close(mx.recompute(both, model, x).data, both.data)
    of_word = mx.explain(model, x, "gradient", mx.CaptionTarget("right"))
    assert of_word.provenance.target["word"] == "right"
    # It is the third word of two captions and the first of the others, which says it of nothing.
    assert [bool(m.any()) for m in of_word.data] == [True, False, True, False]


def test_the_captions_of_chunks_are_those_of_the_batch() -> None:
    bound = [
        mx.CaptionTarget("right").bind(mx.Model(Chooser(), "captioning"), F.avg_pool3d(x, 3, 2), [])
        for x in (spotted().data[None].repeat(2, 1, 1, 1, 1), torch.zeros(1, 1, 19, 33, 27))
    ]
    merged = _of_target([(bound[0], 2), (bound[1], 1)])
    said = ["the left right .", "the left right .", "right ."]
    assert merged["target"] == {"kind": "CaptionTarget", "word": "right", "caption": said}
    assert from_spec(merged["target"]) == mx.CaptionTarget("right", said)


def test_a_name_is_a_word_of_the_caption() -> None:
    model, x = looker(), spotted()
    left = mx.explain(model, x, "gradient", "left")
    assert left.provenance.target == {"kind": "CaptionTarget", "word": "left", "caption": "the left right ."}
    torch.testing.assert_close(left.data, mx.explain(model, x, "gradient", mx.CaptionTarget(1)).data)
    with pytest.raises(mx.MedXAIError, match="There is no word 'left' in the caption 'the right'"):
        mx.explain(model, x, "gradient", mx.CaptionTarget("left", "the right"))
    with pytest.raises(mx.MedXAIError, match="There is no word '7'"):
        mx.explain(model, x, "gradient", mx.CaptionTarget(7))
    with pytest.raises(mx.MedXAIError, match="no word in the network's vocabulary 'rights': did you mean right"):
        mx.explain(model, x, "gradient", mx.CaptionTarget(caption="the rights"))
    with pytest.raises(mx.MedXAIError, match="finds no words: a captioning network has"):
        mx.explain(make_model("resnet18"), torch.randn(1, 24, 24, 16), "gradient", mx.CaptionTarget())
    with pytest.raises(mx.MedXAIError, match="is not of words: ask visual_captioning"):
        mx.explain(model, x, "attention_rollout")


def test_what_a_network_predicts_is_its_caption() -> None:
    found = looker().predict(spotted())
    assert found.text == "The left right." and found.scores == {}


def point(volume: mx.Volume, place: tuple[int, ...]) -> tuple[float, ...]:
    return tuple((volume.affine @ (*(2 * i + 1 for i in place), 1))[:3])


@pytest.mark.parametrize("show", ["attention", "gradient", "both"])
def test_a_word_is_seen_where_it_is_in_the_patient(show: str) -> None:
    volume = spotted()
    told = mx.tell(looker(), volume, "visual_captioning", show=show)
    assert isinstance(told, mx.Caption) and told.text == "The left right."
    assert [w.text for w in told.words] == ["The", "left", "right"]
    assert told.maps.shape == (2, *volume.shape) and np.allclose(told.affine, volume.affine)
    the, left, right = told.words
    assert the.map is the.place is None and (left.map, right.map) == (0, 1)
    np.testing.assert_allclose(left.place, point(volume, Looker.places[1]), atol=1e-4)
    np.testing.assert_allclose(right.place, point(volume, Looker.places[2]), atol=1e-4)
    scores = math.exp(float(F.avg_pool3d(volume.data, 3, 2)[(0, *Looker.places[1])]))
    assert left.confidence == pytest.approx(scores / (scores + 4), rel=1e-5)
    assert [w.numbers["sentinel"] for w in told.words] == pytest.approx([1.0, 0.1, 0.3])


def test_attention_that_is_not_what_a_word_comes_from_is_found_out() -> None:
    volume = spotted()
    honest, lying = (
        mx.tell(looker(looks), volume, "visual_captioning") for looks in (None, {1: (7, 4, 2), 2: Looker.places[2]})
    )
    assert isinstance(honest, mx.Caption) and isinstance(lying, mx.Caption)
    _, left, right = honest.words
    assert min(w.numbers[f"{m}: deletion check"] for w in (left, right) for m in ("attention", "gradient")) > 0.5
    assert left.numbers["rank correlation"] > 0.9
    assert honest.provenance.notes == []
    _, left, right = lying.words
    assert left.numbers["attention: deletion check"] < 0.15 < 0.5 < left.numbers["gradient: deletion check"]
    assert left.numbers["rank correlation"] < 0.1
    (note,) = lying.provenance.notes
    assert "of 'left' marks is hardly what the word comes from" in note and "right" not in note
    for show, place in (("attention", (7, 4, 2)), ("gradient", Looker.places[1])):
        shown = mx.tell(looker({1: (7, 4, 2)}), volume, "visual_captioning", show=show, check=False)
        np.testing.assert_allclose(shown.words[1].place, point(volume, place), atol=1e-4)  # type: ignore[attr-defined]
    unchecked = mx.tell(looker(), volume, "visual_captioning", check=False)
    assert isinstance(unchecked, mx.Caption) and {"sentinel", "rank correlation"} < set(unchecked.words[1].numbers)
    assert not any("deletion" in name for word in unchecked.words for name in word.numbers)


def test_words_that_need_no_image_have_no_map() -> None:
    volume, model = spotted(), looker()
    told = mx.tell(model, volume, "captioning")
    assert isinstance(told, mx.Caption)
    assert [w.map for w in told.words] == [None, 0, 1]
    np.testing.assert_allclose(told.words[2].place, point(volume, Looker.places[2]), atol=1e-4)
    # Without the image all four words and the end are alike probable where the image decides.
    assert [w.numbers["change by the image"] for w in told.words] == pytest.approx(
        [0.0, *(math.log(w.confidence or 0) + math.log(5) for w in told.words[1:])], abs=1e-5
    )
    blind = mx.tell(model, volume, "captioning", least=50.0)
    assert isinstance(blind, mx.Caption) and [w.map for w in blind.words] == [None] * 3 and blind.maps.numel() == 0


class Certain(Looker):
    """Looks for "the", too, which it would say whatever it sees."""

    sentinel = (0.2, 0.1, 0.3, 0.9)

    def log_probabilities(self, features: Tensor, words: Tensor) -> Tensor:
        # Next to nothing comes of the image.
        hint = torch.zeros(words.shape[1] + 1, 5)
        hint[0, 1] = 0.001
        return (super().log_probabilities(features, words) + features.mean() * hint).log_softmax(2)

    def __init__(self) -> None:
        super().__init__({0: (7, 12, 10), **Looker.places})


def test_what_needs_no_image_is_not_checked_by_deleting_a_part_of_it() -> None:
    model = mx.Model(Certain(), "captioning", layers=("grid",))
    told = mx.tell(model, spotted(), "visual_captioning")
    assert isinstance(told, mx.Caption)
    assert [w.map for w in told.words] == [0, 1, 2]
    assert ["attention: deletion check" in w.numbers for w in told.words] == [False, True, True]


class Hasty(Looker):
    """Says "right ." when it searches with one beam."""

    def beam(self, features: Tensor, width: int = 3) -> Tensor:
        return super().beam(features) if width > 1 else torch.tensor([[3, 4]])


def test_the_caption_is_that_of_the_search() -> None:
    model = mx.Model(Hasty(), "captioning", layers=("grid",))
    told = mx.tell(model, spotted(), "captioning", width=1)
    assert isinstance(told, mx.Caption) and told.text == "Right."
    assert told.provenance.target == {"kind": "CaptionTarget", "caption": "right ."}
    assert mx.tell(model, spotted(), "captioning").provenance.target["caption"] == "the left right ."


def test_what_a_person_would_have_said_is_explained_too() -> None:
    volume, model = spotted(), looker()
    told = mx.tell(model, volume, "captioning", mx.CaptionTarget(caption="the right"))
    assert isinstance(told, mx.Caption) and told.text == "The right"
    # "left" was due there.
    assert told.words[1].confidence is not None and told.words[1].confidence < 0.05
    assert told.provenance.target == {"kind": "CaptionTarget", "caption": "the right"}


def test_a_caption_outlives_the_disk_and_is_told_again(tmp_path: Path) -> None:
    volume, model = spotted(), looker()
    told = mx.tell(model, volume, "visual_captioning", width=2)
    assert isinstance(told, mx.Caption)
    read = mx.load_explanation(told.save(tmp_path / "caption"))
    assert isinstance(read, mx.Caption)
    assert read.words == told.words and read.text == told.text and read.provenance == told.provenance
    torch.testing.assert_close(read.maps, told.maps)
    again = mx.recompute(told, model, volume)
    assert again.words == told.words and torch.equal(again.maps, told.maps)


def test_a_network_without_attention_is_no_visual_captioner() -> None:
    with pytest.raises(mx.MedXAIError, match="attends to nothing when it says a word: use captioning"):
        mx.tell(mx.Model(small(False).float(), "captioning"), image()[0].float(), "visual_captioning")
    with pytest.raises(mx.MedXAIError, match="finds no words"):
        mx.tell(make_model("resnet18"), torch.randn(1, 24, 24, 16), "captioning")


class Reporter:
    """Somebody else's report generator."""

    def generate(self, volume: mx.Volume) -> list[Token]:
        seen = torch.zeros(1, 4, 4, 4)
        seen[0, 1, 2, 3] = 1
        coarse = volume.affine.copy()
        coarse[:3, :3] *= 2
        return [Token("large", math.log(0.8), mx.Volume(seen, coarse)), Token("nodule"), Token(".", -0.1)]


def test_somebody_elses_generator_is_shown_with_its_own_attention() -> None:
    volume, model = spotted(), mx.Model(External(Reporter()), "captioning", name="theirs")
    told = mx.tell(model, volume, "captioning")
    assert isinstance(told, mx.Caption) and told.text == "Large nodule."
    large, nodule = told.words
    assert large.confidence == pytest.approx(0.8) and nodule.confidence is nodule.map is None
    np.testing.assert_allclose(large.place, (volume.affine @ (2, 4, 6, 1))[:3], atol=1e-4)
    assert told.maps.shape == (1, *volume.shape) and told.provenance.model["name"] == "theirs"
    assert model.predict(volume).text == told.text
    for method in ("gradient", "occlusion", "rise"):
        with pytest.raises(mx.MedXAIError, match="theirs is a report generator"):
            mx.explain(model, volume, method)


class Plain(nn.Module):
    """A network of plain images that always says the same, in a spelling of its own."""

    vocabulary = ("A", "<unk>", "T2")

    def __init__(self) -> None:
        super().__init__()
        self.seen = nn.Conv2d(1, 4, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        return self.seen(image)

    def log_probabilities(self, features: Tensor, words: Tensor) -> Tensor:
        each: Tensor = features.mean((2, 3)).log_softmax(1)
        return each[:, None].expand(-1, words.shape[1] + 1, -1)

    def beam(self, features: Tensor, width: int = 3) -> Tensor:
        return torch.tensor([[1, 3, 2]]).expand(len(features), -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_plain_images_have_words_and_no_maps(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    network = Plain().to(dtype)
    model = mx.Model(network, "captioning")
    image = mx.Volume(torch.rand(1, 20, 18), np.eye(3))
    told = mx.tell(model, image, "captioning", least=0, check=False)
    assert isinstance(told, mx.Caption) and told.text == model.predict(image).text == "A T2 <unk>"
    with torch.no_grad():
        expected = network(image.data[None].to(dtype)).mean((2, 3)).softmax(1)[0, [1, 3, 2]]
    assert [word.confidence for word in told.words] == pytest.approx(expected.tolist(), rel=1e-5)
    assert len(told.maps) == 0 and {(word.map, word.place) for word in told.words} == {(None, None)}
    # The methods of maps know the words in their own spelling.
    assert mx.explain(model, image, "hirescam", "T2").provenance.target_label == "“T2”"


def test_sentences_as_numbers_know_what_each_word_states() -> None:
    facts = {"nodule": "present", "size": "large", "solidity": "solid", "calcification": "absent"}
    made = [sentence({**facts, "spiculation": "absent"}, 2), sentence({"nodule": "absent"}, 1)]
    said = Said.of(made, tuple(vocabulary()))
    assert said.words.shape == (2, 9) and said.finding.shape == said.real.shape == (2, 10)
    assert [vocabulary()[w - 1] for w in said.words[1].tolist() if w] == "no nodule is seen .".split()
    # large noncalcified nodule of solid density without spicules .
    order = list(FINDINGS)
    expected = ["size", "calcification", "nodule", "", "solidity", "", "spiculation", "spiculation", "", ""]
    assert said.finding[0].tolist() == [order.index(f) if f else -1 for f in expected]
    assert said.finding[1, :5].tolist() == [-2] * 5 and said.real.sum(1).tolist() == [10, 6]


class Perfect(nn.Module):
    """Says the truth about all patches but one; one word in two looks at the nodule, the others at a corner."""

    vocabulary = tuple(vocabulary())
    attention = True

    def __init__(self, patches: Nodules) -> None:
        super().__init__()
        self.words = nn.Embedding(1, 1)
        self.masks = F.avg_pool3d(patches.masks.float(), 4)
        self.truth = [sentence(facts_of(a), i % 4) for i, a in enumerate(patches.attributes)]
        # But of the first, in which there is no nodule.
        self.truth[0] = self.truth[1]
        self.start = 0

    def forward(self, images: Tensor) -> Tensor:
        self.rows = range(self.start, self.start + len(images))
        self.start += len(images)
        return self.masks[self.rows.start : self.rows.stop]

    def beam(self, features: Tensor, width: int) -> Tensor:
        return numbered(self, [" ".join(self.truth[i][0]) for i in self.rows])

    def attended(self, features: Tensor, words: Tensor) -> tuple[Tensor, Attention]:
        scores = features.flatten(1).sum(1)[:, None, None] * torch.ones(1, words.shape[1] + 1, 1 + len(self.vocabulary))
        grid = torch.zeros(len(features), words.shape[1] + 1, *features.shape[2:])
        grid[:, ::2] = features.detach()
        grid[:, 1::2, 0, 0, 0] = 1
        said = Said.of([self.truth[i] for i in self.rows if self.masks[i].any()], self.vocabulary)
        share = torch.where(said.finding >= 0, 0.25, 0.75) * said.real
        return scores, Attention(grid, share, grid[:0])


@pytest.fixture(scope="module")
def patches() -> Nodules:
    return synthesise(Backgrounds.test(), 24, seed=101)


def test_what_is_measured_of_a_network_that_is_right(patches: Nodules) -> None:
    network = Perfect(patches)
    found = captioner.measure(network, patches)  # type: ignore[arg-type]
    # One of 8 without a nodule is called one.
    assert 0.9 < found["bleu_4"] < 1 and found["f1_size"] < 1
    assert found["f1_nodule"] == pytest.approx((2 * 7 / 15 + 2 * 16 / 33) / 2)
    assert found["gradient_pointing"] == 1
    stated = [t % 2 == 0 for _, said in network.truth[1:] for t, finding in enumerate(said) if finding]
    assert found["pointing"] == pytest.approx(sum(stated) / len(stated))
    assert 0.2 < found["pointing"] < 0.8
    assert found["sentinel_finding"] == 0.25 and found["sentinel_function"] == 0.75


def test_the_trunk_begins_as_that_of_the_classifier() -> None:
    own, shipped = build(True), mx.load_model(path("Models/lung_nodule")).network
    for name in ("stem", "texture", "shape", "evidence"):
        for key, value in getattr(shipped, name).state_dict().items():
            torch.testing.assert_close(getattr(own, name).state_dict()[key], value)
    x = torch.rand(1, 1, 40, 40, 40)
    with torch.no_grad():
        kept: list[Tensor] = []
        handle = shipped.evidence.register_forward_hook(lambda m, i, y: kept.append(y))
        shipped.eval()(x)
        handle.remove()
        torch.testing.assert_close(own.eval()(x), kept[0])


def test_word_vectors_are_what_the_embedding_begins_with(tmp_path: Path) -> None:
    file = tmp_path / "glove.txt"
    file.write_text("the 1 2 3\nnodule 0.5 -1 2e-1\nlarge 4 5 6\nelephant 7 8 9\n", encoding="utf-8")
    assert set(read_word_vectors(file, vocabulary())) == {"nodule", "large"}
    network = build(True, file)
    assert network.words.embedding_dim == 3
    torch.testing.assert_close(network.words.weight[1 + vocabulary().index("nodule")], torch.tensor([0.5, -1, 0.2]))
    for text, match in {
        "nodule 1 2\nlarge 1 2 3\n": "Line 2 of .* has 3 numbers, not 2",
        "nodule 1 x\n": "Line 1 of .* is no word with numbers",
        "elephant 1 2\n": "none of the words of the captions",
    }.items():
        file.write_text(text, encoding="utf-8")
        with pytest.raises(mx.MedXAIError, match=match):
            read_word_vectors(file, vocabulary())


def reports(folder: Path, texts: Sequence[str]) -> Path:
    """A table of patches of 50 mm, each of a patient of its own, and their reports."""
    images = synthesise(Backgrounds.training(), len(texts), seed=5).images
    with (folder / "scans.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["volume", "split", "report"])
        for i, (voxels, text) in enumerate(zip(images, texts, strict=True)):
            grid = np.diag([1.25, 1.25, 1.25, 1.0])[:, [2, 1, 0, 3]]
            scan = mx.Volume(voxels.permute(0, 3, 2, 1) * 1400 - 1000, grid)
            sitk.WriteImage(scan.to_sitk(), str(folder / f"{i}.nrrd"))
            writer.writerow([f"{i}.nrrd", ("train", "train", "train", "validation", "test")[i % 5], text])
    return folder / "scans.csv"


@pytest.mark.parametrize("name", ["lung-nodule-captioning", "lung-nodule-visual-captioning"])
def test_a_network_learns_from_a_persons_own_reports(name: str, tmp_path: Path) -> None:
    texts = [f"A {size} shadow, number {i}, I said {i}." for i, size in enumerate(("small", "large") * 5)]
    table = read_table(reports(tmp_path, texts), Grid(24, 2.0))
    measured = train(name, tmp_path / "mine", mx.Run(), quick=True, data=table)
    assert {"bleu_4", "shuffled_bleu_4", "most_frequent_cider_d", "seconds"} <= set(measured)
    model = mx.load_model(tmp_path / "mine")
    # Every number is in one report only, if twice.
    assert model.network.vocabulary == (",", ".", "a", "i", "large", "number", "said", "shadow", "small")
    metadata = json.loads((tmp_path / "mine" / "configs" / "metadata.json").read_text(encoding="utf-8"))
    assert metadata["network_data_format"]["outputs"]["pred"]["spatial_shape"] == [6, 6, 6]
    assert model.task == "captioning" and model.patch_size == (24, 24, 24)
    scan = mx.load_volume(tmp_path / "4.nrrd")
    told = mx.explain(model, scan, "hirescam", mx.CaptionTarget("large", "a large shadow"), region=(24.0, 24.0, 24.0))
    assert told.data.shape == scan.data.shape and model.predict(scan, (24.0, 24.0, 24.0)).scores == {}
    card = (tmp_path / "mine" / "docs" / "README.md").read_text(encoding="utf-8")
    assert "says what a report would" in card and "Never use it for a patient" in card


def test_reports_that_nothing_can_be_learnt_from_are_refused(tmp_path: Path) -> None:
    table = read_table(reports(tmp_path, ["seen"] * 4 + [""]), Grid(24, 2.0))
    with pytest.raises(mx.MedXAIError, match=r"Row 6 .*report.*is empty"):
        train("lung-nodule-captioning", tmp_path / "mine", mx.Run(), quick=True, data=table)
    table = read_table(reports(tmp_path, ["one", "two", "three", "four", "five"]), Grid(24, 2.0))
    with pytest.raises(mx.MedXAIError, match="No word is in two reports"):
        train("lung-nodule-captioning", tmp_path / "mine", mx.Run(), quick=True, data=table)


NODULE = (21.9, 120.5, -611.5)
"""Of the chest CT, RAS mm."""


@cache
def shipped(name: str) -> mx.Model:
    return mx.load_model(path(f"Models/{name}"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lung_nodule_captioning", "lung_nodule_visual_captioning"])
def test_the_shipped_networks_tell_what_is_in_the_other_patient(name: str) -> None:
    model = shipped(name)
    assert model.task == "captioning" and model.patch_size == (40, 40, 40)
    # Patches that nobody has looked at.
    found = captioner.measure(model.network.eval(), synthesise(Backgrounds.test(), 120, seed=101))  # type: ignore[arg-type]
    assert found["bleu_4"] >= 0.7
    assert min(found[f"f1_{finding}"] for finding in ("size", "solidity", "calcification")) >= 0.8
    assert found["shuffled_bleu_4"] <= 0.7 * found["bleu_4"]
    assert found["shuffled_f1_all"] < 0.4 and found["most_frequent_f1_all"] < 0.4
    if "visual" in name:
        assert found["pointing"] >= 0.85 and found["gradient_pointing"] >= 0.85
        assert found["sentinel_finding"] < 0.1 and found["sentinel_function"] > 0.9


def test_the_real_nodule_is_described_and_every_finding_is_seen_in_it() -> None:
    scan, nodule = (mx.load_volume(path(f"SampleData/chest_ct_nodule{end}.nrrd")) for end in ("", "_mask"))
    told = mx.tell(shipped("lung_nodule_visual_captioning"), scan, "visual_captioning", region=NODULE)
    assert isinstance(told, mx.Caption)
    facts = read(told.text)
    assert facts["nodule"] == "present" and set(facts) == set(FINDINGS)
    # Of 1.36 mL, which is 13.8 mm across as a sphere, and called spiculated by the classifier, too.
    assert facts["size"] == "medium" and facts["spiculation"] == "present" and facts["calcification"] == "absent"
    mask = resample(nodule.data.ne(0).float(), nodule.affine, scan.shape, scan.affine, nearest=True)[0]
    seen = [word for word in told.words if word.map is not None]
    assert len(seen) >= 5
    for word in seen:
        assert word.place is not None
        at = np.linalg.solve(scan.affine, (*word.place, 1))[:3].round().astype(int)
        assert mask[tuple(at)] == 1, word.text
    assert all(word.numbers["sentinel"] > 0.5 for word in told.words if word.map is None)
    decided = [word for word in seen if "attention: deletion check" in word.numbers]
    assert {"spiculated"} <= {word.text for word in decided}
    assert all(word.numbers["attention: deletion check"] > 0.15 for word in decided)
