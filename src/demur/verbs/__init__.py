"""What each command does, callable from Python: rooms wired together, no parsing, no printing of results."""
