"""The choices that Miras names, one table each."""
