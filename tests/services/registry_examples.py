"""The card of an adapter, as a sweep writes it."""

from services.registry.bundle import AdapterCard
from training import MEASURES, Interval

CARD = AdapterCard(
    character="aya",
    family="sd15",
    checkpoint_sha256="c" * 64,
    trial="t0123456789ab",
    step=400,
    method="lora",
    rank=8,
    base="/home/someone/models/starter",
    base_hash="b" * 64,
    dataset="aya/v0001-1a2b3c4d",
    trigger="ayachar",
    class_word="person",
    recommended_weight=1.0,
    scores={name: Interval(value=0.62, low=0.551, high=0.704) for name in MEASURES},
)
