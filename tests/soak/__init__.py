"""The soak: real processes that play rounds without end, are killed, and drop out."""
