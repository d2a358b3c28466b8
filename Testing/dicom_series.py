"""A scan as a series of CT slices, as a scanner would send it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

import MedXAILib as mx


def write_series(volume: mx.Volume, folder: Path, backwards: bool = False) -> Path:
    """Write `volume` (1, D, H, W) as CT slices of a made-up patient; `backwards`: numbered from the last one."""
    folder.mkdir(parents=True, exist_ok=True)
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ volume.affine
    step = np.linalg.norm(lps[:3, :3], axis=0)
    study, series, frame = generate_uid(), generate_uid(), generate_uid()
    count = volume.shape[0]
    for d in range(count):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, generate_uid()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        one = FileDataset(str(folder), {}, file_meta=meta, preamble=b"\0" * 128)
        one.SOPClassUID, one.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
        one.StudyInstanceUID, one.SeriesInstanceUID, one.FrameOfReferenceUID = study, series, frame
        one.PatientName, one.PatientID, one.PatientBirthDate, one.PatientSex = "Doe^Jane", "P-1", "19700101", "F"
        one.StudyID, one.AccessionNumber, one.ReferringPhysicianName = "1", "A1", ""
        one.StudyDate, one.StudyTime, one.Modality, one.Manufacturer = "20260101", "120000", "CT", "None"
        one.SeriesNumber, one.InstanceNumber = 1, count - d if backwards else d + 1
        one.ImageType, one.PositionReferenceIndicator = ["ORIGINAL", "PRIMARY", "AXIAL"], ""
        one.Rows, one.Columns = volume.shape[1:]
        one.SamplesPerPixel, one.PhotometricInterpretation = 1, "MONOCHROME2"
        one.BitsAllocated, one.BitsStored, one.HighBit, one.PixelRepresentation = 16, 16, 15, 1
        one.RescaleIntercept, one.RescaleSlope, one.KVP, one.SliceThickness = 0, 1, 120, float(f"{step[0]:.8g}")
        one.PixelSpacing = [float(f"{mm:.10g}") for mm in step[1:]]
        one.ImageOrientationPatient = [float(f"{v:.10g}") for v in (*lps[:3, 2] / step[2], *lps[:3, 1] / step[1])]
        one.ImagePositionPatient = [float(f"{v:.10g}") for v in (lps @ [d, 0, 0, 1])[:3]]
        one.PixelData = volume.data[0, d].round().numpy().astype("<i2").tobytes()
        one.save_as(folder / f"{d:03d}.dcm", enforce_file_format=True)
    return folder
