"""How near generated pictures come to drawn ones, in the starter CLIP's features.

Near as a crowd is good: that is the kernel distance (KID). Near to one training picture is not:
that would be a copy. Pictures are uint8 (N, 64, 64, 3); nothing is written.
"""

from __future__ import annotations

import bundle
import numpy as np
import torch
from autoencoder import to_pixels
from transformers import CLIPModel

BATCH = 256
# A generated picture counts as a copy when it is nearer to a training picture than all but this
# share of the kept-out pictures are. Without copying the measure comes out at about this share.
COPY_SHARE = 0.01


@torch.no_grad()
def features(pixels: np.ndarray) -> np.ndarray:
    """Picture embeddings (N, 128) of length 1."""
    model = CLIPModel.from_pretrained(bundle.CLIP, dtype=torch.float32).eval()
    parts = []
    for start in range(0, len(pixels), BATCH):
        # The bundle's processor only scales pixels of this size to [-1, 1]: see bundle.HALF.
        x = to_pixels(pixels[start : start + BATCH]).contiguous()
        parts.append(model.visual_projection(model.vision_model(pixel_values=x).pooler_output))
    found = torch.cat(parts)
    return (found / found.norm(dim=1, keepdim=True)).numpy()


def kernel_distance(one: np.ndarray, other: np.ndarray) -> float:
    """KID (Binkowski et al. 2018, arXiv:1801.01401): the unbiased squared MMD of a cubic kernel.

    The features are scaled to a mean square of 1 per axis, the size at which the kernel's two terms
    weigh alike. 0 for two samples of one distribution, give or take the sampling error.
    """
    x, y = (part.astype(np.float64) * part.shape[1] ** 0.5 for part in (one, other))

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def inside(a: np.ndarray) -> float:
        k = kernel(a, a)
        return (k.sum() - np.trace(k)) / (len(a) * (len(a) - 1))

    return float(inside(x) + inside(y) - 2 * kernel(x, y).mean())


def nearest(rows: np.ndarray, among: np.ndarray) -> np.ndarray:
    """The cosine (N,) of each row of features to its nearest row in `among`."""
    starts = range(0, len(rows), BATCH)
    return np.concatenate([(rows[at : at + BATCH] @ among.T).max(1) for at in starts])


def copied_share(generated: np.ndarray, kept_out: np.ndarray, trained: np.ndarray) -> float:
    """The share of generated pictures that count as copies (features in, see COPY_SHARE)."""
    limit = np.quantile(nearest(kept_out, trained), 1 - COPY_SHARE)
    return float((nearest(generated, trained) > limit).mean())
