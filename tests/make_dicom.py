"""Writes a small whole-slide image in DICOM: one file for each level, tiled full, JPEG baseline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import imagecodecs
import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence as Items
from pydicom.uid import JPEGBaseline8Bit, VLWholeSlideMicroscopyImageStorage, generate_uid

TILE = 32


def write_dicom(
    folder: Path, levels: Sequence[NDArray[np.uint8]], um: tuple[float, float] = (0.5, 0.5), declared: int = TILE
) -> tuple[Path, list[NDArray[np.uint8]]]:
    """A series of files in `folder`; each side of a level is a multiple of the tile.

    Args:
        um: microns per level-0 pixel, in x and y.
        declared: side of a tile as the header has it.

    Returns:
        the file of level 0, and the pixels of each level as its JPEGs hold them.
    """
    series, frame, study = generate_uid(), generate_uid(), generate_uid()
    stored = []
    for number, pixels in enumerate(levels):
        tiles = [
            np.ascontiguousarray(pixels[y : y + TILE, x : x + TILE])
            for y in range(0, pixels.shape[0], TILE)
            for x in range(0, pixels.shape[1], TILE)
        ]
        coded = [imagecodecs.jpeg8_encode(tile, level=95, subsampling="444") for tile in tiles]
        data = _header(number, pixels, len(tiles), um, levels[0].shape[1] / pixels.shape[1])
        data.SeriesInstanceUID, data.StudyInstanceUID, data.FrameOfReferenceUID = series, study, frame
        data.Rows = data.Columns = declared
        data.PixelData = encapsulate([item + b"\0" * (len(item) % 2) for item in coded])
        data["PixelData"].is_undefined_length = True
        data.save_as(folder / f"level-{number}.dcm", enforce_file_format=True)
        rows = pixels.shape[0] // TILE
        decoded = np.stack([imagecodecs.jpeg8_decode(item) for item in coded])
        grid = decoded.reshape(rows, -1, TILE, TILE, 3).swapaxes(1, 2)
        stored.append(np.ascontiguousarray(grid.reshape(pixels.shape)))
    return folder / "level-0.dcm", stored


def _header(number: int, pixels: NDArray[np.uint8], frames: int, um: tuple[float, float], down: float) -> Dataset:
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = VLWholeSlideMicroscopyImageStorage
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = generate_uid()
    data.Modality, data.PatientID, data.PatientName = "SM", "0", "Nobody"
    data.ImageType = (
        ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"] if number == 0 else ["DERIVED", "PRIMARY", "VOLUME", "RESAMPLED"]
    )
    data.InstanceNumber = number + 1
    data.DimensionOrganizationType = "TILED_FULL"
    data.NumberOfFrames = frames
    data.TotalPixelMatrixRows, data.TotalPixelMatrixColumns = pixels.shape[:2]
    data.TotalPixelMatrixFocalPlanes = data.NumberOfOpticalPaths = 1
    data.SamplesPerPixel, data.PlanarConfiguration = 3, 0
    data.PhotometricInterpretation = "YBR_FULL_422"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 8, 8, 7, 0
    data.LossyImageCompression = "01"
    data.ImagedVolumeWidth = um[0] * pixels.shape[1] * down / 1000
    data.ImagedVolumeHeight = um[1] * pixels.shape[0] * down / 1000
    data.ImagedVolumeDepth = 0.001
    measures, groups, path = Dataset(), Dataset(), Dataset()
    measures.PixelSpacing = [um[1] * down / 1000, um[0] * down / 1000]  # between rows first
    measures.SliceThickness = 0.001
    groups.PixelMeasuresSequence = Items([measures])
    data.SharedFunctionalGroupsSequence = Items([groups])
    path.OpticalPathIdentifier = "0"
    data.OpticalPathSequence = Items([path])
    return data
