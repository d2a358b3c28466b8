"""Healthy lung in the place of what is taken away: as good as its card says, and only where it knows its way."""

from __future__ import annotations

import json
from functools import cache

import numpy as np
import pytest
import torch
from model_cards import metrics_of
from torch import Tensor, nn

import MedXAILib as mx
from benchmarks import infills as page
from MedXAILib import resources
from MedXAILib.engines.masks import Masks
from MedXAILib.explainer import Question
from MedXAILib.infills.choice import INFILLS, infill
from MedXAILib.infills.infill import Infill
from MedXAILib.model import Prepared
from MedXAILib.networks.healthy_tissue import HealthyTissue, smoothed
from MedXAILib.run import Run
from MedXAILib.synthetic.lung_nodules import CLASSES, SPACING_MM, Backgrounds, Nodules, draw, render, synthesise
from MedXAILib.training import healthy_tissue

FOLDER = "Models/infills/healthy_lung"
SEED = 811
"""Neither the training, nor the card, nor the table has seen these patches."""
HU = 1400


@cache
def network() -> HealthyTissue:
    found: HealthyTissue = mx.load_model(resources.path(FOLDER)).network.eval()  # type: ignore[assignment]
    return found.requires_grad_(False)


@cache
def patches() -> Nodules:
    """A third of them is healthy."""
    return synthesise(Backgrounds.test(), 36, SEED)


def lung(size: int = 40) -> Tensor:
    return patches().images[:1, :, :size, :size, :size]


def question(x: Tensor, spacing: float = SPACING_MM, seed: int = 0) -> Question:
    affine = np.diag([spacing, spacing, spacing, 1.0])
    return Question(mx.Model(nn.Conv3d(x.shape[1], 2, 1)), x, [Prepared(x[0], affine)], [], Run(seed=seed))


def healthy(x: Tensor, **how: object) -> Infill:
    return infill(question(x, **how), "healthy")  # type: ignore[arg-type]


def box(x: Tensor, low: tuple[int, ...], size: int) -> Masks:
    return Masks.boxes(torch.tensor([low]), (size,) * 3, x)


def test_it_is_as_good_as_its_card_says() -> None:
    card = metrics_of(resources.path(FOLDER))
    found = healthy_tissue.measure(network(), patches())
    # Other patches of the same lung: some of them are more difficult than others, for every infill alike.
    for name in ("error_hu", "likeliest_hu"):
        assert found[name] / found["inpaint_hu"] == pytest.approx(card[name] / card["inpaint_hu"], rel=0.25)
    assert found["likeliest_hu"] <= found["error_hu"] < 0.8 * found["blur_hu"] < found["mean_hu"]
    assert 2 < found["spread_hu"] < found["error_hu"]


def test_the_card_says_what_was_measured() -> None:
    folder = resources.path(FOLDER)
    card = metrics_of(folder)
    text = (folder / "docs" / "README.md").read_text("utf-8")
    for name in ("error_hu", "likeliest_hu", "blur_hu", "mean_hu", "inpaint_hu", "spread_hu"):
        assert f"| {card[name]:.0f} |" in text, name
    assert "Never use it for a patient" in text
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= 2_000_000


def test_a_nodule_is_replaced_by_lung() -> None:
    attributes, labels = draw(12, SEED)
    ill = render(Backgrounds.test(), attributes, labels, SEED)
    well = render(Backgrounds.test(), attributes, torch.zeros_like(labels), SEED)
    errors = []
    for image, truth, mask in zip(ill.images, well.images, ill.masks, strict=True):
        if bool(mask.any()):
            share = healthy_tissue._grown(mask[None]).float()
            filled = healthy(image[None]).patches(Masks.everywhere(share), [0])[0]
            errors.append([float((one - truth)[mask].abs().mean()) * HU for one in (image, filled)])
    before, after = torch.tensor(errors).mean(0)
    assert after < before / 4


