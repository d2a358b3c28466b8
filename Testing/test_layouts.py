"""Comparisons in Slicer: which views there are, what is in them, and that a saved scene brings them back."""

from __future__ import annotations

import contextlib
import json
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch

slicer = pytest.importorskip("slicer")

import slicer_scene  # noqa: E402
from slicer_scene import SliceView  # noqa: E402
from test_display import MADE  # noqa: E402
from test_words_and_cases import VOXEL, add_caption, add_cases, add_scan, blob, case_affine  # noqa: E402

import MedXAILib as mx  # noqa: E402
from MedXAILib.errors import MedXAIError  # noqa: E402
from MedXAILib.grid import shifted  # noqa: E402
from MedXAISlicerLib import answers, captions, cases, deleting, display, geometry, layouts, mrml, results  # noqa: E402

FOUR_UP = 3


@contextlib.contextmanager
def opened():
    """A scene whose views are made from the layout, as the application does."""
    with slicer_scene.opened() as app:
        logic = slicer.vtkMRMLLayoutLogic()
        logic.SetMRMLScene(app.scene)
        app.layout = logic.GetLayoutNode()
        app.layout.SetViewArrangement(FOUR_UP)
        try:
            yield app
        finally:
            logic.SetMRMLScene(None)


@pytest.fixture
def app():
    with opened() as app:
        yield app


def add_maps():
    """A scan under a transform, with two explanations of it."""
    scan, affine, _ = add_scan()
    maps = []
    for at in ((3, 4, 5), VOXEL):
        saliency = mx.SaliencyMap(MADE, {}, torch.tensor(blob(at))[None], affine, False)
        maps.append(mrml.addSaliency(scan, answers.of(saliency)))
    return scan, maps


def in_layout(layout_node) -> list[list[tuple]]:
    """The views of the layout that is on the screen, column by column, as (slice node, composite node)."""
    root = layout_node.GetLayoutRootElement()
    columns = []
    for i in range(root.GetNumberOfNestedElements()):
        column = root.GetNestedElement(i).GetNestedElement(0)
        tags = [
            column.GetNestedElement(j).GetNestedElement(0).GetAttribute("singletontag")
            for j in range(column.GetNumberOfNestedElements())
        ]
        columns.append([(view("vtkMRMLSliceNode", tag), view("vtkMRMLSliceCompositeNode", tag)) for tag in tags])
    return columns


def view(kind: str, name: str):
    (found,) = [node for node in slicer.util.getNodesByClass(kind) if node.GetLayoutName() == name]
    return found


def shown(layout_node) -> list[list[dict]]:
    """What is in each view of the layout."""
    scene = slicer.mrmlScene
    return [
        [
            {
                "orientation": slice_node.GetOrientation(),
                "label": slice_node.GetLayoutLabel(),
                "group": slice_node.GetViewGroup(),
                "at": [slice_node.GetSliceToRAS().GetElement(i, 3) for i in range(3)],
                "background": scene.GetNodeByID(composite.GetBackgroundVolumeID()).GetName(),
                "foreground": scene.GetNodeByID(composite.GetForegroundVolumeID() or "")
                and (scene.GetNodeByID(composite.GetForegroundVolumeID()).GetName()),
                "opacity": composite.GetForegroundOpacity(),
                "linked": bool(composite.GetLinkedControl()),
                "width": slice_node.GetFieldOfView()[0],
            }
            for slice_node, composite in column
        ]
        for column in in_layout(layout_node)
    ]


def names(nodes) -> list:
    return [node and node.GetName() for node in nodes]


def test_cases_are_beside_the_scan(app):
    scan, node, *_ = add_cases()
    layouts.compareCases(node, [0, 3])
    assert layouts.current() == "cases"
    columns = shown(app.layout)
    found = cases.cases(node)
    (query,) = results.maps(node)
    d, h, w = VOXEL
    expected = [
        ("This scan", scan, query, (geometry.ijkToWorld(scan) @ (w, h, d, 1))[:3]),
        ("malignant 0.93", found[0]["volume"], found[0]["map"], found[0]["place"]),
        ("benign 0.63", found[3]["volume"], found[3]["map"], found[3]["place"]),
    ]
    assert len(columns) == len(expected)
    for column, (label, volume, over, place) in zip(columns, expected, strict=True):
        assert [seen["orientation"] for seen in column] == ["Axial", "Coronal"]
        for seen in column:
            assert seen["label"] == label
            assert [seen["background"], seen["foreground"]] == names([volume, over])
            assert seen["opacity"] == pytest.approx(display.OPACITY)
            np.testing.assert_allclose(seen["at"], place, atol=1e-6)
            assert not seen["linked"]
    # Each column moves by itself, and all are drawn to one scale.
    groups = [{seen["group"] for seen in column} for column in columns]
    assert all(len(group) == 1 for group in groups) and len(set.union(*groups)) == 3 and 0 not in set.union(*groups)
    (width,) = {seen["width"] for column in columns for seen in column}
    extents = [np.ptp(cases.bounds(found[i]["volume"]), axis=1).max() for i in (0, 3)]
    assert width == pytest.approx(max(extents))


