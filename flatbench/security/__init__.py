"""What a study of somebody else's may reach: paths, code, secrets."""
