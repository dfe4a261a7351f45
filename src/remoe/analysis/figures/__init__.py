"""The figures of the report in the order in which it shows them; each file turns runs into one Figure."""
