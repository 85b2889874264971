"""Readers and writers of dictionary files, one module a format."""
