"""What a rank says of itself before ranks work together: its compiled model, its version, its options.

Imports no torch.
"""

from __future__ import annotations

from kraken_compiler.artifact.read import Artifact
from kraken_compiler.communicators.agreement import THE_ARTIFACT
from kraken_compiler.versions import own_version

_SHOWN_DIGITS = 16


def rank_claims(artifact: Artifact, backend: str, reduce_dtype: object = None) -> dict[str, str]:
    """What must be the same on all ranks, by a name for the error message.

    Args:
        artifact: This rank's.
        backend: Whose program it runs.
        reduce_dtype: To which it rounds its parts of sums; None leaves them.
    """
    return {
        "the version of kraken-compiler": own_version(),
        "the backend": backend,
        THE_ARTIFACT: artifact.fingerprint()[:_SHOWN_DIGITS],
        "--reduce-dtype": "not given" if reduce_dtype is None else str(reduce_dtype).removeprefix("torch."),
    }
