"""The loss at many points, their cost kept low."""
