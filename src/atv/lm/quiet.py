"""Silence other libraries' progress bars and irrelevant warnings while something is loaded."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from transformers.utils import logging as transformers_logging


@contextmanager
def errors_alone(name: str) -> Iterator[None]:
    """Inside this context a logger logs only errors."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Inside this context transformers and bitsandbytes log only errors, and only downloads show a progress bar.

    It hides "Loading weights"; the report on weights that are not in a file ("newly initialized"), since we raise an
    error ourselves if relevant ones are missing; and the message at the first import of bitsandbytes that an optional
    kernel is not installed ("Failed to load CPU gemm_4bit_forward"). Former log levels are restored at the end.
    """
    level = transformers_logging.get_verbosity()
    bars, downloads = transformers_logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()  # also those of downloads
    _show_downloads(downloads)
    try:
        with errors_alone("bitsandbytes"):
            yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
            _show_downloads(downloads)


def _show_downloads(shown: bool) -> None:
    enable_progress_bars() if shown else disable_progress_bars()