def with_queries(number):
    """Cases, of which the first ones have each a map of the scan; gives where these are strongest, (d, h, w)."""
    scan, affine, _ = add_scan()
    at = [(2 + i, 3 + 2 * i, 4 + 3 * i) for i in range(number)]
    found = []
    for i in range(4):
        volume = mx.Volume(torch.tensor(blob((3, 4, 5), (6, 8, 10)))[None], case_affine(i))
        query = None
        if i < number:
            query = mx.Volume(torch.tensor(blob(at[i]))[None, 1:, 2:, 1:-1], shifted(affine, np.array([1, 2, 1])))
        role = ("alike", "mistaken", "unlike", "alike")[i]
        place = tuple(volume.to_point((2, 3, 4)).tolist())
        found.append(mx.Case(f"c{i}", "benign", 0.9 - i / 10, place=place, volume=volume, role=role, query_map=query))
    similar = mx.SimilarCases(MADE, {}, tuple(found), torch.tensor(blob(VOXEL))[None], affine)
    return scan, cases.addCases(scan, answers.of(similar)), similar, at


def test_each_case_is_below_the_scan_with_what_is_like_it(app):
    scan, node, _, at = with_queries(2)
    layouts.compareCases(node, [0, 1, 3])
    columns = shown(app.layout)
    found = cases.cases(node)
    assert len(columns) == 3 and all(len(column) == 2 for column in columns)
    for column, index, label in zip(
        columns, (0, 1, 3), ("benign 0.90", "benign 0.80, network wrong", "benign 0.60"), strict=True
    ):
        above, below = column
        peak = at[index] if index < 2 else VOXEL
        assert (above["label"], above["background"]) == ("This scan", scan.GetName())
        assert above["foreground"] == found[index]["query_map"].GetName()
        np.testing.assert_allclose(above["at"], (geometry.ijkToWorld(scan) @ (*peak[::-1], 1))[:3], atol=1e-5)
        assert (below["label"], below["background"]) == (label, found[index]["volume"].GetName())
        np.testing.assert_allclose(below["at"], found[index]["place"], atol=1e-5)
        assert above["orientation"] == below["orientation"] == "Axial"
    # The case without a map of its own has that of all.
    assert found[3]["query_map"] is results.maps(node)[0]


def test_one_case_is_beside_the_scan_with_what_is_like_it(app):
    scan, node, _, at = with_queries(2)
    layouts.compareCases(node, [1])
    own, _ = shown(app.layout)
    assert [seen["orientation"] for seen in own] == ["Axial", "Coronal"]
    assert own[0]["foreground"] == cases.cases(node)[1]["query_map"].GetName()
    np.testing.assert_allclose(own[0]["at"], (geometry.ijkToWorld(scan) @ (*at[1][::-1], 1))[:3], atol=1e-5)


def test_map_for_a_case_is_where_it_was_in_the_map_of_the_whole_scan(app):
    scan, node, similar, at = with_queries(3)
    for case, given, spot in zip(cases.cases(node)[:3], similar.cases, at, strict=False):
        kept, whole = slicer.util.arrayFromVolume(case["query_map"]), blob(spot)
        assert kept.shape == given.query_map.shape != whole.shape
        to_scan = np.linalg.inv(geometry.ijkToWorld(scan)) @ geometry.ijkToWorld(case["query_map"])
        np.testing.assert_allclose(to_scan[:3, :3], np.eye(3), atol=1e-9)
        i, j, k = to_scan[:3, 3].round().astype(int)
        d, h, w = kept.shape
        np.testing.assert_array_equal(whole[k : k + d, j : j + h, i : i + w], kept)


