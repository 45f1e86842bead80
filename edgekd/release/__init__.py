"""What leaves the house: statistics of the figures, the gate, the report, the bundle."""
