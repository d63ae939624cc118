"""Caption lint: what is wrong with captions, each finding with a stable code and its place.

Pure: captions and the character in, findings out, worst first. `fixes` turns the mechanical ones
into human edits; nothing here writes anything. The codes are listed in docs/captions.md.
"""

from captioning.lint.checks import lint
from captioning.lint.codes import CODES, Code
from captioning.lint.fixes import fixes
from captioning.lint.subject import Captioned

__all__ = ["CODES", "Captioned", "Code", "fixes", "lint"]
