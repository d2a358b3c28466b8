"""The sample data as Slicer's Sample Data module gets it.

With MEDXAI_SLICER_SOURCE set to a checkout of Slicer, that module's own code registers and fetches them.
"""

from __future__ import annotations

import ast
import hashlib
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from urllib.request import urlopen

import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image

from MedXAILib.resources import path
from MedXAISlicerLib import samples

ICONS = Path(__file__).resolve().parent.parent / "MedXAI" / "Resources" / "Icons"


@pytest.fixture
def register(monkeypatch) -> Callable[..., list[dict]]:
    """Registers with a Sample Data module of some version; returns what that was given."""

    def registered(categories: bool = True) -> list[dict]:
        sources, titles = [], {}
        logic = SimpleNamespace(registerCustomSampleDataSource=lambda **source: sources.append(source))
        if categories:
            logic.registerCustomSampleDataCategory = lambda category, title: titles.update({category: title})
        monkeypatch.setitem(sys.modules, "SampleData", SimpleNamespace(SampleDataLogic=logic))
        samples.registerSampleData()
        assert titles == ({"MedXAI": "MedXAI"} if categories else {})
        return sources

    return registered


def test_the_files_are_there_and_are_the_ones_meant(register):
    sources = register()
    scans = {file.read_bytes() for file in path("SampleData").glob("*.nrrd") if "_mask" not in file.name}
    assert {urlopen(source["uris"]).read() for source in sources} == scans
    for source in sources:
        assert source["category"] == "MedXAI"
        assert source["checksums"] == "SHA256:" + hashlib.sha256(urlopen(source["uris"]).read()).hexdigest()
        assert source["nodeNames"] == source["sampleName"]
        assert source["fileNames"].endswith(".nrrd")
    # Slicer keeps what it fetches under these names, for all its modules.
    assert len({source["fileNames"] for source in sources}) == len(sources)


def test_slicer_5_10_has_no_titles_of_categories(register):
    assert register(categories=False) == register()


@pytest.mark.parametrize("name", ["chest_ct_nodule", "chest_ct_mass"])
def test_thumbnail_shows_the_scan(register, name):
    """Its lesion in a lung window; MEDXAI_PICTURES writes it anew."""
    scan, mask = (
        sitk.GetArrayFromImage(sitk.ReadImage(str(path(f"SampleData/{name}{end}.nrrd")))) for end in ("", "_mask")
    )
    k, _, i = (round(float(index.mean())) for index in np.nonzero(mask))
    left = min(max(i - 130, 0), scan.shape[2] - 260)
    lung = np.clip((scan[k, -280:, left : left + 260] + 1350.0) / 1500, 0, 1)
    shown = np.round(lung * 63).astype(np.uint8) * 4
    file = ICONS / f"{name}.png"
    if "MEDXAI_PICTURES" in os.environ:
        Image.fromarray(shown).quantize(64).save(file, optimize=True)
    assert np.array_equal(np.asarray(Image.open(file).convert("L")), shown)
    assert shown.shape == (280, 260)
    assert file.stat().st_size < 60_000
    assert str(file) in {source["thumbnailFileName"] for source in register()}


def test_slicers_own_module_takes_and_fetches_them(monkeypatch, tmp_path, register):
    if "MEDXAI_SLICER_SOURCE" not in os.environ:
        pytest.skip("MEDXAI_SLICER_SOURCE is not set to a checkout of Slicer")
    source = Path(os.environ["MEDXAI_SLICER_SOURCE"]) / "Modules/Scripted/SampleData/SampleData.py"
    tree = ast.parse(source.read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if getattr(node, "name", "") in ("SampleDataSource", "SampleDataLogic")]
    util = pytest.importorskip("slicer").util
    slicer = SimpleNamespace(modules=SimpleNamespace())
    module = SimpleNamespace(_=str, logging=logging, os=os, slicer=slicer)
    module.computeChecksum, module.extractAlgoAndDigest = util.computeChecksum, util.extractAlgoAndDigest
    exec(compile(tree, str(source), "exec"), vars(module))
    monkeypatch.setitem(sys.modules, "SampleData", module)
    samples.registerSampleData()
    samples.registerSampleData()
    assert [s.sampleName for s in slicer.modules.sampleDataSources["MedXAI"]] == [name for name, *_ in samples.SAMPLES]
    quiet = SimpleNamespace(
        rewriteUrl=module.SampleDataLogic.rewriteUrl, logMessage=lambda *_: None, reportHook=lambda *_: None
    )
    for known in slicer.modules.sampleDataSources["MedXAI"]:
        module.SampleDataLogic.downloadFile(quiet, known.uris[0], str(tmp_path), known.fileNames[0], known.checksums[0])
        assert quiet.downloadPercent == 100
        assert (tmp_path / known.fileNames[0]).read_bytes() == urlopen(known.uris[0]).read()
