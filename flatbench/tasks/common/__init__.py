"""What families of tasks share."""
