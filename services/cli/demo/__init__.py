"""The main job on two example characters, whose pictures lie beside this file."""

from services.cli.demo.run import run_demo

__all__ = ["run_demo"]
