"""Adapter files for generation tools: a checkpoint in, a verified safetensors file out."""

from training.export.adapter import ExportReport, export_adapter
from training.export.verify import VerificationError

__all__ = ["ExportReport", "VerificationError", "export_adapter"]
