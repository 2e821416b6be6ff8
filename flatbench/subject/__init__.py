"""Subject of a measure: model, data, loss, space and directions."""
