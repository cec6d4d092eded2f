"""Results for people: the tables and lines that the verbs print on stdout."""

from holotype.terminal.data import (
    show_adjudicated,
    show_agreement,
    show_applied,
    show_audit,
    show_converted,
    show_plan,
)
from holotype.terminal.deployment import (
    show_benchmark,
    show_comparison,
    show_compressed,
    show_experiment,
    show_exported,
)
from holotype.terminal.models import (
    prediction_lines,
    show_demo,
    show_explanation,
    show_hard_samples,
    show_models,
    show_report,
    show_settings,
    show_tune,
)

__all__ = [
    "prediction_lines",
    "show_adjudicated",
    "show_agreement",
    "show_applied",
    "show_audit",
    "show_benchmark",
    "show_comparison",
    "show_compressed",
    "show_converted",
    "show_demo",
    "show_experiment",
    "show_explanation",
    "show_exported",
    "show_hard_samples",
    "show_models",
    "show_plan",
    "show_report",
    "show_settings",
    "show_tune",
]
