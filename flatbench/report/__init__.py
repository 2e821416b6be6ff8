"""Statistics, tables and figures from the results table; imports no torch."""
