"""Measurements: which methods and models are compared, how a run is counted, and what is reported of it."""
