"""The picture, the page and the numbers of an explanation."""

from __future__ import annotations

from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from PIL import Image
from plain_map import saliency

from MedXAILib.errors import MedXAIError
from MedXAILib.explanation import SaliencyMap
from MedXAILib.model import Prediction
from MedXAILib.report import interval
from MedXAILib.report import montage as drawing
from MedXAILib.report.localisation import Localisation, centre, localise, peak
from MedXAILib.report.methods import markdown
from MedXAILib.report.montage import letter, montage
from MedXAILib.report.page import Shown, page
from MedXAILib.volume import Volume

SIZE = 380
MARKER = np.array([21.0, -14.0, 33.0])  # RAS mm


def oblique(shape: tuple[int, int, int] = (30, 44, 52)) -> tuple[sitk.Image, np.ndarray]:
    """An oblique grid of uneven spacing, and the place of each of its voxels in RAS mm as SimpleITK has it."""
    turned = sitk.Euler3DTransform((0, 0, 0), 0.3, -0.2, 0.5).GetMatrix()
    image = sitk.Image(shape[::-1], sitk.sitkFloat32)
    image.SetSpacing((1.9, 2.3, 3.1))
    image.SetDirection((np.reshape(turned, (3, 3)) @ np.diag([-1.0, 1.0, -1.0])).ravel().tolist())
    middle = image.TransformContinuousIndexToPhysicalPoint([(s - 1) / 2 for s in image.GetSize()])
    image.SetOrigin((np.array([-10.0, 5.0, 20.0]) - middle).tolist())
    places = [image.TransformIndexToPhysicalPoint(i[::-1]) for i in np.ndindex(shape)]
    return image, (np.array(places) * [-1, -1, 1]).reshape(*shape, 3)


def sphere(radius: float = 6.0) -> tuple[Volume, SaliencyMap, Volume]:
    """A bright sphere at MARKER in an oblique scan, a map that peaks there, and the segmentation of the sphere."""
    image, places = oblique()
    away = np.linalg.norm(places - MARKER, axis=-1)

    def stored(values: np.ndarray) -> Volume:
        made = sitk.GetImageFromArray(values.astype(np.float32))
        made.CopyInformation(image)
        return Volume.from_sitk(made)

    # The nearest voxel to the marker, not the marker, is where the map peaks.
    heat = stored(np.exp(-((away / 12) ** 2)) + 1e-3)
    return stored(1000 * (away < radius) + places[..., 0]), saliency(heat.data, heat.affine), stored(away < radius)


def panel(picture: Image.Image, column: int, row: int) -> np.ndarray:
    sheet = drawing._Sheet
    left, top = sheet.gap + column * (SIZE + sheet.gap), sheet.header + row * (SIZE + sheet.gap)
    return np.asarray(picture)[top : top + SIZE, left : left + SIZE].astype(float)


@pytest.mark.parametrize(("column", "right", "down"), [(0, (-1, 0, 0), (0, -1, 0)), (1, (-1, 0, 0), (0, 0, -1)),
                                                       (2, (0, -1, 0), (0, 0, -1))])  # fmt: skip
def test_marker_is_drawn_where_it_is_in_the_patient(column, right, down):
    volume, heat, _ = sphere()
    _, places = oblique()
    steps = np.array([3.1, 2.3, 1.9]) / 2  # the grid reaches half a voxel beyond the outer centres, along its own axes
    axes = volume.affine[:3, :3] / volume.spacing
    reach = np.abs(axes) @ steps
    low, high = places.min((0, 1, 2)) - reach, places.max((0, 1, 2)) + reach
    offset = (MARKER - (low + high) / 2) / ((high - low).max() / SIZE)
    x, y = (round(SIZE / 2 + offset @ np.array(v)) for v in (right, down))
    seen = panel(montage(volume, heat, window=(0, 1000)), column, 0)[y - 20 : y + 21, x - 20 : x + 21, 0]
    rows, columns = np.nonzero(seen > 128)
    assert len(rows) > 100
    assert abs(rows.mean() - 20) < 1.5 and abs(columns.mean() - 20) < 1.5


@pytest.mark.parametrize("stored", ["RAS", "LPS", "PIR", "ASL"])
def test_picture_does_not_depend_on_how_the_scan_is_stored(stored):
    grid = sitk.GetImageFromArray(np.random.default_rng(0).normal(size=(20, 24, 28)).astype(np.float32))
    grid.SetSpacing((2.0, 2.5, 3.0))
    pictures = []
    for image in (grid, sitk.DICOMOrient(grid, stored)):
        volume = Volume.from_sitk(image)
        pictures.append(montage(volume, saliency(volume.data.clamp_min(0), volume.affine)))
    assert np.abs(np.subtract(*(np.asarray(p).astype(float) for p in pictures))).max() <= 2


def test_letters_follow_radiological_convention():
    volume, _, _ = sphere()
    views = drawing._views(volume, np.zeros(3), 1.0, 100)
    sides = [(letter(-v.axes[:, 0]), letter(v.axes[:, 0]), letter(-v.axes[:, 1]), letter(v.axes[:, 1])) for v in views]
    assert sides == [("R", "L", "A", "P"), ("R", "L", "S", "I"), ("A", "P", "S", "I")]


