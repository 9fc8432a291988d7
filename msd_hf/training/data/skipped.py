"""Which samples of a data set were skipped, and why."""

from __future__ import annotations

from collections import Counter

from transformers.utils import logging

from ...errors import MSDDataError
from ...terminal import one_line


logger = logging.get_logger(__name__)

NUM_EXAMPLES = 3  # error messages that are kept for each reason


class SkippedSamples:
    """
    Counts skipped samples by reason, and says which they are: the errors of the first few samples of each reason are
    logged as warnings, those of all others as information.

    Args:
        strict: raise the first error instead.
        is_logged: `False` if the caller shows the examples itself.
    """

    def __init__(self, strict: bool = False, is_logged: bool = True):
        self.strict, self.is_logged = strict, is_logged
        self.reasons: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}

    def add(self, error: MSDDataError) -> None:
        """
        Counts the sample of an error.

        Raises:
            MSDDataError: with `strict`, that error.
        """
        if self.strict:
            raise error
        self.reasons[error.reason] += 1
        examples = self.examples.setdefault(error.reason, [])
        is_example = len(examples) < NUM_EXAMPLES
        if is_example:
            examples.append(str(error))
        if self.is_logged:
            logger.log(logging.WARNING if is_example else logging.INFO, "Skipped: %s", one_line(str(error)))


__all__ = ["NUM_EXAMPLES", "SkippedSamples"]
