"""What qlab asks of the process that it runs in, and leaves as it was: processor, settings,
terminal."""
