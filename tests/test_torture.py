"""A short part of the torture: `make torture` is the whole of it."""

import os
import sys
import time

import pytest
import transformers

from torture import disk, engine, fuzz, hostile, kill
from torture.engine import Case, LostError, WrongError, bad, run, table