def test_outline_lies_on_the_border_of_the_segmentation():
    radius = 12.0
    volume, heat, segmentation = sphere(radius)
    plain, outlined = montage(volume, heat), montage(volume, heat, segmentation)
    assert np.array_equal(panel(plain, 0, 0), panel(outlined, 0, 0))  # the scan alone stays alone
    rows, columns = np.nonzero(np.abs(panel(outlined, 0, 1) - drawing._OUTLINE).max(-1) < 12)
    assert len(rows) > 100
    step = drawing._field(volume, heat)[1] / SIZE
    away = np.hypot(rows - rows.mean(), columns - columns.mean()) * step
    assert abs(away.mean() - radius) < 1.0
    assert not (np.abs(panel(plain, 0, 1) - drawing._OUTLINE).max(-1) < 12).any()


def test_picture_is_deterministic():
    volume, heat, segmentation = sphere()
    first, second = (montage(volume, heat, segmentation, probability=0.9).tobytes() for _ in range(2))
    assert first == second


def test_small_map_is_shown_close_with_an_overview():
    volume, heat, _ = sphere()
    near = torch.where(heat.data > 0.3, heat.data, 0.0)
    centre_, field, zoomed = drawing._field(volume, saliency(near, heat.affine))
    assert zoomed and field < drawing._whole(volume)[1] / 1.2
    assert np.abs(centre_ - MARKER).max() < 4
    assert not drawing._field(volume, heat)[2]


def test_plain_image_gives_one_panel_without_letters():
    data = torch.rand(1, 40, 30)
    affine = np.diag([2.0, 2.0, 1.0])
    picture = montage(Volume(data, affine), saliency(data, affine))
    assert picture.width < 2 * SIZE


def test_signed_and_empty_maps_have_a_picture():
    volume, heat, _ = sphere()
    colours = panel(montage(volume, saliency(-heat.data, heat.affine, signed=True)), 0, 1)
    assert (colours[..., 2] > colours[..., 0] + 60).any()  # blue: against
    montage(volume, saliency(torch.zeros_like(heat.data), heat.affine))


def test_map_of_another_scan_is_refused():
    volume, heat, _ = sphere()
    with pytest.raises(MedXAIError, match="not of this scan"):
        montage(volume, saliency(heat.data[:, :-1], heat.affine))


@pytest.mark.parametrize("signed", [False, True])
def test_lightness_rises_with_the_value(signed):
    ends = [np.linspace(0, 1, 101), np.linspace(0, -1, 101)] if signed else [np.linspace(0, 1, 101)]
    for values in ends:
        lightness = drawing._coloured(values, signed) @ [0.2126, 0.7152, 0.0722]
        assert (np.diff(lightness) > -1).all() and lightness[-1] > lightness[0] + 100


@pytest.mark.parametrize(("most", "length"), [(31.0, 20.0), (50.0, 50.0), (0.7, 0.5), (9.9, 5.0)])
def test_scale_bar_is_round(most, length):
    assert drawing._round_length(most) == pytest.approx(length)


def test_windows():
    air = np.full((9, 9), -800.0)
    assert drawing._window(np.array([-1000.0, 400.0]), air) == drawing._LUNG
    assert drawing._window(np.array([-1000.0, 400.0]), air + 850) == drawing._SOFT_TISSUE
    low, high = drawing._window(np.arange(1001.0), air)
    assert (low, high) == (10, 990)


def test_localisation_of_a_hit():
    _, heat, segmentation = sphere(20.0)
    met = localise(heat, segmentation)
    assert met.hit and met.distance == 0
    assert np.linalg.norm(np.array(met.peak) - MARKER) < 2.5
    assert 0.75 < met.mass < 0.85 and 0.02 < met.chance < 0.2
    assert np.abs(np.array(centre(segmentation)) - MARKER).max() < 1
    assert met.words("nodule")[0] == "Hit: the peak of the map lies in the nodule."


def test_localisation_of_a_miss_on_another_grid():
    data = torch.zeros(1, 10, 10, 10)
    data[0, 5, 5, 2], data[0, 5, 5, 8] = 3.0, 1.0
    affine = np.diag([1.0, 1.0, 1.0, 1.0])
    mask = torch.zeros(1, 20, 20, 20)
    mask[0, 10:12, 10:12, 16:18] = 7  # twice as fine: voxel (5, 5, 8)
    fine = np.diag([0.5, 0.5, 0.5, 1.0])
    fine[:3, 3] = -0.25
    met = localise(saliency(data, affine), Volume(mask, fine))
    assert not met.hit and met.distance == pytest.approx(6.0)
    assert met.mass == pytest.approx(0.25)
    assert "6 mm away" in met.words()[0]


