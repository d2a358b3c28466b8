"""The picture of a map: planes through its peak, the scan alone above and with the map below.

Display follows radiological convention whatever the orientation of the voxel grid: the patient's right is on the
viewer's left, anterior and superior are up, and the sagittal plane is seen from the patient's left.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import SimpleITK as sitk
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from MedXAILib.errors import MedXAIError
from MedXAILib.explanation import SaliencyMap
from MedXAILib.grid import corners, transform
from MedXAILib.report import interval
from MedXAILib.report.localisation import extent, peak
from MedXAILib.report.methods import title as title_of
from MedXAILib.volume import Volume

# Values and colours in between are interpolated. Lightness rises with the absolute value, so that the order is seen
# without colour vision; blue and orange are told apart by nearly everyone.
_UNSIGNED = (
    (0, (60, 10, 90)),
    (0.25, (150, 20, 110)),
    (0.5, (225, 60, 60)),
    (0.75, (250, 145, 20)),
    (1, (255, 240, 130)),
)
_SIGNED = (
    (-1, (170, 225, 255)),
    (-0.5, (40, 130, 235)),
    (0, (40, 40, 60)),
    (0.5, (220, 85, 15)),
    (1, (255, 210, 110)),
)
_OPACITY = 0.8

# Less than this, as a fraction of the largest, is not coloured: it would only dirty the scan.
FAINTEST = 0.04

_OUTLINE = (90, 255, 170)
_TEXT, _FAINT, _BACKGROUND, _EMPTY = (235, 235, 235), (165, 165, 165), (16, 16, 18), (0, 0, 0)

# The ends of the axes R, A and S.
_SIDES = ("RL", "AP", "SI")

# Where a map is not zero is shown with some of what is around it, and no closer than this.
_MARGIN, _SMALLEST_FIELD_MM = 1.6, 60.0

_LUNG, _SOFT_TISSUE = (-1350.0, 150.0), (-160.0, 240.0)


@dataclass(frozen=True)
class Plane:
    """A way to look at the patient. `right` and `down` are where these of the viewer point, in RAS."""

    name: str
    right: tuple[int, int, int]
    down: tuple[int, int, int]


_AXIAL = Plane("Axial", right=(-1, 0, 0), down=(0, -1, 0))
_CORONAL = Plane("Coronal", right=(-1, 0, 0), down=(0, 0, -1))
_SAGITTAL = Plane("Sagittal", right=(0, -1, 0), down=(0, 0, -1))


@dataclass(frozen=True)
class View:
    """A square canvas of `size` pixels of `step` mm about `centre`; `axes` (rank, 2 or 3) are where its right and down
    (and the viewing direction) point. In RAS mm; images without a third axis have none here either."""

    name: str
    axes: np.ndarray
    centre: np.ndarray
    step: float
    size: int

    def pixel(self, point: np.ndarray) -> tuple[float, float]:
        """Where a point in RAS mm is drawn, (x, y)."""
        x, y = (np.asarray(point) - self.centre) @ self.axes[:, :2] / self.step + (self.size - 1) / 2
        return float(x), float(y)

    def sample(self, image: sitk.Image, outside: float) -> np.ndarray:
        """`image` on the canvas, (size, size); `outside` where it has no voxels."""
        rank = image.GetDimension()
        to_lps = np.array([-1.0, -1.0, 1.0][:rank])
        corner = self.centre - self.axes[:, :2].sum(1) * self.step * (self.size - 1) / 2
        canvas = sitk.Resample(
            image,
            [self.size, self.size, 1][:rank],
            sitk.Transform(rank, sitk.sitkIdentity),
            sitk.sitkLinear,
            (corner * to_lps).tolist(),
            [self.step] * rank,
            (self.axes * to_lps[:, None]).ravel().tolist(),
            outside,
            sitk.sitkFloat32,
        )
        return np.asarray(sitk.GetArrayFromImage(canvas)).reshape(self.size, self.size)


def montage(
    volume: Volume,
    saliency_map: SaliencyMap,
    segmentation: Volume | None = None,
    window: tuple[float, float] | None = None,
    title: str | None = None,
    probability: float | None = None,
    channel: int = 0,
    size: int = 380,
    bright: str = "speaks for",
) -> Image.Image:
    """Axial, coronal and sagittal planes through the peak of a map, at one scale (one plane for a plain image).

    Args:
        volume: the scan that was explained; `channel` of it is shown.
        saliency_map: its map, for one scan; several channels are summed.
        segmentation: outlined in the lower row, on any grid.
        window: the values shown black and white; found by itself when left out.
        title, probability: what is written above; the method and the target when left out.
        size: pixels along the side of a plane.
        bright: what the brightest colour means.

    Raises:
        MedXAIError: for the maps of a batch, and a map that is not on the grid of the scan.
    """
    if saliency_map.batched or tuple(saliency_map.data.shape[1:]) != volume.shape:
        raise MedXAIError(
            f"A map of shape {tuple(saliency_map.data.shape)} is not of this scan {tuple(volume.data.shape)}: give one "
            "map with the volume that was explained."
        )
    scan = Volume(volume.data[channel : channel + 1], volume.affine).to_sitk()
    heat = Volume(saliency_map.data.sum(0, keepdim=True), saliency_map.affine).to_sitk()
    outline = None
    if segmentation is not None:
        marked = (segmentation.data != 0).any(0, keepdim=True).float()
        outline = Volume(marked, segmentation.affine).to_sitk()
    focus = np.array(peak(saliency_map))
    centre, field, zoomed = _field(volume, saliency_map)
    views = [_through(view, focus) for view in _views(volume, centre, field / size, size)]
    planes = [view.sample(scan, np.nan) for view in views]
    low, high = window or _window(volume.data[channel].numpy(), np.stack(planes))
    largest = _largest(saliency_map.data)

    shown = f"   channel {channel + 1} of {len(volume.data)}" if len(volume.data) > 1 else ""
    sheet = _Sheet(len(views), size)
    below = _where(focus) + _windowed(low, high) + shown + _sure(saliency_map)
    sheet.title(title or _title(saliency_map, probability), below)
    for column, (view, plane) in enumerate(zip(views, planes, strict=True)):
        grey = _grey(plane, low, high)
        drawn = _overlay(grey, view.sample(heat, 0.0), largest, saliency_map.signed)
        if outline is not None:
            drawn = _outlined(drawn, view.sample(outline, 0.0), min(volume.spacing) / view.step)
        for row, pixels in enumerate((grey, drawn)):
            panel = Image.fromarray(pixels)
            _annotate(panel, view, focus, named=row == 0, lettered=len(volume.shape) == 3)
            sheet.put(panel, column, row)
    if zoomed:
        middle, whole = _whole(volume)
        for row, view in enumerate(_views(volume, middle, whole / sheet.side, sheet.side)):
            view = _through(view, focus)
            small = Image.fromarray(_grey(view.sample(scan, np.nan), low, high))
            _frame(small, view, views[row])
            sheet.locator(small, row)
    sheet.colours(largest, saliency_map.signed, bright)
    sheet.footer(outline is not None, len(volume.shape) == 3)
    return sheet.image


@dataclass(frozen=True)
class Look:
    """How planes are drawn that are to be compared by eye: `field` mm wide, `window` black to white, `size` pixels."""

    field: float
    window: tuple[float, float]
    size: int

    @classmethod
    def at(cls, volume: Volume, focus: Sequence[float], field: float, size: int = 240) -> Look:
        """What suits the plane of `volume` through `focus`."""
        view = _plane(volume, np.array(focus), field, size)
        plane = view.sample(Volume(volume.data[:1], volume.affine).to_sitk(), np.nan)
        return cls(field, _window(volume.data[0].numpy(), plane), size)

    def draw(self, volume: Volume, focus: Sequence[float], heat: Tensor | Volume | None = None) -> Image.Image:
        """The axial plane of `volume` (its first channel) through `focus` (RAS mm), and over it a map: (1, D, H, W) on
        the same grid, or one in its own place."""
        view = _plane(volume, np.array(focus), self.field, self.size)
        scan = Volume(volume.data[:1], volume.affine)
        pixels = _grey(view.sample(scan.to_sitk(), np.nan), *self.window)
        if heat is not None:
            seen = heat if isinstance(heat, Volume) else Volume(heat, volume.affine)
            pixels = _overlay(pixels, view.sample(seen.to_sitk(), 0.0), _largest(seen.data), bool(seen.data.min() < 0))
        return Image.fromarray(pixels)


def _plane(volume: Volume, focus: np.ndarray, field: float, size: int) -> View:
    return _views(volume, focus, field / size, size)[0]


class _Sheet:
    """The page: a title, two rows of panels, and to the right of them where we are and what the colours mean."""

    gap, header, foot, side = 10, 62, 34, 118

    def __init__(self, columns: int, size: int) -> None:
        self.size = size
        self.right = self.gap + columns * (size + self.gap)
        height = self.header + 2 * (size + self.gap) + self.foot
        self.image = Image.new("RGB", (self.right + self.side + self.gap, height), _BACKGROUND)
        self.draw = ImageDraw.Draw(self.image)

    def title(self, text: str, below: str) -> None:
        width = self.image.width - 2 * self.gap
        self._text((self.gap, 8), _fitting(text, 24, width), 24, _TEXT)
        self._text((self.gap, 38), _fitting(below, 14, width), 14, _FAINT)

    def put(self, panel: Image.Image, column: int, row: int) -> None:
        self.image.paste(panel, (self.gap + column * (self.size + self.gap), self._top(row)))

    def locator(self, small: Image.Image, row: int) -> None:
        self.image.paste(small, (self.right, self._top(0) + row * (self.side + 8)))

    def colours(self, largest: float, signed: bool, bright: str) -> None:
        top, height, width = self._top(1) + 26, self.size - 52, 22
        bottom = -1.0 if signed else 0.0
        values = np.linspace(1, bottom, height)[:, None].repeat(width, 1)
        self.image.paste(Image.fromarray(_coloured(values, signed)), (self.right, top))
        self.draw.rectangle((self.right - 1, top - 1, self.right + width, top + height), outline=_FAINT)
        for value in np.linspace(1, bottom, 5):
            y = top + (1 - value) / (1 - bottom) * (height - 1)
            self.draw.line((self.right + width, y, self.right + width + 5, y), fill=_FAINT)
            self._text((self.right + width + 9, y), f"{value * largest:.2g}", 14, _TEXT, "lm")
        self._text((self.right, top - 9), bright, 14, _FAINT, "ls")
        if signed:
            self._text((self.right, top + height + 6), "speaks against", 14, _FAINT, "lt")

    def footer(self, outlined: bool, convention: bool) -> None:
        x, y = self.gap, self.image.height - self.foot / 2 - 2
        if outlined:
            self.draw.line((x, y, x + 24, y), fill=_OUTLINE, width=2)
            x += 32
        said = ["segmentation"] * outlined + ["ticks: peak of the map"]
        said += ["patient's right on the left"] * convention + ["research use only, not for diagnosis"]
        self._text((x, y), _fitting("   |   ".join(said), 14, self.image.width - x - self.gap), 14, _FAINT, "lm")

    def _top(self, row: int) -> int:
        return self.header + row * (self.size + self.gap)

    def _text(
        self, at: tuple[float, float], text: str, size: int, colour: tuple[int, int, int], anchor: str = "la"
    ) -> None:
        self.draw.text(at, text, colour, ImageFont.load_default(size), anchor)


def _title(saliency_map: SaliencyMap, probability: float | None) -> str:
    made = saliency_map.provenance
    said = "" if probability is None else f" (probability {probability:.2f})"
    partial = ", partial: stopped early" if made.partial else ""
    return f'{title_of(made.method)}: why "{made.target_label}"{said}{partial}'


def _sure(saliency_map: SaliencyMap) -> str:
    if saliency_map.interval is None:
        return ""
    return "   " + interval.in_words(saliency_map.data.numpy(), saliency_map.interval.numpy())


def _where(point: np.ndarray) -> str:
    if len(point) < 3:
        return ""
    return "peak at " + ", ".join(_position(point, axis) for axis in range(3)) + "   "


def _windowed(low: float, high: float) -> str:
    digits = ".0f" if high - low > 20 else ".3g"
    return f"window {high - low:{digits}}, level {(low + high) / 2:{digits}}"


def _position(point: np.ndarray, axis: int) -> str:
    """A coordinate of a point in RAS mm, with the side of the patient instead of a sign."""
    return f"{_SIDES[axis][int(point[axis] < 0)]} {abs(point[axis]):.1f} mm"


def _views(volume: Volume, centre: np.ndarray, step: float, size: int) -> list[View]:
    if len(volume.shape) == 2:
        # A plain image has no place in the patient: it is shown as it is stored.
        axes = volume.affine[:2, :2][:, ::-1] / np.array(volume.spacing)[::-1]
        return [View("Image", axes, centre, step, size)]
    views = []
    for plane in (_AXIAL, _CORONAL, _SAGITTAL):
        right, down = np.array(plane.right, float), np.array(plane.down, float)
        views.append(View(plane.name, np.stack([right, down, np.cross(right, down)], 1), centre, step, size))
    return views


def _through(view: View, point: np.ndarray) -> View:
    """The same view in the plane that holds `point`."""
    if view.axes.shape[1] == 2:
        return view
    normal = view.axes[:, 2]
    return View(view.name, view.axes, view.centre + normal * ((point - view.centre) @ normal), view.step, view.size)


def _field(volume: Volume, saliency_map: SaliencyMap) -> tuple[np.ndarray, float, bool]:
    """The centre (RAS mm) and side (mm) of what is shown, and whether that is only a part of the scan."""
    middle, whole = _whole(volume)
    box = extent(saliency_map.data)
    if box is None:
        return middle, whole, False
    first, end = np.array([(side.start, side.stop) for side in box]).T
    low, high = _bounds(volume.affine, first - 0.5, end - 0.5)
    region = saliency_map.provenance.region
    # About the point where the network was told to look, so that the maps of several methods show the same.
    centre = (low + high) / 2 if region is None else np.reshape(region, (-1, len(low))).mean(0)
    field = max(2 * _MARGIN * float(np.maximum(high - centre, centre - low).max()), _SMALLEST_FIELD_MM)
    return (centre, field, True) if field < 0.8 * whole else (middle, whole, False)


def _whole(volume: Volume) -> tuple[np.ndarray, float]:
    reach = transform(volume.affine, corners(volume.shape))
    low, high = reach.min(0), reach.max(0)
    return (low + high) / 2, float((high - low).max())


def _bounds(affine: np.ndarray, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The smallest box in RAS mm around array indices `low` to `high`."""
    points = transform(affine, np.array(list(product(*zip(low, high, strict=True)))))
    return points.min(0), points.max(0)


