"""Release: statistics of the figures, the gate, the report, the bundle."""
