"""Loggers that speak once, however many processes there are."""

import logging

import torch


def get_logger(name: str) -> logging.Logger:
    """The logger of a module, on the first process only.

    That of accelerate raises an error in a loop that has no `Accelerator`, and one of transformers speaks on every
    process.
    """
    logger = logging.getLogger(name)
    logger.addFilter(_is_first)
    return logger


def _is_first(record: logging.LogRecord) -> bool:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not distributed or torch.distributed.get_rank() == 0
