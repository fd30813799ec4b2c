"""The error tree, drawn at the top of ``mcruntime.errors``; it lives there because the serving side has no mcdeploy."""

from mcruntime.errors import (
    AccuracyError,
    BackendError,
    BundleError,
    CheckpointError,
    DataError,
    InputError,
    McdeployError,
    MissingExtraError,
    ParityError,
    RecipeError,
    SlowerError,
    TrainingError,
    WiringError,
)

__all__ = [
    "AccuracyError",
    "BackendError",
    "BundleError",
    "CheckpointError",
    "DataError",
    "InputError",
    "McdeployError",
    "MissingExtraError",
    "ParityError",
    "RecipeError",
    "SlowerError",
    "TrainingError",
    "WiringError",
]
