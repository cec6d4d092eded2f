"""Training: a head on frozen features, then the loop that fine-tunes from it; a room for each part."""

from holotype.fit.features import computed_features
from holotype.fit.run import Best, Learned, Watch
from holotype.fit.session import Session, fit_session_head, learn, open_session

__all__ = [
    "Best",
    "Learned",
    "Session",
    "Watch",
    "computed_features",
    "fit_session_head",
    "learn",
    "open_session",
]
