"""Pictures in, an immutable captioned dataset version out. Imports nothing of the other rooms."""

from pathlib import Path
from typing import TYPE_CHECKING

from captioning.captions import (
    CaptionChange,
    caption_all,
    caption_changes,
    caption_findings,
    captioned,
    load_captions,
    load_seen,
)
from captioning.character import (
    Character,
    add_character,
    list_characters,
    load_character,
    make_character,
)
from captioning.class_pictures import (
    ClassPictures,
    is_class_set,
    keep_class_pictures,
    load_class_pictures,
)
from captioning.config import load_config, parse_config
from captioning.curation import (
    Coverage,
    CurationLimits,
    curation_findings,
    propose_decisions,
    set_coverage,
)
from captioning.decisions import (
    Decision,
    Override,
    blocking,
    decide,
    find_image,
    kept_images,
    load_decisions,
    load_overrides,
    override,
    require_passable,
)
from captioning.decode import PictureError, opacity, upright_rgb
from captioning.edits import Corrections, Edit, corrections, load_edits, record_edits
from captioning.errors import UserError
from captioning.exports import ExportFormat, export_version
from captioning.findings import DATASET, Finding, Severity, worst_first
from captioning.framing import (
    DIRECTIONS,
    FRAMINGS,
    Direction,
    Framing,
    direction_of,
    framing_of,
    side_unsigned,
)
from captioning.imported import use_imported
from captioning.intake import (
    Image,
    ImportedCaption,
    IntakeReport,
    Skipped,
    load_images,
    load_imported,
    load_skipped,
    take_in,
)
from captioning.lint import CODES, Captioned, fixes
from captioning.lint import lint as lint_captions  # `lint` is the package's own name here
from captioning.object_store import ObjectStore, open_objects
from captioning.observations import (
    Box,
    Observation,
    ObservationsFailed,
    ObserverClient,
    Quality,
    load_observations,
    observe,
)
from captioning.observer_config import (
    CaptionerConfig,
    EmbedderConfig,
    EndpointConfig,
    ObserverConfig,
    Prompt,
    QualityConfig,
    SubjectConfig,
    TaggerConfig,
)
from captioning.observers.embedder import Embedder
from captioning.observers.weights import no_progress_bars, require_model
from captioning.render import Caption, render, render_all
from captioning.render_tags import Seen
from captioning.review import (
    CONFIDENCE,
    ImportedReviews,
    Queue,
    bad_rate_bound,
    import_table,
    review_queue,
    to_table,
)
from captioning.rules import Fixed, Replace, Rules
from captioning.sharing import Transfer, pull_version, push_version
from captioning.store import BlobStore, Store, content_hash, sync_directory, write_atomic
from captioning.unpack import UnpackLimits
from captioning.version_diff import VersionDiff, diff_versions, marked
from captioning.versions import (
    DatasetVersion,
    ModelUsed,
    Sample,
    find_dataset,
    freeze,
    latest_dataset,
    list_dataset_versions,
    list_version_names,
    load_dataset,
)

if TYPE_CHECKING:
    from captioning.serving import serve_observers

_STARTER = Path(__file__).parent / "starter"
STARTER_TAGGER = _STARTER / "tagger"
STARTER_CAPTIONER = _STARTER / "captioner"
STARTER_CLIP = _STARTER / "clip"

__all__ = [
    "CODES",
    "CONFIDENCE",
    "DATASET",
    "DIRECTIONS",
    "FRAMINGS",
    "STARTER_CAPTIONER",
    "STARTER_CLIP",
    "STARTER_TAGGER",
    "BlobStore",
    "Box",
    "Caption",
    "CaptionChange",
    "Captioned",
    "CaptionerConfig",
    "Character",
    "ClassPictures",
    "Corrections",
    "Coverage",
    "CurationLimits",
    "DatasetVersion",
    "Decision",
    "Direction",
    "Edit",
    "Embedder",
    "EmbedderConfig",
    "EndpointConfig",
    "ExportFormat",
    "Finding",
    "Fixed",
    "Framing",
    "Image",
    "ImportedCaption",
    "ImportedReviews",
    "IntakeReport",
    "ModelUsed",
    "ObjectStore",
    "Observation",
    "ObservationsFailed",
    "ObserverClient",
    "ObserverConfig",
    "Override",
    "PictureError",
    "Prompt",
    "Quality",
    "QualityConfig",
    "Queue",
    "Replace",
    "Rules",
    "Sample",
    "Seen",
    "Severity",
    "Skipped",
    "Store",
    "SubjectConfig",
    "TaggerConfig",
    "Transfer",
    "UnpackLimits",
    "UserError",
    "VersionDiff",
    "add_character",
    "bad_rate_bound",
    "blocking",
    "caption_all",
    "caption_changes",
    "caption_findings",
    "captioned",
    "content_hash",
    "corrections",
    "curation_findings",
    "decide",
    "diff_versions",
    "direction_of",
    "export_version",
    "find_dataset",
    "find_image",
    "fixes",
    "framing_of",
    "freeze",
    "import_table",
    "is_class_set",
    "keep_class_pictures",
    "kept_images",
    "latest_dataset",
    "lint_captions",
    "list_characters",
    "list_dataset_versions",
    "list_version_names",
    "load_captions",
    "load_character",
    "load_class_pictures",
    "load_config",
    "load_dataset",
    "load_decisions",
    "load_edits",
    "load_images",
    "load_imported",
    "load_observations",
    "load_overrides",
    "load_seen",
    "load_skipped",
    "make_character",
    "marked",
    "no_progress_bars",
    "observe",
    "opacity",
    "open_objects",
    "override",
    "parse_config",
    "propose_decisions",
    "pull_version",
    "push_version",
    "record_edits",
    "render",
    "render_all",
    "require_model",
    "require_passable",
    "review_queue",
    "serve_observers",
    "set_coverage",
    "side_unsigned",
    "sync_directory",
    "take_in",
    "to_table",
    "upright_rgb",
    "use_imported",
    "worst_first",
    "write_atomic",
]


def __getattr__(name: str) -> object:
    """Import what serves the models when it is asked for (PEP 562): most commands need none."""
    if name != "serve_observers":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from captioning.serving import serve_observers

    return serve_observers
