"""Strategies: methods on several processes."""

from .injecting import InjectingStrategy as InjectingStrategy
