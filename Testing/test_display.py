"""How maps are shown in Slicer, on its own scene and views, and what of it a saved scene brings back."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

slicer = pytest.importorskip("slicer")

import slicer_scene  # noqa: E402
from slicer_scene import SliceView, SpaceView, oblique_node  # noqa: E402

from MedXAILib.explanation import Provenance, SaliencyMap  # noqa: E402
from MedXAILib.hotspots import SHARES  # noqa: E402
from MedXAILib.report import montage  # noqa: E402
from MedXAISlicerLib import answers, colours, display, geometry, hotspots, mrml, results  # noqa: E402

SIZE = (12, 16, 20)  # (D, H, W)
MADE = Provenance(
    method="hirescam",
    title="HiResCAM",
    parameters={"positive": True},
    target={"kind": "ClassTarget", "which": 1},
    target_label='bösartig; "a" & <b> 100 %',
    model={"name": "Network"},
    volume={"source": "Scan"},
    versions={},
    seed=0,
    device="cpu",
    created="2026-01-01T00:00:00+00:00",
    seconds=1.5,
    peak_memory=0,
    forwards=1,
    backwards=1,
    notes=["Went on with 4 at a time."],
)


@pytest.fixture
def app():
    with slicer_scene.opened() as app:
        yield app


def blob(signed: bool) -> np.ndarray:
    """A map (D, H, W): one place for, and for signed maps a weaker one against."""
    k, j, i = np.indices(SIZE)
    blob = np.exp(-((k - 6) ** 2 + (j - 9) ** 2 + (i - 12) ** 2) / 8)
    if signed:
        blob -= 0.5 * np.exp(-((k - 6) ** 2 + (j - 4) ** 2 + (i - 4) ** 2) / 8)
    return (blob * (np.abs(blob) > 1e-3)).astype(np.float32)


def add(array: np.ndarray, signed: bool, **changed):
    """The scan of `oblique_node`, with an explanation whose map is `array`, (D, H, W) or (C, D, H, W)."""
    scan, *_ = oblique_node(np.random.default_rng(0).normal(size=array.shape[-3:]).astype(np.float32))
    scan.CreateDefaultDisplayNodes()
    made = MADE.model_copy(update=changed)
    affine = geometry.ijkToRas(scan)[:, [2, 1, 0, 3]]
    data = torch.tensor(array).reshape(-1, *array.shape[-3:])
    saliency = SaliencyMap(made, {"completeness": 0.004}, data, affine, signed)
    return scan, mrml.addSaliency(scan, answers.of(saliency))


def table(node) -> np.ndarray:
    """The colours of a colour node, (n, 4)."""
    lookup = node.GetLookupTable()
    return np.array([lookup.GetTableValue(i) for i in range(lookup.GetNumberOfTableValues())])


@pytest.mark.parametrize("signed", [False, True])
def test_window(app, signed):
    array = blob(signed)
    _, made = add(array, signed)
    shown = made.GetDisplayNode()
    limit = np.percentile(np.abs(array[array != 0]), 99)
    assert shown.GetWindowLevelMax() == pytest.approx(limit)
    assert shown.GetWindowLevelMin() == pytest.approx(-limit if signed else 0)
    assert not shown.GetAutoWindowLevel()
    assert shown.GetInterpolate()


def test_map_of_nothing_is_shown(app):
    for signed in (False, True):
        _, made = add(np.zeros(SIZE, np.float32), signed)
        display.show(made)
        assert made.GetDisplayNode().GetWindowLevelMax() == 1
        spots = results.part(made, "HotSpots").GetSegmentation()
        assert spots.GetNumberOfSegments() == len(SHARES)


def test_colours_are_made_once_for_a_scene(app):
    nodes = {
        signed: [add(blob(signed), signed)[1].GetDisplayNode().GetColorNode() for _ in range(2)] for signed in (0, 1)
    }
    assert nodes[0][0] is nodes[0][1]
    assert nodes[1][0] is nodes[1][1]
    assert nodes[0][0] is not nodes[1][0]


def test_colours_are_those_of_the_reports():
    for positions, signed in ((np.linspace(0, 1, 9), False), (np.linspace(-1, 1, 9), True)):
        np.testing.assert_array_equal(
            (colours.interpolated(positions, signed) * 255).round(), montage._coloured(positions, signed).round()
        )


def test_lightness_rises_with_the_absolute_value():
    for positions, signed in (
        (np.linspace(0, 1, 99), False),
        (np.linspace(0, 1, 99), True),
        (-np.linspace(0, 1, 99), True),
    ):
        lightness = colours.interpolated(positions, signed) @ (0.2126, 0.7152, 0.0722)
        assert (np.diff(lightness) > -1e-9).all()


def test_what_is_faint_is_transparent_on_both_sides(app):
    _, made = add(blob(True), True)
    alpha = table(made.GetDisplayNode().GetColorNode())[:, 3]
    np.testing.assert_array_equal(alpha, alpha[::-1])
    np.testing.assert_array_equal(alpha, np.abs(np.linspace(-1, 1, 256)) >= colours.FAINTEST)


def test_threshold_is_that_of_one_map(app):
    (_, one), (_, other) = add(blob(True), True), add(blob(True), True)
    for faintest in (0.5, 0.7):
        display.setThreshold(one, faintest)
        own = one.GetDisplayNode().GetColorNode()
        np.testing.assert_array_equal(table(own)[:, 3], np.abs(np.linspace(-1, 1, 256)) >= faintest)
    assert other.GetDisplayNode().GetColorNode() is colours.colourNode(True)
    ours = [n for n in slicer.util.getNodesByClass("vtkMRMLColorTableNode") if n.GetAttribute("Category") == "MedXAI"]
    assert len(ours) == 2


def test_hot_spots_are_nested_and_hold_their_share(app):
    array = blob(True)
    _, made = add(array, True)
    node = results.part(made, "HotSpots")
    assert node.GetTransformNodeID() == made.GetTransformNodeID()
    reference = node.GetNodeReference(node.GetReferenceImageGeometryReferenceRole())
    assert reference is made
    masks = [
        slicer.util.arrayFromSegmentBinaryLabelmap(node, i, made) > 0 for i in node.GetSegmentation().GetSegmentIDs()
    ]
    total = array[array > 0].sum(dtype=float)
    for mask, share in zip(masks, SHARES, strict=True):
        held = array[mask].sum(dtype=float)
        assert held >= share * total
        assert array[mask & (array > array[mask].min())].sum(dtype=float) < share * total
    for outer, inner in pairwise(masks):
        assert (outer >= inner).all()
        assert outer.sum() > inner.sum() > 0


def test_surfaces_are_made_unless_they_would_take_minutes(app, monkeypatch):
    for largest, made in ((1000, True), (10, False)):
        monkeypatch.setattr(hotspots, "_LARGEST_SURFACE", largest)
        node = results.part(add(blob(False), False)[1], "HotSpots")
        assert node.GetSegmentation().ContainsRepresentation("Closed surface") == made


def test_statistics_are_in_millilitres_of_the_scene(app):
    array = blob(False)
    scan, made = add(array, False)
    stretched = slicer.util.arrayFromTransformMatrix(scan.GetParentTransformNode()) @ np.diag([2, 1, 1, 1])
    slicer.util.updateTransformMatrixFromArray(scan.GetParentTransformNode(), stretched)
    hotspots.addHotSpots(made)
    statistics = results.part(made, "Statistics")
    held = [(t, array[array >= t].sum(dtype=float) / array.sum(dtype=float)) for t in np.unique(array[array > 0])]
    lowest = [max(t for t, share in held if share >= wanted) for wanted in SHARES]
    column = lambda name: slicer.util.arrayFromTableColumn(statistics, name)  # noqa: E731
    np.testing.assert_allclose(column("Volume (mL)"), [2 * 0.7 * 1.3 * 2.5 * (array >= t).sum() / 1000 for t in lowest])
    np.testing.assert_allclose(column("Mean"), [array[array >= t].mean() for t in lowest], rtol=1e-6)
    assert statistics.GetCellText(0, 0) == "50% of what speaks for it"


def test_window_of_a_large_map_is_found_from_a_part_of_it(app, monkeypatch):
    values = np.random.default_rng(0).permutation(np.linspace(-1, 1, 100_000)).astype(np.float32)
    monkeypatch.setattr(display, "_SAMPLES", 10_000)
    assert display.windowLimit(values) == pytest.approx(0.99, abs=0.005)


def test_opacity_stays_from_map_to_map(app):
    front, behind, elsewhere = (app.scene.AddNewNodeByClass("vtkMRMLSliceCompositeNode") for _ in range(3))
    (scan, one), (_, other) = add(blob(True), True), add(blob(False), False)
    display.show(one)
    elsewhere.SetForegroundVolumeID(scan.GetID())
    before = elsewhere.GetForegroundOpacity()
    display.setOpacity(0.25)
    assert front.GetForegroundOpacity() == behind.GetForegroundOpacity() == display.currentOpacity() == 0.25
    assert elsewhere.GetForegroundOpacity() == before
    display.show(other)
    assert front.GetForegroundVolumeID() == other.GetID()
    assert front.GetForegroundOpacity() == elsewhere.GetForegroundOpacity() == 0.25


def test_legend_and_cloud_are_as_wanted_whenever_a_map_is_shown(app):
    (_, one), (_, other) = add(blob(True), True), add(blob(True), True)
    legend = slicer.modules.colors.logic().GetColorLegendDisplayNode
    cloud = slicer.modules.volumerendering.logic().GetFirstVolumeRenderingDisplayNode
    display.show(one)
    display.setLegend(one, False)
    display.setCloud(one, True)
    assert not legend(one).GetVisibility()
    assert cloud(one).GetVisibility()
    display.show(other)
    assert legend(other).GetVisibility()
    assert cloud(other) is None
    assert not cloud(one).GetVisibility()
    display.show(one)
    assert not legend(one).GetVisibility()
    assert cloud(one).GetVisibility()
    display.setCloud(one, False)
    display.show(one)
    assert not cloud(one).GetVisibility()


def test_cloud_follows_the_threshold(app):
    _, made = add(blob(True), True)
    display.render(made)
    limit = made.GetDisplayNode().GetWindowLevelMax()
    cloud = slicer.modules.volumerendering.logic().GetFirstVolumeRenderingDisplayNode(made)
    assert cloud.GetVolumePropertyNode().GetScalarOpacity().GetValue(limit / 2) > 0
    display.setThreshold(made, 0.7)
    assert cloud.GetVolumePropertyNode().GetScalarOpacity().GetValue(limit / 2) == 0
    assert display.threshold(made) == 0.7


def test_one_hot_spot_is_outlined_at_a_time(app):
    _, made = add(blob(False), False)
    spots = results.part(made, "HotSpots")
    for row in (2, 0, 1):
        display.outline(made, row)
        outlined = [
            spots.GetDisplayNode().GetSegmentVisibility2DOutline(i) for i in spots.GetSegmentation().GetSegmentIDs()
        ]
        assert outlined == [i == row for i in range(3)]


def test_channel_takes_the_place_of_the_map_in_slices(app):
    view = app.scene.AddNewNodeByClass("vtkMRMLSliceCompositeNode")
    array = np.stack([blob(True), -3 * blob(True)])
    scan, made = add(array, True)
    legend = slicer.modules.colors.logic().GetColorLegendDisplayNode
    display.show(made)
    assert display.countChannels(made) == 2
    assert display.channel(made) is None
    for index in (1, 0):
        display.showChannel(made, index)
        shown = app.scene.GetNodeByID(view.GetForegroundVolumeID())
        np.testing.assert_array_equal(slicer.util.arrayFromVolume(shown), array[index])
        np.testing.assert_allclose(geometry.ijkToWorld(shown), geometry.ijkToWorld(scan), atol=1e-9)
        # One window for both, so that they can be compared.
        limit = np.percentile(np.abs(array[array != 0]), 99)
        assert shown.GetDisplayNode().GetWindowLevelMax() == pytest.approx(limit)
        assert display.channel(made) == index
        assert legend(shown).GetVisibility()
        assert not legend(made).GetVisibility()
    display.setThreshold(made, 0.6)
    assert shown.GetDisplayNode().GetColorNode() is made.GetDisplayNode().GetColorNode()
    np.testing.assert_array_equal(slicer.util.arrayFromVolume(made), array.sum(axis=0))
    display.showChannel(made, None)
    assert view.GetForegroundVolumeID() == made.GetID()
    assert legend(made).GetVisibility()
    assert not legend(shown).GetVisibility()
    assert results.findExplanations() == [made]


def test_map_without_channels_has_none(app):
    _, made = add(blob(True), True)
    assert display.countChannels(made) == 0


def caption(scan, words, maps):
    """A caption of a scan, of which the words have these maps."""
    affine = geometry.ijkToRas(scan)[:, [2, 1, 0, 3]]
    files = [f"map-{i}.nrrd" for i in range(len(maps))]
    manifest = {
        "kind": "Caption",
        "provenance": MADE.model_dump(mode="json"),
        "residual": {},
        "text": "nodule left",
        "words": [
            {"text": text, "start": start, "end": start + len(text), "confidence": None, "map": index, "place": None}
            for text, start, index in words
        ],
        "files": files,
    }
    answer = answers.Answer(manifest, {file: (array, affine) for file, array in zip(files, maps, strict=True)})
    return mrml.addAnswers(scan, [answer])[0]


def test_caption_begins_with_its_first_word_that_has_a_map(app):
    view = app.scene.AddNewNodeByClass("vtkMRMLSliceCompositeNode")
    scan, before = add(blob(True), True)
    display.show(before)
    node = caption(scan, [("nodule", 0, 1), ("left", 7, 0)], [blob(True), blob(False)])
    assert results.part(before, "HotSpots").GetDisplayNode().GetVisibility() == 0
    shown = app.scene.GetNodeByID(view.GetForegroundVolumeID())
    np.testing.assert_array_equal(slicer.util.arrayFromVolume(shown), blob(False))
    assert view.GetBackgroundVolumeID() == scan.GetID()
    display.show(before)
    assert view.GetForegroundVolumeID() == before.GetID()
    display.show(node)
    assert view.GetForegroundVolumeID() == shown.GetID()


def test_explanation_without_a_map_shows_the_scan_alone(app):
    view = app.scene.AddNewNodeByClass("vtkMRMLSliceCompositeNode")
    scan, before = add(blob(True), True)
    display.show(before)
    node = caption(scan, [("nodule", 0, None)], [])
    assert not view.GetForegroundVolumeID()
    assert view.GetBackgroundVolumeID() == scan.GetID()
    app.scene.RemoveNode(scan)
    display.show(node)


def test_series_plays_its_volumes_in_order(app):
    logic = slicer.vtkSlicerSequencesLogic()
    logic.SetMRMLApplicationLogic(app.logic)
    logic.SetMRMLScene(app.scene)
    app.logic.SetModuleLogic("Sequences", logic)
    scan, made = add(blob(True), True)
    arrays = [blob(True) * scale for scale in (3, 1, 2)]
    volumes = [results.addMapNode(scan, array, "Layer") for array in arrays]
    for node in volumes:
        display.colour(node)
    limit = volumes[0].GetDisplayNode().GetWindowLevelMax()
    browser, played = display.sequence(volumes, ["late", "early", "middle"], "Layers")
    for node in volumes:
        app.scene.RemoveNode(node)
    for index, (array, name) in enumerate(zip(arrays, ("late", "early", "middle"), strict=True)):
        browser.SetSelectedItemNumber(index)
        np.testing.assert_array_equal(slicer.util.arrayFromVolume(played), array)
        assert browser.GetMasterSequenceNode().GetNthIndexValue(index) == name
        np.testing.assert_allclose(geometry.ijkToWorld(played), geometry.ijkToWorld(made), atol=1e-9)
        assert played.GetDisplayNode().GetColorNode() is colours.colourNode(False)
        assert played.GetDisplayNode().GetWindowLevelMax() == limit


def test_one_map_is_shown_at_a_time(app):
    (_, one), (_, other) = add(blob(False), False), add(blob(True), True)
    legend = slicer.modules.colors.logic().GetColorLegendDisplayNode
    for shown, hidden in ((one, other), (other, one), (one, other)):
        display.show(shown)
        assert results.part(shown, "HotSpots").GetDisplayNode().GetVisibility()
        assert legend(shown).GetVisibility()
        assert not results.part(hidden, "HotSpots").GetDisplayNode().GetVisibility()
        assert legend(hidden) is None or not legend(hidden).GetVisibility()
    assert len(slicer.util.getNodesByClass("vtkMRMLColorLegendDisplayNode")) == 2


def test_slice_views_have_the_map_over_its_scan_at_its_peak(app):
    composite = app.scene.AddNewNodeByClass("vtkMRMLSliceCompositeNode")
    view = app.scene.AddNode(slicer.vtkMRMLSliceNode())
    scan, made = add(blob(True), True)
    display.show(made)
    assert composite.GetBackgroundVolumeID() == scan.GetID()
    assert composite.GetForegroundVolumeID() == made.GetID()
    assert 0 < composite.GetForegroundOpacity() < 1
    at = geometry.ijkToWorld(scan) @ (12, 9, 6, 1)
    np.testing.assert_allclose(geometry.peak(made), at[:3])
    np.testing.assert_allclose([view.GetSliceToRAS().GetElement(i, 3) for i in range(3)], at[:3])


def test_the_peak_of_a_plateau_is_in_its_middle(app):
    data = np.zeros(SIZE, np.float32)
    data[2:5, 4:11, 8:15] = 3
    _, made = add(data, True)
    np.testing.assert_allclose(geometry.peak(made), (geometry.ijkToWorld(made) @ (11, 7, 3, 1))[:3])


def test_cloud_is_as_dense_as_the_map_is_strong(app):
    _, made = add(blob(True), True)
    node = display.render(made)
    assert display.render(made) is node
    opacity = node.GetVolumePropertyNode().GetScalarOpacity()
    limit = made.GetDisplayNode().GetWindowLevelMax()
    at = [opacity.GetValue(limit * v) for v in (-1, -0.5, -0.1, 0, 0.1, 0.5, 1)]
    np.testing.assert_allclose(at, at[::-1], atol=1e-3)
    assert at[0] > at[1] > at[2] == at[3] == 0
    colour = node.GetVolumePropertyNode().GetColor().GetColor(limit)
    np.testing.assert_allclose(colour, table(made.GetDisplayNode().GetColorNode())[-1, :3])


def everything(made) -> dict:
    """What an explanation is, as values that can be compared."""
    shown, spots = made.GetDisplayNode(), results.part(made, "HotSpots")
    statistics = results.part(made, "Statistics")
    legend = slicer.modules.colors.logic().GetColorLegendDisplayNode(made)
    return {
        "map": slicer.util.arrayFromVolume(made).copy(),
        "place": geometry.ijkToWorld(made),
        "scan": slicer.util.arrayFromVolume(results.part(made, "Source")).copy(),
        "place of the scan": geometry.ijkToWorld(results.part(made, "Source")),
        "attributes": [made.GetAttribute(f"MedXAI.{n}") for n in ("Provenance", "Residual", "TargetLabel", "Signed")],
        "summary": results.part(made, "Summary").GetText(),
        "colours": table(shown.GetColorNode()),
        "window": [shown.GetWindowLevelMin(), shown.GetWindowLevelMax()],
        "legend": [legend.GetTitleText(), legend.GetVisibility()],
        "spots": [
            slicer.util.arrayFromSegmentBinaryLabelmap(spots, i, made).copy()
            for i in spots.GetSegmentation().GetSegmentIDs()
        ],
        "place of the spots": slicer.util.arrayFromTransformMatrix(spots.GetParentTransformNode()),
        "names": [spots.GetSegmentation().GetNthSegment(n).GetName() for n in range(3)],
        "statistics": [
            [statistics.GetCellText(r, c) for c in range(statistics.GetNumberOfColumns())]
            for r in range(statistics.GetNumberOfRows())
        ],
        "cloud": [
            slicer.modules.volumerendering.logic()
            .GetFirstVolumeRenderingDisplayNode(made)
            .GetVolumePropertyNode()
            .GetScalarOpacity()
            .GetValue(shown.GetWindowLevelMax() * v)
            for v in (-1, 0, 0.5)
        ],
    }


@pytest.mark.parametrize("signed", [False, True])
def test_saved_scene_brings_everything_back(tmp_path, signed):
    with slicer_scene.opened():
        _, made = add(blob(signed), signed)
        display.show(made)
        display.setThreshold(made, 0.3)
        display.render(made)
        before = everything(made)
        slicer_scene.save(tmp_path / "scene.mrb")
    with slicer_scene.opened() as app:
        slicer_scene.load(tmp_path / "scene.mrb", tmp_path / "cache")
        view = app.scene.AddNewNodeByClass("vtkMRMLSliceCompositeNode")
        made = display.restore()
        after = everything(made)
        assert display.threshold(made) == 0.3
        assert slicer.modules.volumerendering.logic().GetFirstVolumeRenderingDisplayNode(made).GetVisibility()
        assert view.GetForegroundVolumeID() == made.GetID()
        assert view.GetBackgroundVolumeID() == results.part(made, "Source").GetID()
        np.testing.assert_array_equal(after.pop("map"), before.pop("map"))
        for name, value in before.items():
            if name in ("attributes", "summary", "legend", "names", "statistics"):
                assert after[name] == value, name
            else:
                # Scenes write numbers with six digits.
                np.testing.assert_allclose(after[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
        hierarchy = app.scene.GetSubjectHierarchyNode()
        folder = hierarchy.GetItemParent(hierarchy.GetItemByDataNode(made))
        assert hierarchy.GetItemName(folder) == made.GetName()
        assert hierarchy.GetNumberOfItemChildren(folder) >= 4
        assert colours.colourNode(signed) is colours.colourNode(signed)


def test_scene_without_explanations_has_nothing_to_restore(app):
    assert display.restore() is None
    oblique_node(blob(False))
    assert display.restore() is None


def test_latest_explanation_is_restored(app):
    _, late = add(blob(False), False, created="2026-01-01T00:00:02+00:00")
    _, early = add(blob(False), False, created="2026-01-01T00:00:01+00:00")
    assert results.findExplanations() == [early, late]
    assert display.restore() is late


@slicer_scene.needs_graphics
@pytest.mark.parametrize("signed", [False, True])
def test_slices_show_the_map_where_it_is_and_the_scan_elsewhere(app, signed):
    view = SliceView(app, "Red", "Axial", (200, 200))
    scan, made = add(blob(signed), signed)
    display.show(made)
    slicer.modules.colors.logic().GetColorLegendDisplayNode(made).SetVisibility(False)
    results.part(made, "HotSpots").GetDisplayNode().SetVisibility(False)
    view.node.RotateToVolumePlane(scan)
    view.fit()

    def seen(k, j, i):
        """The colour of a voxel in the view."""
        toView = np.linalg.inv(slicer.util.arrayFromVTKMatrix(view.node.GetXYToRAS()))
        x, y, z, _ = toView @ geometry.ijkToWorld(made) @ (i, j, k, 1)
        assert abs(z) < 1
        return view.picture()[199 - round(y), round(x)].astype(int)

    display.jumpToPeak(made)
    red, _, blue = seen(6, 9, 12)
    assert red > blue + 60
    red, green, blue = seen(6, 4, 4)
    assert blue > red + 40 if signed else red == green == blue
    red, green, blue = seen(6, 14, 17)
    assert red == green == blue


@slicer_scene.needs_graphics
def test_cloud_is_seen(app):
    space = SpaceView(app, (200, 200))
    _, made = add(blob(True), True)
    space.look(geometry.peak(made), from_=(0, 60, 0))
    before = space.picture().astype(int)
    display.render(made)
    results.part(made, "HotSpots").GetDisplayNode().SetVisibility(False)
    red, _, blue = np.moveaxis(space.picture().astype(int) - before, -1, 0)
    assert (red - blue).max() > 60  # for
    assert (blue - red).max() > 40  # against
