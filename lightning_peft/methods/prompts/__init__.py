"""Trained tokens beside those of the input."""

from .prefixtuning import PrefixTuning as PrefixTuning
