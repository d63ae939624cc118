"""Adapter files for generation tools: a checkpoint in, a verified safetensors file out."""

from training.export.adapter import export_adapter
from training.export.verify import VerificationError
from training.export_report import ExportReport

__all__ = ["ExportReport", "VerificationError", "export_adapter"]