def test_only_what_speaks_for_the_target_is_located():
    data = torch.zeros(1, 4, 4, 4)
    data[0, 0, 0, 0], data[0, 1, 2, 3] = -9.0, 2.0
    assert peak(saliency(data, np.eye(4), signed=True)) == (1.0, 2.0, 3.0)
    assert peak(saliency(data.clamp_max(0), np.eye(4), signed=True)) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(("shift", "value", "said"), [(0.0, 0.0, "is empty"), (1e4, 1.0, "has no voxel in the scan")])
def test_segmentation_that_cannot_be_met(shift, value, said):
    _, heat, segmentation = sphere()
    affine = segmentation.affine.copy()
    affine[0, 3] += shift
    with pytest.raises(MedXAIError, match=said):
        localise(heat, Volume(segmentation.data * value, affine))


class Tags(HTMLParser):
    """What a browser would make of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def test_page_escapes_what_others_wrote_and_asks_nobody_for_anything():
    evil = "</title><script>alert(1)</script><img src=x onerror='alert(2)'>\"{0}"
    data = torch.rand(1, 8, 8, 8)
    made = {
        "target_label": evil,
        "model": {"name": evil, "task": "classification", evil: evil},
        "volume": {"source": evil, "fingerprint": evil},
        "notes": [evil],
        "parameters": {"layers": [evil]},
    }
    shown = Shown(
        saliency(data, np.eye(4), **made), Image.new("RGB", (8, 8)), Localisation((0.0, 0.0, 0.0), True, 0.0, 0.5, 0.01)
    )
    said = Prediction(torch.zeros(1, 2), {evil: 0.75, "benign": 0.25})
    text = page(shown, said, others=[shown])
    tags = Tags(text).found
    assert {tag for tag, _ in tags}.isdisjoint({"script", "link", "iframe", "object", "a", "base", "form"})
    images = [attributes for tag, attributes in tags if tag == "img"]
    assert len(images) == 2 and all(i["src"].startswith("data:image/png;base64,") for i in images)
    assert not any(name.startswith("on") for _, attributes in tags for name in attributes)
    assert "http:" not in text and "https:" not in text and "url(" not in text
    assert "0.750" in text and "not for diagnosis" in text.lower()


def test_page_says_how_to_read_the_method():
    data = torch.rand(1, 8, 8, 8)
    text = page(Shown(saliency(data, np.eye(4)), Image.new("RGB", (8, 8))))
    assert "Grad-CAM asks: Which features" in text and "Its limits: " in text
    # A method that is not registered (any more) can still be read about.
    assert "old_method" in page(Shown(saliency(data, np.eye(4), method="old_method"), Image.new("RGB", (8, 8))))


def test_page_says_in_plain_words_how_much_is_missed():
    found = replace(saliency(torch.rand(1, 8, 8, 8), np.eye(4)), residual={"unexplained": 0.25, "<theory>": 0.5})
    text = page(Shown(found, Image.new("RGB", (8, 8))))
    assert ">the linear rule leaves 25.0% of what the network said unexplained</abbr>." in text
    assert "&lt;theory&gt;: 50.0%</abbr>" in text and "<theory>" not in text
    (first, _) = [attributes["title"] for tag, attributes in Tags(text).found if tag == "abbr"]
    assert first.startswith("1 − R² of the fit")


def test_partial_maps_are_called_so():
    volume, heat, _ = sphere()
    partial = saliency(heat.data, heat.affine, partial=True, notes=["Stopped early, at step 3 of 9: partial."])
    pages = [page(Shown(one, Image.new("RGB", (8, 8)))) for one in (heat, partial)]
    assert ["This map is partial" in text for text in pages] == [False, True]
    assert "Stopped early, at step 3 of 9" in pages[1]
    assert drawing._title(partial, None) == 'Grad-CAM: why "marker", partial: stopped early'
    assert montage(volume, partial).tobytes() != montage(volume, heat).tobytes()


def test_interval_is_that_of_the_strongest_voxel_and_of_the_median():
    values, half = np.array([0.0, 1.0, -4.0, 2.0, 0.0]), np.array([0.0, 0.1, 0.5, 0.3, 0.05])
    said = "95 % interval: ± 0.5 at the strongest voxel, ± 0.2 in the median"
    assert interval.in_words(values, half) == said
    assert interval.in_words(values, np.where(half == 0.5, np.inf, half)).startswith("95 % interval: unknown at")
    assert interval.in_words(0 * values, 0 * half) == ""
    volume, heat, _ = sphere()
    sure = replace(heat, interval=heat.data / 10)
    strongest = f"{float(heat.data.max()) / 10:.2g}"
    assert f"95 % interval: ± {strongest} at the strongest" in page(Shown(sure, Image.new("RGB", (8, 8))))
    assert f"± {strongest}" in drawing._sure(sure) and not drawing._sure(heat)
    assert montage(volume, sure).tobytes() != montage(volume, heat).tobytes()


def test_documentation_of_the_methods_is_up_to_date():
    written = Path(__file__).resolve().parent.parent / "docs" / "methods.md"
    assert written.read_text(encoding="utf-8") == markdown(), "run: medxai methods --markdown > docs/methods.md"
