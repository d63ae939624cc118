"""The limits that pictures are held against, each with where it comes from.

"Ours" marks a limit that no publication gives; it was chosen on the fixture and the demo pictures.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

# Stable Diffusion 1.x was trained at 512 px; guides for larger bases reject smaller pictures too.
SMALLEST_GUIDED_PX = 512


class CurationLimits(BaseModel):
    """All limits of curation. Only `base_px` depends on what is trained."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    base_px: int = Field(
        512,
        ge=8,
        description="Short side that the base model works at, px: 512 for SD 1.5, 1024 for SDXL "
        "and Flux. Below the smaller of it and 512 a picture blocks, below it, it warns.",
    )
    tag_threshold: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Score from which a tag counts. Default: each tagger's own, by its model card.",
    )
    blur_share: float = Field(
        0.25, gt=0, lt=1, description="Sharpness under this share of the set's median warns. Ours."
    )
    blur_block_below: float = Field(
        20.0,
        ge=0,
        description="It blocks when also under this Laplacian variance: sharp but softly textured "
        "pictures score 15 to 46, a 2-px blur of a 1024-px drawing 29 to 78. Ours.",
    )
    blur_min_pictures: int = Field(
        3, ge=2, description="With fewer pictures a median says nothing about the set. Ours."
    )
    blank_contrast: float = Field(
        0.02,
        ge=0,
        description="Under this standard deviation of grey (5 of 255) it is blank. Ours.",
    )
    dark_share: float = Field(
        0.90, gt=0, le=1, description="Share of pixels under 5 % grey that is too dark. Ours."
    )
    bright_share: float = Field(
        0.95,
        gt=0,
        le=1,
        description="Share of pixels over 95 % grey that is too bright; a small figure on white "
        "stays under it. Ours.",
    )
    grey_chroma: float = Field(
        0.02, ge=0, description="Mean chroma under which a picture is greyscale. Ours."
    )
    colour_chroma: float = Field(
        0.08, ge=0, description="Median chroma of the set from which it is a colour set. Ours."
    )
    subject_boxes_score: float = Field(
        0.3, ge=0, le=1, description="Score of a person's box that counts (imgutils detect_person)."
    )
    subject_area: float = Field(
        0.4,
        ge=0,
        le=1,
        description="Share of the picture under which the subject is small (waifuc PersonRatio).",
    )
    outlier_min_pictures: int = Field(
        8, ge=3, description="With fewer pictures no spread can be measured. Ours."
    )
    outlier_spreads: float = Field(
        3.0,
        gt=0,
        description="An outlier is farther from the medoid than the median + this many x 1.4826 x "
        "MAD: three standard deviations of a normal distribution.",
    )
    style_distance: float = Field(
        0.15,
        ge=0,
        description="Cosine distance up to which no picture is a style outlier, however alike the "
        "others are. Ours, on the starter CLIP.",
    )
    style_bits: float = Field(
        3.0,
        gt=0,
        le=8,
        description="Least difference from the medoid, in bits of grey histogram entropy, of "
        "another style: the demo's flat drawings have 1 to 3, the tests' painting 7. Ours.",
    )
    identity_distance: float = Field(
        0.6,
        ge=0,
        description="The same for identity, a distance of trait scores (1 = one trait replaced by "
        "another, 0.5 = one missing). Ours.",
    )
    near_bits: int = Field(
        6,
        ge=0,
        le=64,
        description="Bits of phash up to which two are one picture (ImageHash). Ours.",
    )
    review_bits: int = Field(
        10, ge=0, le=64, description="Up to which a person should look (imagededup's default)."
    )
    same_cosine: float = Field(
        0.985,
        ge=-1,
        le=1,
        description="Cosine from which two look alike (Dataset Maker's notebook: 0.97-0.99).",
    )
    candidate_cosine: float = Field(
        0.70,
        ge=-1,
        le=1,
        description="Cosine from which the pixels of two are compared for a mirrored or cropped "
        "copy: a central 75 % crop keeps 0.80 to 0.98 with the starter CLIP, as other pictures "
        "of the same character do, so the embedding proposes and pixels decide. Ours.",
    )
    candidates: int = Field(
        8, ge=1, description="Nearest pictures of each that are compared by their pixels. Ours."
    )
    block_pictures: int = Field(
        5, ge=0, description="Fewer can't be trained on (users' guides: at least 5)."
    )
    warn_pictures: int = Field(15, ge=0, description="Fewer train poorly (guides: 20 to 30).")
    close_up_share: tuple[float, float] = Field(
        (0.25, 0.40), description="Share of head-and-shoulders pictures (civitai article 31467)."
    )
    one_value_share: float = Field(
        0.60,
        gt=0,
        le=1,
        description="Share of pictures with the same value that is monotonous. Ours.",
    )