def _window(values: np.ndarray, seen: np.ndarray) -> tuple[float, float]:
    """The values to show black and white: the lung or soft-tissue window when they look like Hounsfield units."""
    if values.min() <= -500 and values.max() <= 5000:
        aerated = ((seen > -950) & (seen < -500)).mean()
        return _LUNG if aerated > 0.1 else _SOFT_TISSUE
    low, high = np.percentile(_some(values), (1, 99))
    return (float(low), float(high)) if high > low else (float(values.min()), float(values.max()))


def _largest(data: Tensor) -> float:
    """The value of a map (C, ...) that gets the last colour. A few stray voxels must not make the rest invisible."""
    values = data.sum(0).abs().flatten().numpy()
    values = values[values > 0]
    return float(np.quantile(_some(values), 0.999)) if values.size else 1.0


def _some(values: np.ndarray) -> np.ndarray:
    """Enough of them for a percentile."""
    flat = values.reshape(-1)
    return flat[:: 1 + flat.size // 2_000_000]


def _grey(values: np.ndarray, low: float, high: float) -> np.ndarray:
    scaled = ((np.nan_to_num(values, nan=low) - low) / max(high - low, 1e-12)).clip(0, 1)
    return (255 * scaled).round().astype(np.uint8)[..., None].repeat(3, -1)


def _coloured(values: np.ndarray, signed: bool) -> np.ndarray:
    """Colours (..., 3) of values between -1 or 0 and 1."""
    at, colours = zip(*(_SIGNED if signed else _UNSIGNED), strict=True)
    channels = [np.interp(values, at, [c[i] for c in colours]) for i in range(3)]
    return np.stack(channels, -1).round().astype(np.uint8)


def _overlay(grey: np.ndarray, values: np.ndarray, largest: float, signed: bool) -> np.ndarray:
    scaled = (values / largest).clip(-1 if signed else 0, 1)
    opacity = (_OPACITY * (np.abs(scaled) - FAINTEST).clip(0) ** 0.6)[..., None]
    return (grey * (1 - opacity) + _coloured(scaled, signed) * opacity).round().astype(np.uint8)


def _outlined(pixels: np.ndarray, mask: np.ndarray, voxel: float) -> np.ndarray:
    """The outline of `mask` (0 to 1), an even line about the level of one half; a voxel is `voxel` pixels wide."""
    smooth = sitk.GetArrayFromImage(sitk.SmoothingRecursiveGaussian(sitk.GetImageFromArray(mask), [voxel / 2] * 2))
    slope = np.hypot(*np.gradient(smooth))
    # To first order the level is this many pixels away.
    away = np.abs(smooth - 0.5) / np.maximum(slope, 1e-6)
    for width, colour in ((2.2, _EMPTY), (1.1, _OUTLINE)):
        opacity = (width + 0.5 - away).clip(0, 1)[..., None] * (0.5 if colour == _EMPTY else 1)
        pixels = (pixels * (1 - opacity) + np.array(colour) * opacity).round().astype(np.uint8)
    return pixels


def _annotate(panel: Image.Image, view: View, focus: np.ndarray, named: bool, lettered: bool) -> None:
    draw, size = ImageDraw.Draw(panel), view.size
    x, y = view.pixel(focus)
    # Ticks point at the peak from four sides, and leave it free.
    near, far = size / 11, size / 7.5
    for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1)):
        ends = (x + near * dx, y + near * dy, x + far * dx, y + far * dy)
        draw.line(ends, fill=_EMPTY, width=3)
        draw.line(ends, fill=_TEXT)
    if lettered:
        right, down = view.axes[:, 0], view.axes[:, 1]
        _label(draw, (5, size / 2), letter(-right), 18, "lm")
        _label(draw, (size - 5, size / 2), letter(right), 18, "rm")
        _label(draw, (size / 2, 4), letter(-down), 18, "mt")
        _label(draw, (size / 2, size - 5), letter(down), 18, "ms")
        if named:
            _label(draw, (6, 5), f"{view.name}  {_position(focus, int(np.abs(view.axes[:, 2]).argmax()))}", 15, "la")
    length = _round_length(size * view.step / 4)
    pixels = length / view.step
    draw.line((10, size - 10, 10 + pixels, size - 10), fill=_EMPTY, width=4)
    draw.line((10, size - 10, 10 + pixels, size - 10), fill=_TEXT, width=2)
    _label(draw, (10, size - 15), f"{length:g} mm", 13, "ls")


