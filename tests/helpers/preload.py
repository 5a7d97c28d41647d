"""Imports what train.main and others import late, so that forked sessions do not take the time."""

import importlib
import pkgutil

import distributed
import evaluation
import fileio
import heads
import training

for package in (distributed, evaluation, fileio, heads, training):
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
