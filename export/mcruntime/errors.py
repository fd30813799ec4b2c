"""The errors that a user can cause, on one screen. Each says what happened, where, and what to do.

    McdeployError            exit code 1: a promise failed
    ├── ParityError          two forms of one model disagree, or an output is not finite
    ├── AccuracyError        accuracy fell under the floor that was asked for
    ├── SlowerError          bench: slower than the baseline allows
    ├── TrainingError        the loss became NaN or infinite, a checkpoint could not be written
    └── InputError           exit code 2: what the user gave is wrong
        ├── RecipeError      a key, a type, a combination in a recipe
        ├── DataError        a folder, a class, an image
        ├── WiringError      this backbone cannot be wired the way it was asked
        ├── CheckpointError  a run or checkpoint cannot be read
        ├── BundleError      a bundle is incomplete, changed, or made by another version
        ├── BackendError     a provider, device or opset that was asked for is not there
        └── MissingExtraError  a package is missing; names the extra to install

The command line prints these alone, without traceback. Anything else is our bug and keeps its traceback.
"""


class McdeployError(Exception):
    """A promise failed."""

    exit_code = 1


class ParityError(McdeployError):
    """Two forms of one model disagree, or an output is not finite."""


class AccuracyError(McdeployError):
    """Accuracy fell under the floor that was asked for."""


class SlowerError(McdeployError):
    """Slower than the baseline allows."""


class TrainingError(McdeployError):
    """Training cannot go on."""


class InputError(McdeployError):
    """What the user gave is wrong."""

    exit_code = 2


class RecipeError(InputError):
    """A key, a type or a combination in a recipe."""


class DataError(InputError):
    """A folder, a class or an image."""


class ImageTooLargeError(DataError):
    """An image of more pixels than allowed."""


class WiringError(InputError):
    """This backbone cannot be wired the way it was asked."""


class CheckpointError(InputError):
    """A run or checkpoint cannot be read."""


class BundleError(InputError):
    """A bundle is incomplete, changed, or made by another version."""


class BackendError(InputError):
    """A provider, device or opset that was asked for is not there."""


class MissingExtraError(InputError):
    """A package is missing."""

    def __init__(self, command: str, package: str, extra: str) -> None:
        super().__init__(f"{command} needs the package '{package}'; install it with: pip install 'mcdeploy[{extra}]'")
