"""Verbs and pipelines: what the command line does, as functions that compose the rooms below."""