def test_deleting_takes_the_maps_for_the_cases_along(app):
    before = {node.GetID() for node in slicer.util.getNodesByClass("vtkMRMLScalarVolumeNode")}
    scan, node, *_ = with_queries(3)
    layouts.compareCases(node, [0, 1])
    deleting.delete(node)
    left = {node.GetID() for node in slicer.util.getNodesByClass("vtkMRMLScalarVolumeNode")} - before
    assert left == {scan.GetID()} and layouts.current() is None


def window(node):
    shown = node.GetDisplayNode()
    return shown.GetWindowLevelMin(), shown.GetWindowLevelMax()


def test_window_of_one_image_is_that_of_all(app):
    scan, node, *_ = add_cases()
    compared = [scan, *(cases.cases(node)[i]["volume"] for i in (0, 2))]
    # Since they were added somebody has changed it.
    scan.GetDisplayNode().SetWindowLevelMinMax(-5, 7)
    layouts.compareCases(node, [0, 2])
    assert [window(one) for one in compared] == [(-5, 7)] * 3
    for changed, (low, high) in zip(compared, [(0.1, 0.7), (-1350, 150), (2, 2.3)], strict=True):
        changed.GetDisplayNode().SetWindowLevelMinMax(low, high)
        for one in compared:
            assert window(one) == pytest.approx((low, high))
    assert window(cases.cases(node)[3]["volume"]) == (-2, 3)
    assert window(results.maps(node)[0])[0] == 0
    layouts.leave()
    scan.GetDisplayNode().SetWindowLevelMinMax(0, 1)
    assert window(compared[1]) == pytest.approx((2, 2.3))


def test_slices_of_one_case_move_without_the_others(app):
    _, node, *_ = add_cases()
    layouts.compareCases(node, [0, 1])
    slicer.vtkMRMLSliceNode.JumpAllSlices(app.scene, 1, 2, 3, -1, shown(app.layout)[1][0]["group"])
    moved = [column[0]["at"][2] == pytest.approx(3) for column in shown(app.layout)]
    assert moved == [False, True, False]


def test_case_without_place_or_map_is_seen_in_its_middle(app):
    _, node, *_ = add_cases()
    layouts.compareCases(node, [1, 2])
    found = cases.cases(node)
    _, one, other = shown(app.layout)
    middle = geometry.ijkToWorld(found[1]["volume"]) @ (4.5, 3.5, 2.5, 1)
    np.testing.assert_allclose(one[0]["at"], middle[:3], atol=1e-5)
    assert other[0]["foreground"] is None


def test_scan_is_seen_where_it_was_asked_about(app):
    """Without a map of the scan itself the slices are in the region that was explained."""
    scan, node, similar, moved = add_cases()
    app.scene.RemoveNode(results.maps(node)[0])
    region = similar.affine @ (2, 3, 4, 1)
    made = {**results.provenance(node), "region": region[:3].tolist()}
    node.SetAttribute("MedXAI.Provenance", json.dumps(made))
    layouts.compareCases(node, [0])
    seen = shown(app.layout)[0][0]
    np.testing.assert_allclose(seen["at"], (moved @ region)[:3], atol=1e-5)
    assert seen["foreground"] is None and seen["background"] == scan.GetName()


def test_other_cases_take_the_place_of_the_first(app):
    _, node, *_ = add_cases()
    layouts.compareCases(node, [0, 1, 2, 3])
    layouts.compareCases(node, [4])
    columns = shown(app.layout)
    assert [column[0]["label"] for column in columns] == ["This scan", "benign 0.53"]
    layouts.leave()
    assert app.layout.GetViewArrangement() == FOUR_UP


def test_maps_are_side_by_side_and_linked(app):
    scan, (one, other) = add_maps()
    layouts.compareMaps(one, other)
    assert layouts.current() == "maps"
    columns = shown(app.layout)
    for column, over in zip(columns, (one, other), strict=True):
        assert [seen["orientation"] for seen in column] == ["Axial", "Coronal", "Sagittal"]
        for seen in column:
            assert [seen["background"], seen["foreground"]] == names([scan, over])
            assert seen["label"] == results.title(over)
            assert seen["linked"]
            np.testing.assert_allclose(seen["at"], (geometry.ijkToWorld(scan) @ (5, 4, 3, 1))[:3], atol=1e-6)
    assert len({seen["group"] for column in columns for seen in column}) == 1
    assert len({seen["width"] for column in columns for seen in column}) == 1


