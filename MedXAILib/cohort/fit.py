"""A scan brought to a template by SimpleITK, with numbers on how well; what did not go well is refused, with a reason.

By Mattes' mutual information (Mattes et al., IEEE TMI 2003), which suits CT and MR, and one to the other: rigid from
several starts, then affine, then B-splines, on finer grids each time. Whether a scan is of the template's anatomy at
all is asked of its mirror images: but for the one from left to right, they must fit clearly worse.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import SimpleITK as sitk

from MedXAILib.errors import MedXAIError, unknown
from MedXAILib.volume import Volume

KINDS = ("rigid", "affine", "deformable")
_Linear = sitk.Euler3DTransform | sitk.AffineTransform

# Voxels of the template on its grids, coarse to fine, of how many of them the finer ones take samples, and how often
# they improve a linear transform.
_GRIDS, _SAMPLES = (3e4, 2e5, 1e6), 5e4
_ITERATIONS = (100, 20, 20)
_BINS = 32
# Cells of the B-splines along each axis, and points along each at which they are judged.
_CELLS, _JUDGED = 8, 24

# What a fit must show. These were chosen on the pairs that docs/cohort.md lists.
_SIMILAR, _ADVANTAGE, _SIDES = 0.12, 1.1, 0.95
_COVERED, _OF_POSSIBLE = 0.25, 0.5
_SCALED, _RESIDUAL = 2.5, 0.02

_LEFT_RIGHT = (0,)
_MIRRORS = (_LEFT_RIGHT, (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2))


@dataclass(frozen=True)
class Fit:
    """The `transform` from points of the template to points of the scan (LPS mm, as SimpleITK has it), numbers about
    it, and the `reason` why it must not be used ("": it may).

    - `before`, `similarity`: how much template and scan say of each other, as they lie and registered: twice their
      mutual information by the sum of their entropies, from 0 to 1.
    - `advantage`: the similarity by that of the scan's best mirror image but the one from left to right; `sides`: by
      that of this one.
    - `covered`: the share of the template that the scan covers.
    - `scaled`: the volume in the scan of what is 1 in the template.
    - `residual_mm`: how far points of the template come to lie apart (root of the mean square) when the last linear
      step is done again, from beside and with other samples.
    - deformable: `deformed_mm`, how far B-splines move points of the template (likewise), and `jacobian_low` and
      `jacobian_high`, the least and the greatest volume that they make of 1; 0 and less is a fold.
    """

    transform: sitk.Transform
    quality: dict[str, float]
    reason: str


def fit(scan: Volume, template: Volume, kind: str = "affine", mask: Volume | None = None, seed: int = 0) -> Fit:
    """Register `scan` to `template`; the same on every call with the same `seed`.

    Args:
        kind: "rigid" for the same patient, "affine" for others, "deformable" to follow them in detail.
        mask: where in the template it should fit, above 0, on any grid of its space; everywhere without.

    Raises:
        MedXAIError: for scans that are constant, not finite or flat.
    """
    if kind not in KINDS:
        raise unknown("kind of registration", kind, KINDS)
    # What several threads add up depends on how they share it.
    threads = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    try:
        return _fit(scan, template, kind, mask, seed)
    finally:
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(threads)


def _fit(scan: Volume, template: Volume, kind: str, mask: Volume | None, seed: int) -> Fit:
    fixed, moving, inside = _image(template), _image(scan), None if mask is None else _image(mask)
    coarse, *finer = (_level(fixed, moving, inside, *of, seed) for of in zip(_GRIDS, _ITERATIONS, strict=True))
    linear = max((coarse.improved(start) for start in coarse.starts()), key=coarse.rank)
    if kind != "rigid":
        linear = coarse.improved(_affine(linear))
    upright = coarse.similarity(linear)[0]
    turned = {axes: coarse.mirrored(axes, linear) for axes in _MIRRORS}
    fits = {axes: level.similarity(level.improved(linear))[0] for axes, level in turned.items()}
    for level in finer:
        linear = level.improved(linear)
    again = replace(finer[-1], seed=seed + 1).improved(_beside(linear, finer[-1].step))
    points = _points(fixed)
    quality = {
        "before": finer[0].similarity(sitk.Transform(3, sitk.sitkIdentity))[0],
        "advantage": upright / max(*(fits[axes] for axes in _MIRRORS if axes != _LEFT_RIGHT), 1e-6),
        "sides": upright / max(fits[_LEFT_RIGHT], 1e-6),
        "scaled": float(np.linalg.det(np.reshape(linear.GetMatrix(), (3, 3)))),
        "residual_mm": _apart(linear, again, points),
    }
    found: sitk.Transform = linear
    if kind == "deformable":
        splines = finer[0].deformed(linear)
        low, high = _jacobian(splines, fixed)
        still = sitk.Transform(3, sitk.sitkIdentity)
        quality |= {"deformed_mm": _apart(splines, still, points), "jacobian_low": low, "jacobian_high": high}
        found = sitk.CompositeTransform([linear, splines])
    quality["similarity"], quality["covered"] = finer[0].similarity(found)
    return Fit(found, quality, _reason(quality, coarse.possible, _extent(fixed)))


def _reason(quality: dict[str, float], possible: float, extent: float) -> str:
    """Why a fit must not be used; "" if it may."""
    q = quality
    low = q.get("jacobian_low", 1.0)
    asked = [
        (q["similarity"] >= _SIMILAR, f"template and scan have little in common ({q['similarity']:.2f})"),
        (q["advantage"] >= _ADVANTAGE, f"turned about, it fits as well ({q['advantage']:.2f} times): another anatomy?"),
        (q["sides"] >= _SIDES, f"with left and right exchanged, it fits better ({1 / q['sides']:.2f} times)"),
        (q["covered"] >= max(_COVERED, _OF_POSSIBLE * possible), f"it covers {q['covered']:.0%} of the template"),
        (1 / _SCALED < q["scaled"] < _SCALED, f"it was scaled {q['scaled']:.2f} times"),
        (q["residual_mm"] <= _RESIDUAL * extent, f"done again, it lies {q['residual_mm']:.1f} mm elsewhere"),
        (low > 0, f"it folds (Jacobian determinant {low:.2f})"),
    ]
    wrong = [said for right, said in asked if not right]
    return f"The registration failed: {'; '.join(wrong)}." if wrong else ""


@dataclass(frozen=True)
class _Level:
    """Template and scan, and where in the template they should fit, in voxels of about `step` mm."""

    fixed: sitk.Image
    moving: sitk.Image
    inside: sitk.Image | None
    step: float
    iterations: int
    seed: int

    @property
    def possible(self) -> float:
        """The share of the template that a scan of this size can cover."""
        return min(1.0, (_extent(self.moving) / _extent(self.fixed)) ** 3)

    def starts(self) -> Iterator[sitk.Euler3DTransform]:
        """As they lie, middle on middle, and centre of mass on centre of mass."""
        lying = sitk.Euler3DTransform()
        lying.SetCenter(_middle(self.fixed))
        yield lying
        for how in (sitk.CenteredTransformInitializerFilter.GEOMETRY, sitk.CenteredTransformInitializerFilter.MOMENTS):
            start = sitk.CenteredTransformInitializer(self.fixed, self.moving, sitk.Euler3DTransform(), how)
            yield sitk.Euler3DTransform(start)

    def improved(self, start: _Linear) -> _Linear:
        """The linear transform of the same kind to which `start` leads, itself if that is nowhere."""
        method, found = self._method(), type(start)(start)
        method.SetOptimizerAsGradientDescentLineSearch(1.0, self.iterations, 1e-6, 10)
        method.SetOptimizerScalesFromPhysicalShift()
        method.SetInitialTransform(found, inPlace=True)
        try:
            method.Execute(self.fixed, self.moving)
        except RuntimeError:
            # They do not overlap, or no longer did.
            return start
        return found

    def deformed(self, before: sitk.Transform) -> sitk.Transform:
        """B-splines between the template and the linear transform `before`."""
        method = self._method()
        splines = sitk.BSplineTransformInitializer(self.fixed, [_CELLS] * 3)
        method.SetOptimizerAsLBFGSB(1e-5, 25, 5, 35)
        method.SetMovingInitialTransform(before)
        method.SetInitialTransform(splines, inPlace=True)
        method.SetShrinkFactorsPerLevel([2, 1])
        method.SetSmoothingSigmasPerLevel([1, 0])
        method.Execute(self.fixed, self.moving)
        return splines

    def similarity(self, through: sitk.Transform) -> tuple[float, float]:
        """See `Fit`, and the share of the template that is covered."""
        laid = sitk.GetArrayFromImage(sitk.Resample(self.moving, self.fixed, through, sitk.sitkLinear, -1.0))
        there = sitk.GetArrayFromImage(self.fixed)
        if self.inside is not None:
            inside = sitk.GetArrayFromImage(self.inside) > 0
            there, laid = there[inside], laid[inside]
        on = laid >= 0
        joint, *_ = np.histogram2d(there[on], laid[on], _BINS, [[0, 1], [0, 1]])
        both, one, other = (_entropy(counts) for counts in (joint, joint.sum(0), joint.sum(1)))
        return 2 * (one + other - both) / max(one + other, 1e-9), float(on.mean())

    def rank(self, through: sitk.Transform) -> tuple[bool, float]:
        """The better, the greater. What overlaps little is soon alike."""
        similarity, covered = self.similarity(through)
        return covered >= _OF_POSSIBLE * self.possible, similarity

    def mirrored(self, axes: Sequence[int], through: sitk.Transform) -> _Level:
        """With the scan mirrored along `axes` where `through` lays the middle of the template."""
        about = np.array(through.TransformPoint(_middle(self.fixed)))
        turn = np.diag([-1.0 if axis in axes else 1.0 for axis in range(3)])
        moving = sitk.Image(self.moving)
        moving.SetDirection((turn @ np.reshape(moving.GetDirection(), (3, 3))).ravel().tolist())
        moving.SetOrigin((turn @ (moving.GetOrigin() - about) + about).tolist())
        return replace(self, moving=moving)

    def _method(self) -> sitk.ImageRegistrationMethod:
        method = sitk.ImageRegistrationMethod()
        method.SetMetricAsMattesMutualInformation(_BINS)
        method.SetInterpolator(sitk.sitkLinear)
        share = _SAMPLES / self.fixed.GetNumberOfPixels()
        if share < 1:
            method.SetMetricSamplingStrategy(method.RANDOM)
            # A seed of 0 is the clock.
            method.SetMetricSamplingPercentage(share, self.seed + 1)
        if self.inside is not None:
            method.SetMetricFixedMask(self.inside)
        return method


def _level(
    fixed: sitk.Image, moving: sitk.Image, inside: sitk.Image | None, voxels: float, iterations: int, seed: int
) -> _Level:
    step = _extent(fixed) / voxels ** (1 / 3)
    coarse = _coarser(fixed, step)
    if inside is not None:
        identity = sitk.Transform(3, sitk.sitkIdentity)
        inside = sitk.Resample(inside, coarse, identity, sitk.sitkNearestNeighbor, 0.0, sitk.sitkUInt8)
    return _Level(coarse, _coarser(moving, step), inside, step, iterations, seed)


def _image(volume: Volume) -> sitk.Image:
    """The first channel as 0 to 1, but for its extremes, which are seldom of the anatomy.

    Raises:
        MedXAIError: when it is constant, not finite or flat.
    """
    volume.check()
    if len(volume.shape) < 3 or min(volume.shape) < 4:
        name = volume.source or "The scan"
        raise MedXAIError(f"{name} is too flat to be registered: it has {' x '.join(map(str, volume.shape))} voxels.")
    image = sitk.Cast(Volume(volume.data[:1], volume.affine).to_sitk(), sitk.sitkFloat32)
    low, high = np.percentile(sitk.GetArrayViewFromImage(image), (0.5, 99.5))
    return sitk.Clamp((image - float(low)) / max(float(high - low), 1e-6), sitk.sitkFloat32, 0.0, 1.0)


def _coarser(image: sitk.Image, step: float) -> sitk.Image:
    """The image in voxels of about `step` mm, along axes where its own are smaller."""
    pairs = zip(image.GetSpacing(), image.GetSize(), strict=True)
    return sitk.BinShrink(image, [max(1, min(round(step / spacing), size // 4)) for spacing, size in pairs])


def _extent(image: sitk.Image) -> float:
    """The side of a cube as large, in mm."""
    return float(np.prod(np.array(image.GetSize()) * image.GetSpacing()) ** (1 / 3))


def _middle(image: sitk.Image) -> tuple[float, ...]:
    return image.TransformContinuousIndexToPhysicalPoint([(size - 1) / 2 for size in image.GetSize()])


def _entropy(counts: np.ndarray) -> float:
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def _affine(rigid: _Linear) -> sitk.AffineTransform:
    return sitk.AffineTransform(rigid.GetMatrix(), rigid.GetTranslation(), rigid.GetCenter())


def _beside(linear: _Linear, step: float) -> _Linear:
    moved = type(linear)(linear)
    moved.SetTranslation([along + step for along in linear.GetTranslation()])
    return moved


def _points(image: sitk.Image) -> np.ndarray:
    """Points all over an image, as (z, y, x, 3), LPS mm."""
    ends = [np.linspace(0, size - 1, _JUDGED) for size in image.GetSize()]
    index = np.stack(np.meshgrid(*ends[::-1], indexing="ij"), -1)[..., ::-1]
    return np.array(image.GetOrigin()) + index @ _steps(image).T


def _steps(image: sitk.Image) -> np.ndarray:
    return np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()


def _moved(through: sitk.Transform, points: np.ndarray) -> np.ndarray:
    return np.array([through.TransformPoint(point) for point in points.reshape(-1, 3).tolist()]).reshape(points.shape)


def _apart(one: sitk.Transform, other: sitk.Transform, points: np.ndarray) -> float:
    return math.sqrt(np.mean(np.sum((_moved(one, points) - _moved(other, points)) ** 2, -1)))


def _jacobian(through: sitk.Transform, image: sitk.Image) -> tuple[float, float]:
    """The range of the Jacobian determinant over an image."""
    moved = _moved(through, _points(image))
    spans = (np.array(image.GetSize()) - 1) / (_JUDGED - 1)
    slopes = np.stack([np.gradient(moved, axis=axis) for axis in (2, 1, 0)], -1) / spans
    found = np.linalg.det(slopes @ np.linalg.inv(_steps(image)))
    return float(found.min()), float(found.max())


def inverse(through: sitk.Transform, grid: sitk.Image) -> sitk.Transform:
    """The transform back; of one that is not linear, found by iteration from where it lays the voxels of `grid`."""
    try:
        return through.GetInverse()
    except RuntimeError:
        pass
    if through.GetName() == "CompositeTransform":
        parts = sitk.CompositeTransform(through)
        back = [inverse(parts.GetNthTransform(i), grid) for i in range(parts.GetNumberOfTransforms())]
        return sitk.CompositeTransform(back[::-1])
    coarse = _coarser(sitk.Cast(grid, sitk.sitkFloat32), _extent(grid) / _GRIDS[1] ** (1 / 3))
    where = coarse.GetSize(), coarse.GetOrigin(), coarse.GetSpacing(), coarse.GetDirection()
    moves = sitk.TransformToDisplacementField(through, sitk.sitkVectorFloat64, *where)
    return sitk.DisplacementFieldTransform(sitk.InvertDisplacementField(moves, 50))
