"""Pipeline and profile files: their models, reading and validation."""