def test_maps_of_words_can_be_compared(app):
    _, node, *_ = add_caption()
    one, other, _ = captions.words(node)
    layouts.compareMaps(one["map"], other["map"])
    assert [column[0]["label"] for column in shown(app.layout)] == names([one["map"], other["map"]])


def test_opacity_stays_that_of_the_maps_before(app):
    app.scene.AddNewNodeByClass("vtkMRMLSliceCompositeNode")
    _, (one, other) = add_maps()
    display.show(one)
    display.setOpacity(0.35)
    layouts.compareMaps(one, other)
    assert {seen["opacity"] for column in shown(app.layout) for seen in column} == {0.35}


@pytest.mark.parametrize(
    ("indices", "message"),
    [([], "0 cases"), ([0, 1, 2, 3, 4], "5 cases"), ([0, 5], "no image of the case 'elsewhere'")],
)
def test_what_cannot_be_compared_is_refused(app, indices, message):
    _, node, *_ = add_cases()
    with pytest.raises(MedXAIError, match=message):
        layouts.compareCases(node, indices)
    assert layouts.current() is None and app.layout.GetViewArrangement() == FOUR_UP


def test_maps_of_two_scans_are_refused(app):
    (_, (one, _)), (_, (other, _)) = add_maps(), add_maps()
    with pytest.raises(MedXAIError, match="not maps of one scan"):
        layouts.compareMaps(one, other)
    assert layouts.current() is None


def test_leaving_goes_back_to_what_was_there(app):
    _, node, *_ = add_cases()
    _, (one, other) = add_maps()
    layouts.leave()
    assert app.layout.GetViewArrangement() == FOUR_UP
    layouts.compareMaps(one, other)
    layouts.compareCases(node, [0])
    assert layouts.current() == "cases"
    layouts.leave()
    assert layouts.current() is None and app.layout.GetViewArrangement() == FOUR_UP
    # Who has gone elsewhere already is not taken away from there.
    layouts.compareCases(node, [0])
    app.layout.SetViewArrangement(app.layout.SlicerLayoutOneUpRedSliceView)
    assert layouts.current() is None
    layouts.leave()
    assert app.layout.GetViewArrangement() == app.layout.SlicerLayoutOneUpRedSliceView


def test_closed_scene_leaves_nothing_to_go_back_to(app):
    _, node, *_ = add_cases()
    layouts.compareCases(node, [0])
    app.scene.Clear(False)
    assert layouts.current() is None
    _, node, *_ = add_cases()
    layouts.compareCases(node, [1])
    layouts.leave()
    assert app.layout.GetViewArrangement() == app.layout.SlicerLayoutConventionalView
    layouts.compareCases(node, [1])
    app.scene.Clear(False)
    layouts.leave()
    assert app.layout.GetViewArrangement() == app.layout.SlicerLayoutConventionalView


def test_what_is_drawn_in_the_scan_is_kept_out_of_other_cases(app):
    scan, node, *_ = add_cases()
    segmentation = slicer_scene.add_segmentation(scan, blob(VOXEL) > 0.5, "Nodule")
    segmentation.CreateDefaultDisplayNodes()
    drawn = segmentation.GetDisplayNode()
    chosen = app.scene.AddNewNodeByClass("vtkMRMLModelDisplayNode")
    chosen.AddViewNodeID(view("vtkMRMLSliceNode", "Red").GetID())
    layouts.compareCases(node, [0, 1])
    query, *others = in_layout(app.layout)
    assert all(drawn.IsDisplayableInView(slice_node.GetID()) for slice_node, _ in query)
    assert drawn.IsDisplayableInView(view("vtkMRMLSliceNode", "Red").GetID())
    assert not any(drawn.IsDisplayableInView(slice_node.GetID()) for column in others for slice_node, _ in column)
    layouts.leave()
    assert drawn.GetNumberOfViewNodeIDs() == 0
    assert chosen.GetNumberOfViewNodeIDs() == 1


def test_hot_spots_are_drawn_on_their_own_map_only(app):
    _, maps = add_maps()
    layouts.compareMaps(*maps)
    for i, column in enumerate(in_layout(app.layout)):
        for j, one in enumerate(maps):
            drawn = results.part(one, "HotSpots").GetDisplayNode()
            assert {bool(drawn.IsDisplayableInView(slice_node.GetID())) for slice_node, _ in column} == {i == j}


