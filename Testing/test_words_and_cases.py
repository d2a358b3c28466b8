"""Captions and similar cases in Slicer: what is in the scene, what a click on a word or a card shows, what is saved."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

slicer = pytest.importorskip("slicer")

import slicer_scene  # noqa: E402
from conftest import oblique_affine  # noqa: E402
from slicer_scene import SliceView, oblique_node  # noqa: E402
from test_display import MADE  # noqa: E402

import MedXAILib as mx  # noqa: E402
from MedXAISlicerLib import answers, captions, cases, deleting, display, geometry, mrml, results  # noqa: E402

SIZE = (12, 16, 20)  # (D, H, W)
CASE_SIZE = (6, 8, 10)
TEXT = 'A bösartig "spiky" <b>nodule</b> & more;\nnothing else 𝔘.'
VOXEL = (5, 9, 13)
"""Where the second word is seen, (d, h, w)."""


@pytest.fixture
def app():
    with slicer_scene.opened() as app:
        yield app


def blob(at, size=SIZE) -> np.ndarray:
    where = np.indices(size) - np.reshape(at, (3, 1, 1, 1))
    values = np.exp(-(where**2).sum(0) / 6)
    return (values * (values > 1e-3)).astype(np.float32)


def add_scan():
    scan, grid, moved = oblique_node(np.random.default_rng(0).normal(size=SIZE).astype(np.float32))
    scan.CreateDefaultDisplayNodes()
    scan.GetDisplayNode().AutoWindowLevelOff()
    scan.GetDisplayNode().SetWindowLevelMinMax(-2, 3)
    return scan, grid[:, [2, 1, 0, 3]], moved


def add_caption():
    """The scan of `oblique_node`, and a caption of it: a word with map and place, one with a map, one with neither."""
    scan, affine, moved = add_scan()
    place = tuple((affine @ (*VOXEL, 1))[:3].tolist())
    words = []
    for text, known in {
        "spiky": {"confidence": 0.25, "map": 1, "place": place},
        "nodule": {"confidence": 1.0, "map": 0},
        "nothing": {},
    }.items():
        start = TEXT.index(text)
        words.append(mx.Word(text, start, start + len(text), **known))
    maps = torch.tensor(np.stack([blob((3, 4, 5)) - 0.5 * blob((9, 9, 9)), blob(VOXEL)]))
    caption = mx.Caption(MADE, {"completeness": 0.004}, TEXT, tuple(words), maps, affine)
    return scan, captions.addCaption(scan, answers.of(caption)), caption, moved


def case_affine(number: int) -> np.ndarray:
    affine = oblique_affine((2.5, 0.8 + 0.1 * number, 1.1))
    affine[:3, 3] += (500 * number, 30, -70 * number)
    return affine


def add_cases():
    """The scan of `oblique_node`, and cases like it, each on a tilted grid of its own; the last one has no image."""
    scan, affine, moved = add_scan()
    found = []
    for number in range(5):
        volume = mx.Volume(torch.tensor(blob((3, 4, 5), CASE_SIZE))[None] * 3 - 1, case_affine(number))
        at = (number, 4, 6)
        found.append(
            mx.Case(
                f'Köln "{number}"\t/ & <1>',
                "malignant" if number < 3 else "benign",
                0.9312 - number / 10,
                source=f"archive/{number}.nrrd",
                place=tuple(volume.to_point(at).tolist()) if number != 1 else None,
                volume=volume,
                map=torch.tensor(blob(at, CASE_SIZE))[None] if number != 2 else None,
            )
        )
    found.append(mx.Case("elsewhere", "benign", 0.1))
    query = torch.tensor(blob(VOXEL))[None]
    similar = mx.SimilarCases(MADE, {}, tuple(found), query, affine)
    return scan, cases.addCases(scan, answers.of(similar)), similar, moved


def upright(node) -> tuple[np.ndarray, np.ndarray]:
    """The voxels of a volume and where they are, of a grid that is not mirrored: files are written like that."""
    array, grid = slicer.util.arrayFromVolume(node), geometry.ijkToWorld(node)
    if np.linalg.det(grid) < 0:
        grid[:3, 3] += (len(array) - 1) * grid[:3, 2]
        grid[:3, 2] *= -1
        array = array[::-1]
    return array, grid


def everything() -> dict:
    """All nodes of the scene that are data, by ID."""
    return {n.GetID(): n for n in slicer.util.getNodesByClass("vtkMRMLNode")}


def test_words_know_their_map_and_their_place(app):
    scan, node, caption, _ = add_caption()
    assert node.GetText() == TEXT
    spiky, nodule, nothing = captions.words(node)
    assert [w["text"] for w in (spiky, nodule, nothing)] == ["spiky", "nodule", "nothing"]
    assert TEXT[spiky["start"] : spiky["end"]] == "spiky"
    np.testing.assert_array_equal(slicer.util.arrayFromVolume(spiky["map"]), caption.maps[1])
    np.testing.assert_array_equal(slicer.util.arrayFromVolume(nodule["map"]), caption.maps[0])
    np.testing.assert_allclose(geometry.ijkToWorld(spiky["map"]), geometry.ijkToWorld(scan))
    d, h, w = VOXEL
    np.testing.assert_allclose(spiky["place"], (geometry.ijkToWorld(scan) @ (w, h, d, 1))[:3])
    assert nodule["place"] is nothing["map"] is nothing["place"] is nothing["confidence"] is None
    assert results.isSigned(nodule["map"]) and not results.isSigned(spiky["map"])


def test_removed_map_takes_no_other_word_along(app):
    _, node, caption, _ = add_caption()
    app.scene.RemoveNode(captions.words(node)[1]["map"])
    spiky, nodule, _ = captions.words(node)
    assert nodule["map"] is None
    np.testing.assert_array_equal(slicer.util.arrayFromVolume(spiky["map"]), caption.maps[1])


def test_place_outlives_the_scan(app):
    scan, node, *_ = add_caption()
    before = captions.words(node)[0]["place"]
    app.scene.RemoveNode(scan)
    np.testing.assert_allclose(captions.words(node)[0]["place"], before)
    captions.showWord(node, 0)
    captions.showWord(node, 2)
    assert "Scan: Scan" in results.summary(node, [])


def test_word_is_shown_over_the_scan_at_its_place(app):
    composite = app.scene.AddNewNodeByClass("vtkMRMLSliceCompositeNode")
    view = app.scene.AddNode(slicer.vtkMRMLSliceNode())
    scan, node, *_ = add_caption()
    spiky, nodule, _ = captions.words(node)

    def shown():
        ids = composite.GetBackgroundVolumeID(), composite.GetForegroundVolumeID()
        return [i and app.scene.GetNodeByID(i) for i in ids], [view.GetSliceToRAS().GetElement(i, 3) for i in range(3)]

    captions.showWord(node, 0)
    layers, at = shown()
    assert layers == [scan, spiky["map"]]
    np.testing.assert_allclose(at, spiky["place"])
    captions.showWord(node, 1)
    layers, at = shown()
    assert layers == [scan, nodule["map"]]
    np.testing.assert_allclose(at, (geometry.ijkToWorld(scan) @ (5, 4, 3, 1))[:3])
    captions.showWord(node, 2)
    assert shown()[0] == [scan, None]


def test_cases_are_in_their_own_place(app):
    scan, node, similar, _ = add_cases()
    found = cases.cases(node)
    assert [(c["uid"], c["label"], c["similarity"], c["source"]) for c in found] == [
        (c.uid, c.label, c.similarity, c.source) for c in similar.cases
    ]
    for number, (case, given) in enumerate(zip(found[:5], similar.cases, strict=False)):
        np.testing.assert_array_equal(slicer.util.arrayFromVolume(case["volume"]), given.volume.data[0])
        expected = case_affine(number)[:, [2, 1, 0, 3]]
        np.testing.assert_allclose(geometry.ijkToWorld(case["volume"]), expected, atol=1e-6)
        if given.map is None:
            assert case["map"] is None
        else:
            np.testing.assert_array_equal(slicer.util.arrayFromVolume(case["map"]), given.map[0])
            np.testing.assert_allclose(geometry.ijkToWorld(case["map"]), expected, atol=1e-6)
        # As bright as the scan, to be compared with it.
        window = case["volume"].GetDisplayNode()
        assert (window.GetWindowLevelMin(), window.GetWindowLevelMax()) == (-2, 3)
    assert found[5]["volume"] is found[5]["map"] is found[1]["place"] is None
    np.testing.assert_allclose(found[0]["place"], similar.cases[0].place)
    (query,) = results.maps(node)
    np.testing.assert_array_equal(slicer.util.arrayFromVolume(query), similar.query_map[0])
    np.testing.assert_allclose(geometry.ijkToWorld(query), geometry.ijkToWorld(scan))
    # Its colours end at its peak: most of what is alike is above the 99th percentile of a map.
    assert query.GetDisplayNode().GetWindowLevelMax() == similar.query_map.max()


def test_case_moves_with_its_transform(app):
    _, node, *_ = add_cases()
    before = cases.cases(node)[0]["place"]
    transform = app.scene.AddNewNodeByClass("vtkMRMLLinearTransformNode")
    slicer.util.updateTransformMatrixFromArray(
        transform, np.array([[0, -1, 0, 5], [1, 0, 0, 6], [0, 0, 1, 7], [0, 0, 0, 1]], float)
    )
    cases.cases(node)[0]["volume"].SetAndObserveTransformNodeID(transform.GetID())
    np.testing.assert_allclose(cases.cases(node)[0]["place"], (5 - before[1], 6 + before[0], 7 + before[2]))


def test_table_of_cases_can_be_read(app):
    _, node, *_ = add_cases()
    assert [node.GetColumnName(i) for i in range(3)] == ["Case", "Label", "Similarity"]
    assert [node.GetCellText(0, i) for i in range(2)] == ["Köln '0' / & <1>", "malignant"]
    assert float(node.GetCellText(0, 2)) == pytest.approx(0.9312, abs=1e-3)
    assert node.GetNumberOfRows() == 6


def test_thumbnail_shows_the_case_with_anterior_up_and_its_map(app):
    """A case on an upright grid, bright at one voxel and with a map at another: they are seen where they are."""
    scan, *_ = add_scan()
    data, likeness = np.full((1, 9, 40, 40), -2, np.float32), np.zeros((1, 9, 40, 40), np.float32)
    data[0, 4, 26:34, 4:12] = 3
    likeness[0, 4, 6:14, 24:32] = 1
    # (d, h, w) runs to superior, anterior and right.
    affine = np.array([[0, 0, 1, -300], [0, 1, 0, 40], [2, 0, 0, 7], [0, 0, 0, 1]], float)
    case = mx.Case(
        "a",
        "benign",
        0.5,
        place=(-270, 60, 15),
        volume=mx.Volume(torch.tensor(data), affine),
        map=torch.tensor(likeness),
    )
    node = cases.addCases(scan, answers.of(mx.SimilarCases(MADE, {}, (case,))))
    picture = cases.thumbnail(node, 0, 80).astype(int)
    assert picture.shape == (80, 80, 3)
    right, left, anterior, posterior = slice(0, 40), slice(40, 80), slice(0, 40), slice(40, 80)
    bright = (picture.min(axis=2) > 240).nonzero()
    assert (bright[0] < 40).all() and (bright[1] >= 40).all()  # anterior, and left of the patient: on the right
    np.testing.assert_allclose(
        [bright[0].mean(), bright[1].mean()], [2 * (39.5 - 29.5) - 0.5, 2 * (39.5 - 7.5) - 0.5], atol=2
    )
    coloured = np.ptp(picture, axis=2) > 40
    assert coloured[posterior, right].any()
    assert not coloured[anterior].any() and not coloured[posterior, left].any()
    # Away from its plane nothing is seen.
    kept = json.loads(node.GetAttribute("MedXAI.Cases"))
    kept["cases"][0]["place"][2] = 7
    node.SetAttribute("MedXAI.Cases", json.dumps(kept))
    assert cases.thumbnail(node, 0, 80).max() == 0


def test_thumbnail_of_a_case_without_image_is_black(app):
    _, node, *_ = add_cases()
    assert not cases.thumbnail(node, 5, 32).any()
    assert cases.thumbnail(node, 2, 32).any()


@slicer_scene.needs_graphics
def test_thumbnail_is_what_an_axial_view_shows(app):
    _, node, *_ = add_cases()
    case = cases.cases(node)[0]
    view = SliceView(app, "Red", "Axial", (200, 200))
    view.composite.SetBackgroundVolumeID(case["volume"].GetID())
    view.composite.SetForegroundVolumeID(case["map"].GetID())
    view.composite.SetForegroundOpacity(display.OPACITY)
    extent = np.ptp(cases.bounds(case["volume"]), axis=1)
    view.logic.ResizeSliceNode(200, 200)
    view.node.SetFieldOfView(max(extent[:2]), max(extent[:2]), 1)
    right, anterior, _ = cases.bounds(case["volume"]).mean(axis=1)
    view.node.JumpSliceByCentering(right, anterior, case["place"][2])
    drawn, made = view.picture().astype(int), cases.thumbnail(node, 0, 200).astype(int)
    inside = drawn.max(axis=2) > 0
    assert inside.mean() > 0.1
    assert (np.ptp(drawn, axis=2) > 40).sum() > 100
    difference = np.abs(drawn - made).max(axis=2)[inside]
    assert np.median(difference) <= 4 and np.quantile(difference, 0.9) <= 24


@pytest.mark.parametrize("add", [add_caption, add_cases])
def test_deleting_leaves_the_scene_as_it_was(app, add):
    scan, other, *_ = add_caption()
    for explanation in results.findExplanations():
        display.show(explanation)
    before = set(everything())
    _, node, *_ = add()
    own_scan = results.part(node, "Source")
    display.show(node)
    for shown in results.maps(node):
        display.setThreshold(shown, 0.4)
        display.render(shown)
    hierarchy = app.scene.GetSubjectHierarchyNode()
    folder = hierarchy.GetItemParent(hierarchy.GetItemByDataNode(node))
    assert hierarchy.GetItemName(folder) == node.GetName()
    deleting.delete(node)
    left = {i: n for i, n in everything().items() if i not in before}
    of_scan = {own_scan.GetID(), own_scan.GetDisplayNode().GetID(), own_scan.GetTransformNodeID()}
    # The tables of the colours are for the whole scene.
    shared = {i for i, n in left.items() if n.IsA("vtkMRMLColorTableNode") and n.GetAttribute("MedXAI.Colours")}
    assert set(left) - of_scan - shared == set()
    assert results.findExplanations() == [other] and scan.GetScene() is not None
    assert not hierarchy.GetItemName(folder)


def test_deleting_leaves_what_was_put_into_its_folder(app):
    _, node, *_ = add_caption()
    hierarchy = app.scene.GetSubjectHierarchyNode()
    folder = hierarchy.GetItemParent(hierarchy.GetItemByDataNode(node))
    note = app.scene.AddNewNodeByClass("vtkMRMLTextNode", "My note")
    hierarchy.CreateItem(folder, note)
    deleting.delete(node)
    assert note.GetScene() is not None and hierarchy.GetItemName(folder)


def test_kinds_are_found_and_named(app):
    _, one, *_ = add_caption()
    _, other, *_ = add_cases()
    array = blob(VOXEL)
    scan, affine, _ = add_scan()
    saliency = mx.SaliencyMap(MADE, {}, torch.tensor(array)[None], affine, False)
    third = mrml.addSaliency(scan, answers.of(saliency))
    assert {results.kind(n): n for n in results.findExplanations()} == {
        "Caption": one,
        "SimilarCases": other,
        "SaliencyMap": third,
    }
    assert results.maps(third) == [third]
    assert len(results.maps(one)) == 2
    assert results.title(one).startswith(f"HiResCAM · {MADE.target_label} · ")


def test_summary_says_what_is_to_be_known(app):
    _, node, *_ = add_caption()
    text = results.part(node, "Summary").GetText()
    where = results.inWords(captions.words(node)[0]["place"])
    for words in (TEXT, f"'spiky', confidence 25%, seen at {where}", "Scan: Scan", "not for diagnosis"):
        assert words in text
    _, node, *_ = add_cases()
    text = results.part(node, "Summary").GetText()
    for words in ("1. malignant, similarity 0.93: Köln", "6. benign, similarity 0.10: elsewhere", "not for diagnosis"):
        assert words in text


@pytest.mark.parametrize("add", [add_caption, add_cases])
def test_saved_scene_brings_it_back(tmp_path: Path, add):
    def said(node):
        rows = captions.words(node) if results.kind(node) == "Caption" else cases.cases(node)
        volumes = [row.pop(key, None) for row in rows for key in ("map", "volume", "query_map")]
        places = [row.pop("place") or (0, 0, 0) for row in rows]
        return {
            "rows": rows,
            "places": places,
            "voxels": [v and upright(v)[0].tolist() for v in volumes],
            "where": [upright(v)[1].tolist() if v else np.zeros((4, 4)).tolist() for v in volumes],
            "title": results.title(node),
            "summary": results.part(node, "Summary").GetText(),
            "names": [m.GetName() for m in results.maps(node)],
            "text": node.GetText() if results.kind(node) == "Caption" else [node.GetCellText(r, 1) for r in range(6)],
            "kind": results.kind(node),
        }

    with slicer_scene.opened():
        _, node, *_ = add()
        display.show(node)
        before = said(node)
        slicer_scene.save(tmp_path / "scene.mrb")
    with slicer_scene.opened() as app:
        slicer_scene.load(tmp_path / "scene.mrb", tmp_path / "cache")
        (node,) = results.findExplanations()
        after = said(node)
        for name in ("places", "where"):
            np.testing.assert_allclose(after.pop(name), before.pop(name), rtol=1e-5, atol=1e-3)
        assert after == before
        assert results.part(node, "Source").GetName() == "Scan"
        view = app.scene.AddNewNodeByClass("vtkMRMLSliceCompositeNode")
        assert display.restore() is node
        assert view.GetForegroundVolumeID() in [m.GetID() for m in results.maps(node)]
        remaining = everything()
        deleting.delete(node)
        assert not results.findExplanations() and len(everything()) < len(remaining)


def test_characters_that_no_scene_can_hold_are_left_out(tmp_path: Path):
    """One of them in a text would make the whole saved scene unreadable."""
    text = "a\x0bspiky\r\n\x00nodule\uffff"
    made = MADE.model_copy(update={"target_label": "ma\x01lignant\uffff"})
    with slicer_scene.opened():
        scan, *_ = add_scan()
        captions.addCaption(scan, answers.of(mx.Caption(made, {}, text, (mx.Word("spiky", 2, 7),))))
        found = (mx.Case("\x02one", "be\x03nign\uffff", 0.5),)
        cases.addCases(scan, answers.of(mx.SimilarCases(made, {}, found)))
        slicer_scene.save(tmp_path / "scene.mrb")
    with slicer_scene.opened():
        slicer_scene.load(tmp_path / "scene.mrb", tmp_path / "cache")
        caption, similar = results.findExplanations()
        assert caption.GetText() == "a spiky \n nodule "
        (word,) = captions.words(caption)
        assert caption.GetText()[word["start"] : word["end"]] == "spiky"
        assert cases.cases(similar)[0]["label"] == "be\x03nign\uffff"


def test_real_caption_and_cases_of_a_nodule(app):
    """What the demo network really says, in the scene: the places are near the nodule, words at their maps' peaks."""
    import small_explanations

    volume = small_explanations.chest()
    scan = slicer.util.addVolumeFromArray(volume.data[0].numpy(), volume.affine[:, [2, 1, 0, 3]], "Chest CT")
    caption = small_explanations.caption(volume)
    node = captions.addCaption(scan, answers.of(caption))
    assert "nodule" in node.GetText() and "malignant" in node.GetText()
    shown = [word for word in captions.words(node) if word["map"] is not None]
    assert len(shown) >= 3
    for word in shown:
        np.testing.assert_allclose(word["place"], geometry.peak(word["map"]), atol=1e-3)
        assert np.linalg.norm(np.subtract(word["place"], small_explanations.NODULE)) < 15
    similar = small_explanations.similar_cases(volume)
    found = cases.cases(cases.addCases(scan, answers.of(similar)))
    likeness = [case["similarity"] for case in found]
    assert likeness == sorted(likeness, reverse=True) and 0.5 < likeness[0] < 1
    assert {case["label"] for case in found} == {"benign", "malignant"}
    assert len({geometry.ijkToWorld(case["volume"]).tobytes() for case in found}) == len(found)
    for case in found:
        np.testing.assert_allclose(case["place"], geometry.peak(case["map"]), atol=1e-3)
