"""What a notebook uses: checkpoints, results, and how they are shown."""
