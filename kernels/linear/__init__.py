"""The linear memory."""
