"""The user's model: its parameters, the ranks that hold it, hooks on it, and leaving it as it was."""
