"""A caption with more tokens than CLIP's encoder reads."""

BOLIVANTE = (
    "pantyhose, striped pantyhose, vertical-striped pantyhose, obi, sash, wide sleeves, "
    "nail polish, kimono, japanese clothes, striped clothes, vertical-striped clothes, frills, "
    "makeup, hair ornament, yellow hair ornament, purple eyes, eyeshadow, black hair, big hair, "
    "single hair bun, hair bun, lipstick, black lips, pale skin, white skin"
)
