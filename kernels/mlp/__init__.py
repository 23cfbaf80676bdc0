"""The MLP memory."""
