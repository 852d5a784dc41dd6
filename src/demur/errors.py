"""Every error demur raises on purpose. Each is a `DemurError` and the builtin that a caller would expect.

The message is one sentence for a person: what was given, what was expected, what to try.
"""


class DemurError(Exception):
    """Base of all errors that demur raises on purpose; the CLI prints its message without a traceback."""


class InputError(DemurError, ValueError):
    """A setting, prompt file or spec that cannot be used as given."""


class NotFoundError(DemurError, FileNotFoundError):
    """A model, SAE or file that does not exist where it was looked for."""


class MismatchError(DemurError, ValueError):
    """Two artefacts that do not belong together: an SAE of another width or of another model."""


class DownloadError(DemurError, ConnectionError):
    """The embedded model could not be fetched, or what arrived is not what was pinned."""


class RunExistsError(DemurError, FileExistsError):
    """The run folder holds a run with another configuration."""


class StorageError(DemurError, OSError):
    """A file could not be written: the disk is full or the folder is read-only."""


class MissingExtraError(DemurError, ImportError):
    """A feature needs a package that is not installed; the message names the extra that brings it."""
