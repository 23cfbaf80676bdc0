"""Decoding steps of both memories."""
