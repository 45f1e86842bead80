"""What a person writes: pipeline and profile files, read and checked."""
