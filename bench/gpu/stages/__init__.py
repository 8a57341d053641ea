"""What each stage does, in a process of its own."""