def test_deleting_what_is_compared_leaves_the_comparison(app):
    _, node, *_ = add_cases()
    _, (one, other) = add_maps()
    layouts.compareMaps(one, other)
    deleting.delete(node)
    assert layouts.current() == "maps"
    deleting.delete(other)
    assert layouts.current() is None and app.layout.GetViewArrangement() == FOUR_UP
    assert results.findExplanations() == [one]


@pytest.mark.parametrize("kind", ["maps", "cases", "pairs"])
def test_saved_scene_brings_the_comparison_back(tmp_path: Path, kind):
    with opened() as app:
        scan, node, *_ = {"maps": add_caption, "cases": add_cases, "pairs": lambda: with_queries(3)}[kind]()
        segmentation = slicer_scene.add_segmentation(scan, blob(VOXEL) > 0.5, "Nodule")
        segmentation.CreateDefaultDisplayNodes()
        if kind == "maps":
            layouts.compareMaps(*results.maps(node))
        else:
            layouts.compareCases(node, [0, 2, 4] if kind == "cases" else [0, 1, 3])
        # Where a person has moved one since.
        in_layout(app.layout)[1][0][0].JumpSliceByCentering(12, 34, -56)
        before = shown(app.layout)
        slicer_scene.save(tmp_path / "scene.mrb")
    with opened() as app:
        slicer_scene.load(tmp_path / "scene.mrb", tmp_path / "cache")
        layouts.restore()
        assert layouts.current() == ("maps" if kind == "maps" else "cases")
        after = shown(app.layout)
        for was, now in zip(chain(*before), chain(*after), strict=True):
            for name in ("at", "width", "opacity"):
                np.testing.assert_allclose(now.pop(name), was.pop(name), rtol=1e-4, atol=1e-3)
            assert now == was
        layouts.leave()
        assert app.layout.GetViewArrangement() == FOUR_UP and layouts.current() is None
        drawn = slicer.util.getNodesByClass("vtkMRMLSegmentationNode")
        assert all(one.GetDisplayNode().GetNumberOfViewNodeIDs() == 0 for one in drawn)


def test_scene_saved_in_another_layout_stays_in_it(tmp_path: Path):
    with opened() as app:
        _, node, *_ = add_cases()
        layouts.compareCases(node, [0])
        app.layout.SetViewArrangement(FOUR_UP)
        slicer_scene.save(tmp_path / "scene.mrb")
    with opened() as app:
        slicer_scene.load(tmp_path / "scene.mrb", tmp_path / "cache")
        layouts.restore()
        assert layouts.current() is None and app.layout.GetViewArrangement() == FOUR_UP


def test_scene_whose_compared_scan_is_gone_goes_back(app):
    scan, node, *_ = add_cases()
    layouts.compareCases(node, [0])
    app.scene.RemoveNode(scan)
    layouts.restore()
    assert layouts.current() is None and app.layout.GetViewArrangement() == FOUR_UP


def test_nothing_is_needed_where_there_are_no_views():
    """Without the application: what is to be seen is in the scene, for views that are made later."""
    with slicer_scene.opened() as app:
        layouts.leave()
        layouts.restore()
        assert layouts.current() is None
        _, node, *_ = add_cases()
        layouts.compareCases(node, [0])
        before = shown(app.scene.GetFirstNodeByClass("vtkMRMLLayoutNode"))
        logic = slicer.vtkMRMLLayoutLogic()
        logic.SetMRMLScene(app.scene)
        try:
            assert shown(logic.GetLayoutNode()) == before
            assert layouts.current() == "cases"
        finally:
            logic.SetMRMLScene(None)


@slicer_scene.needs_graphics
def test_case_views_show_the_case_and_its_map(app):
    _, node, *_ = add_cases()
    views = [SliceView(app, f"MedXAICases{i}Axial", "Axial", (200, 200)) for i in (1, 2, 3)]
    for view in views:
        view.logic.ResizeSliceNode(200, 200)
    layouts.compareCases(node, [0, 2])
    assert [view.node for view in views] == [column[0][0] for column in in_layout(app.layout)]
    coloured = [np.argwhere(np.ptp(view.picture().astype(int), axis=2) > 40) for view in views]
    assert len(coloured[0]) > 100 and len(coloured[1]) > 100
    assert len(coloured[2]) == 0  # it has no map
    assert views[2].picture().max() > 40
    # Its place is in the middle of the view.
    assert np.abs(coloured[1] - 100).sum(axis=1).min() <= 2
