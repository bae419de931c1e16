"""Adapters to training frameworks, one module each; a module needs its framework installed."""
