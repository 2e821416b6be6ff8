"""What a measure is taken of: model, data, loss, space and directions."""
