"""Silence of other libraries while models are loaded and used."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator

from transformers.utils import logging


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No bars, no reports on weights that are new, no notes on deprecation from transformers and peft.

    What is new is meant to be new, or is an error that this package raises itself.
    """
    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(), _no_bars_of_datasets():
            warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers|peft")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _no_bars_of_datasets() -> Iterator[None]:
    """Of datasets only where it is in use: it is imported for data from the hub alone, and takes long."""
    datasets = sys.modules.get("datasets")
    if datasets is None or datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()