def test_the_classifier_no_longer_sees_the_real_nodule() -> None:
    found = healthy_tissue.real(network(), Backgrounds.test())
    assert found["before_malignant"] > 0.9
    assert found["after_malignant"] < 0.3
    assert found["after_hu"] < -700 < found["before_hu"]


def test_a_draw_repeats_and_another_one_differs() -> None:
    x = lung()
    masks = box(x, (12, 14, 10), 9)
    first, again, other = (healthy(x).patches(masks, [d]) for d in (3, 3, 4))
    assert torch.equal(first, again)
    assert float((first - other).abs().mean()) * HU > 1
    assert not torch.equal(healthy(x, seed=1).patches(masks, [3]), first)


def test_chunks_do_not_matter() -> None:
    x = lung()
    low = torch.tensor([[0, 0, 0], [12, 14, 10], [30, 31, 32], [5, 31, 20]])
    asked = healthy(x)
    together = asked.patches(Masks.boxes(low, (8, 8, 8), x), range(4))
    alone = [asked.patches(Masks.boxes(low[i : i + 1], (8, 8, 8), x), [i]) for i in range(4)]
    assert torch.allclose(together, torch.cat(alone), atol=1e-5)


def test_what_is_hidden_does_not_matter_and_what_is_not_stays() -> None:
    x = lung()
    share = (torch.rand(2, 1, 40, 40, 40, generator=torch.Generator().manual_seed(1)) < 0.1).float()
    share[0, :, 10:22, 10:22, 10:22] = 1
    masks = Masks.everywhere(share)
    filled = healthy(x).patches(masks, [0, 1])
    kept = (share == 0).expand_as(filled)
    assert torch.equal(filled[kept], x.expand_as(filled)[kept])
    other = torch.where(share[:1] > 0, x.flip(2), x)
    assert torch.allclose(healthy(other).patches(Masks.everywhere(share[:1]), [0]), filled[:1], atol=1e-5)


@pytest.mark.parametrize("low", [(0, 0, 0), (31, 0, 15), (31, 31, 31)])
def test_a_mask_at_the_border_is_filled_with_lung_too(low: tuple[int, ...]) -> None:
    x = lung()
    filled = healthy(x).patches(box(x, low, 9), [0])
    inside = x[(..., *(slice(a, a + 9) for a in low))]
    assert float((filled - inside).abs().mean()) < float((x.mean() - inside).abs().mean())
    assert 0 <= float(filled.min()) <= float(filled.max()) <= 1


def test_a_box_is_the_same_as_a_mask_of_all_of_the_sample() -> None:
    x = lung()
    share = torch.zeros(1, 1, 40, 40, 40)
    share[..., 12:21, 14:23, 10:19] = 1
    small, large = (healthy(x).patches(m, [0]) for m in (box(x, (12, 14, 10), 9), Masks.everywhere(share)))
    assert torch.allclose(small, large[..., 12:21, 14:23, 10:19], atol=1e-5)


@pytest.mark.parametrize("size", [(40, 24, 33), (61, 40, 50)])
def test_samples_and_masks_of_any_size(size: tuple[int, ...]) -> None:
    x = patches().images[:1].repeat(1, 1, 2, 2, 2)[(..., *(slice(0, n) for n in size))]
    everything = healthy(x).patches(Masks.everywhere(torch.ones(1, 1, *size)), [0])
    assert everything.shape == x.shape
    # Nothing is seen: lung all over.
    assert float(everything.mean()) < 0.4
    part = box(x, (20, 3, 11), 18)
    filled = healthy(x).patches(part, [0])
    assert filled.shape == (1, 1, 18, 18, 18)


