"""The design choices of Miras, a table each: memories, attentional biases, retention gates."""
