"""The process that qlab runs in: its processor, its settings (which stay as they are), its
terminal."""