@pytest.mark.parametrize("why", ["spacing", "hounsfield", "standardised", "channels", "even"])
def test_what_it_does_not_know_is_refused(why: str) -> None:
    x = lung()
    changed = {
        "spacing": x,
        "hounsfield": x * HU - 1000,
        "standardised": (x - x.mean()) / x.std(),
        "channels": x.repeat(1, 2, 1, 1, 1),
        "even": torch.zeros_like(x),
    }[why]
    with pytest.raises(mx.MedXAIError, match=r"lung CT only.*1\.25 mm.*use 'inpaint'"):
        healthy(changed, spacing=2.0 if why == "spacing" else SPACING_MM)


def test_the_start_is_smooth_and_keeps_what_is_seen() -> None:
    axis = torch.linspace(0.1, 0.9, 40)
    ramp = axis.reshape(1, 1, 40, 1, 1).expand(1, 1, 40, 40, 40).clone()
    hidden = torch.zeros_like(ramp, dtype=torch.bool)
    hidden[..., 14:24, 12:22, 15:25] = True
    start = smoothed(ramp.masked_fill(hidden, -1.0))
    assert torch.allclose(start[~hidden], ramp[~hidden], atol=1e-6)
    assert float((start - ramp)[hidden].abs().mean()) < 0.03
    nothing = smoothed(torch.full((1, 1, 16, 16, 16), -1.0))
    assert torch.allclose(nothing, torch.full_like(nothing, 0.1), atol=1e-6)


def test_a_few_steps_of_training_help_and_the_draws_learn_what_is_hidden() -> None:
    torch.manual_seed(0)
    learner, some = HealthyTissue(width=4), synthesise(Backgrounds.training(), 9, seed=5)
    optimiser = torch.optim.AdamW(learner.parameters(), lr=1e-2)
    losses = []
    for _ in range(16):
        optimiser.zero_grad()
        value = healthy_tissue.loss(learner, some)
        value.backward()
        optimiser.step()
        losses.append(float(value.detach()))
    assert losses[-1] < losses[0] - 0.2
    assert losses[0] == pytest.approx(float(healthy_tissue.loss(HealthyTissue(width=4), some).detach()), abs=1.0)


def test_the_latent_variables_know_what_the_surroundings_do_not() -> None:
    healthy_ones = patches().labels == CLASSES.index("none")
    truth = patches().images[healthy_ones]
    seen = truth.clone()
    seen[..., 14:26, 14:26, 14:26] = -1
    start = smoothed(seen)
    mean, _ = network().posterior(seen, truth, start)
    hidden = seen < 0
    known, unknown = (
        float((network().fill(seen, noise, start) - truth)[hidden].abs().mean())
        for noise in (mean, torch.zeros_like(mean))
    )
    assert known < 0.9 * unknown


def test_the_page_says_what_was_measured() -> None:
    rows = json.loads(page.RESULTS.read_text("utf-8"))["rows"]
    again = "run: python -m benchmarks.infills"
    assert page.PAGE.read_text("utf-8") == page.markdown(rows), again
    assert {row["infill"] for row in rows if row["method"] == "occlusion"} == set(page.NAMES) <= set(INFILLS), again
    assert all(len(row["peak"]) == 2 * page.OF_EACH_CLASS for row in rows)


def test_distances_and_hits_of_the_page() -> None:
    mask = torch.zeros(20, 20, 20, dtype=torch.bool)
    mask[5:8, 5:8, 5:8] = True
    moved = mask.roll(4, 0)
    assert page.hausdorff(mask, moved) == pytest.approx((5.0, 5.0))
    stray = mask.clone()
    stray[5, 5, 19] = True
    worst, most = page.hausdorff(stray, mask)
    assert (worst, most) == (pytest.approx(12 * SPACING_MM), 0.0)
    found = page.located(mask.float() + 0.5 * moved.float(), mask)
    assert (found["hausdorff_mm"], found["peak"]) == (0.0, 1.0)
    assert found["mass"] == pytest.approx(2 / 3)
    missed = page.located(moved.float(), mask)
    assert (missed["hausdorff_mm"], missed["peak"], missed["mass"]) == (pytest.approx(5.0), 0.0, 0.0)
