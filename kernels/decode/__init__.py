"""Decoding steps of both memories; stepper.py is the way in."""