def letter(direction: np.ndarray) -> str:
    """The side of the patient that a direction in RAS points to."""
    axis = int(np.abs(direction).argmax())
    return _SIDES[axis][int(direction[axis] < 0)]


def _label(draw: ImageDraw.ImageDraw, at: tuple[float, float], text: str, size: int, anchor: str) -> None:
    font = ImageFont.load_default(size)
    left, top, right, bottom = draw.textbbox(at, text, font, anchor)
    draw.rectangle((left - 3, top - 3, right + 3, bottom + 3), fill=_EMPTY)
    draw.text(at, text, _TEXT, font, anchor)


def _frame(small: Image.Image, view: View, shown: View) -> None:
    """Where the canvas `shown` lies in the overview `view`."""
    half = shown.step * shown.size / 2 / view.step
    x, y = view.pixel(shown.centre)
    ImageDraw.Draw(small).rectangle((x - half, y - half, x + half, y + half), outline=_UNSIGNED[3][1])


def _round_length(most: float) -> float:
    """The largest of 1, 2, 5, 10, 20 … that is no more than `most`."""
    power = 10.0 ** np.floor(np.log10(most))
    return float(max(m * power for m in (1, 2, 5) if m * power <= most))


def _fitting(text: str, size: int, width: float) -> str:
    """`text` in the letters that the font has, cut to `width` pixels."""
    known = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    font = ImageFont.load_default(size)
    if font.getlength(known) <= width:
        return known
    while known and font.getlength(known + " ...") > width:
        known = known[:-1]
    return known + " ..."
