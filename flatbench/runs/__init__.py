"""One run directory, from its opening to its last measure."""
