"""Networks as pure functions of parameters: what one reuses."""
