"""A whole score of a checkpoint, for tests of what is made of scores."""

from training import Interval, Score, ScoringConfig


def score(identity: float) -> Score:
    nothing = Interval(value=0.0, low=0.0, high=0.0)
    around = Interval(value=identity, low=identity - 0.01, high=identity + 0.01)
    return Score(
        base_key="k",
        identity=around,
        identities=(identity - 0.01, identity, identity + 0.01),
        prompt_fidelity=Interval(value=0.9, low=0.9, high=0.9),
        **dict.fromkeys(("drift", "leak", "memorisation", "diversity"), nothing),
        identity_raw=around,
        prompt_cosine=around,
        base_identity=nothing,
        floor=0.5,
        ceiling=0.8,
        identity_normalised=True,
        prompt_fidelity_normalised=True,
        references="holdout",
        reference_count=5,
        embedder="clip",
        embedder_revision="1",
        config=ScoringConfig(),
        pictures=(),
    )
