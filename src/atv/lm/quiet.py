"""Other libraries' bars and false alarms, kept off the screen while we load something: afterwards all is as it was."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from transformers.utils import logging as transformers_logging


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Inside, transformers and bitsandbytes report errors alone, and no bar but that of a download is shown.

    What is left out: "Loading weights", the report on weights that are not read from a file ("newly initialized"),
    where those that matter are missing we raise an error ourselves, and at the first import of bitsandbytes that a
    kernel is not installed ("Failed to load CPU gemm_4bit_forward"), which it does without.
    """
    bitsandbytes = logging.getLogger("bitsandbytes")
    levels = transformers_logging.get_verbosity(), bitsandbytes.level
    bars, downloads = transformers_logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()  # downloads' too
    _show_downloads(downloads)
    bitsandbytes.setLevel(logging.ERROR)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(levels[0])
        if bars:
            transformers_logging.enable_progress_bar()
            _show_downloads(downloads)
        bitsandbytes.setLevel(levels[1])


def _show_downloads(shown: bool) -> None:
    enable_progress_bars() if shown else disable_progress_bars()
