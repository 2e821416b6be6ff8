"""Results and what is computed from them: statistics, correlations, summaries."""
