"""The report: one HTML file about a sweep that opens offline. Plain data in, a page out."""

from services.report.data import (
    CaptionedPicture,
    CharacterReport,
    CheckpointResult,
    DatasetContent,
    ExportedFile,
    Picture,
    ReportData,
    SkippedFile,
    TrialResult,
    WinnerChoice,
    installed_versions,
    read_trial,
)
from services.report.page import build_report
from services.report.pictures import SheetRow, character_sheet, contact_sheet

__all__ = [
    "CaptionedPicture",
    "CharacterReport",
    "CheckpointResult",
    "DatasetContent",
    "ExportedFile",
    "Picture",
    "ReportData",
    "SheetRow",
    "SkippedFile",
    "TrialResult",
    "WinnerChoice",
    "build_report",
    "character_sheet",
    "contact_sheet",
    "installed_versions",
    "read_trial",
]
