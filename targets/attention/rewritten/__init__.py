"""Ordinary attention whose graph rewrites have edited."""
