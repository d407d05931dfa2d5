"""Formats: each turns bytes into an archive and, for writing, an archive into bytes."""
